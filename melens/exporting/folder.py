"""export(): one edit of one model into a folder that is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from melens.errors import InterventionError, OutputError, ResultError
from melens.exporting.baked_gguf import FIELD, GGUF_FILE
from melens.exporting.prefix import (
    FIRST_ONLY,
    Prefix,
    check_like_peft,
    constant_prefix,
    difference,
    facts_of,
    fixed_first,
    row_of,
    token_prefix,
    write_adapter,
    write_prefix,
)
from melens.exporting.reload import check_edit
from melens.exporting.subject import (
    MELENS_JSON,
    Subject,
    dtype_of,
    plain_to_save,
    probe_of,
    read_edit,
    subject_of,
    vocabulary_of,
    write_edit,
)
from melens.formatting import brief, clipped
from melens.framing import require_known
from melens.protocols import Loadable, Tokenizer, TransformersModel
from melens.provenance import ModelFacts, RunInfo
from melens.results import MELayer
from melens.results.baked import BAKED, Baked, baked_in
from melens.results.edit import CONSTANT, ChosenPrefix, Edit, EditFile, Format, PrefixFacts
from melens.results.reading import HoldsMELayer, located_in
from melens.settings import require_path
from melens.store import try_writing, write_folder

README = "README.md"
CONFIG, NOT_APPLIED = "config.json", "melens_edit"
"""The field of config.json that says of an edit that the weights do not hold it."""
WARNING = (
    "loaded by transformers, vLLM or anything but melens, this folder is the model WITHOUT the edit"
)
_TEXT = """# {model}, with an edit kept beside it

**{warning}.** The weights here are those of `{model}`, unchanged. The edit
(`{edit}`) is in `melens.json`; it acts while the model runs, on massive tokens alone, so no weight
can hold it. `config.json` says `"melens_edit": {{"applied": false, ...}}`.

## What works

1. `melens.load`: the edit is in force on every forward pass and in `generate`:

```python
import melens

model = melens.load(".")  # the path of this folder
print(model.melens_edit)
```

On the command line, side by side with the model that is not edited:

```text
melens generate PATH-OF-THIS-FOLDER --prompt "Once upon a time"
```

{constant}
"""
_CONSTANT = """2. A prefix: with a fixed first token the edit is a constant key and value of it.
   `melens export MODEL --format prefix ... -o DIR`, then in transformers
   `hf.generate(**for_generate(ids, mask), past_key_values=load_prefix(DIR, hf))`
   (both of `melens.exporting`).
3. A PEFT adapter, which needs no melens: `melens export MODEL --format peft ... -o DIR`, then
   `peft.PeftModel.from_pretrained(hf, DIR)`, and the first token left out of the input."""
_NEVER = """`--format prefix` and `--format peft` cannot hold `{name}`: it is no constant change of
one token's key and value."""
_BAKED = """# {model}, with changed weights

The weights here are not those of `{model}`: whatever loads this folder has the changes. They act at
every token. {where} keeps them under `{name}`, `melens.json` as well.

{rows}
"""
_GGUF = """
Tokenizer, fields and every other tensor are copied from the GGUF file that this is made of.

```text
llama-cli -m {file}
```

```python
hf = AutoModelForCausalLM.from_pretrained(".", gguf_file="{file}")  # the path of this folder
tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="{file}")
```
"""


def readme(record: EditFile) -> str | None:
    """The text for one export; None where the folder is the model and nothing else."""
    model, edit = (
        clipped(text).replace("`", "'") for text in (record.run.model, record.edit.label)
    )
    if record.edit.name != "none":
        warning = WARNING[:1].upper() + WARNING[1:]
        name = record.edit.name
        constant = _CONSTANT if name in FIRST_ONLY else _NEVER.format(name=name)
        return _TEXT.format(model=model, edit=edit, warning=warning, constant=constant)
    if not record.baked:
        return None
    rows = [
        f"- {clipped(change.label)} (on {clipped(made.model)}, weights {clipped(made.weights)})"
        for made in record.baked
        for change in made.edits
    ]
    where, name = ("`config.json`", BAKED) if record.format == "hf" else (f"`{GGUF_FILE}`", FIELD)
    text = "\n".join(rows).replace("`", "'")
    made = _BAKED.format(model=model, where=where, name=name, rows=text)
    return made + (_GGUF.format(file=GGUF_FILE) if record.format == "gguf" else "")


def export(  # noqa: PLR0913 (one call for three formats)
    model: Loadable,
    edit: Edit,
    *,
    format: str = "hf",
    out: str | Path,
    me_layer: HoldsMELayer | None = None,
    first_token: str | int | ChosenPrefix | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Save an edit so that it can be used elsewhere; the folder appears when it is whole.

    Args:    model: a name, a folder, a bridge or a transformers model.
             format: ``hf``: a model folder that transformers reads, with a melens.json that
             ``melens.load`` applies again; loaded by anything else it is the model without the
             edit, as the README.md in it says. ``prefix``: keys and values of the fixed first token
             under the edit (:func:`melens.exporting.load_prefix`). ``peft``: the same as a
             prefix-tuning adapter; leave the first token out of the input.
             out: a new or empty folder, or an earlier export, which is replaced.
             me_layer: what ``melens.locate`` returned; None only where the edit names its layers.
             first_token: of prefix and peft, an id or a text of one token; None = what the
             tokenizer puts first, or what the chat template starts with. Or what
             :func:`melens.exporting.choose_prefix` returns, with the edit ``none``: its tokens.
             tokenizer: of a transformers model whose own folder has none.
    Raises:  InterventionError: an edit that this model or format cannot have. ResultError: an
             ``out`` that holds something else, or a ME Layer of other weights. PromptError: no one
             first token. ModelError: no model, or one that cannot be saved.
             OutputError: the disk said no.
    """
    kind = next((name for name in get_args(Format) if name == format), None)
    if kind is None:
        raise InterventionError(
            f"format must be one of {', '.join(get_args(Format))}, got {brief(format, 40)}."
        )
    if kind == "gguf":
        raise InterventionError(
            "a GGUF can hold changes of weights alone; use melens.exporting.bake(..., "
            "format='gguf') (--bake ... --format gguf)."
        )
    if first_token is not None and kind == "hf":
        raise InterventionError("first_token belongs to the formats prefix and peft.")
    if not isinstance(edit, Edit):
        raise InterventionError(
            f"edit must be a melens.results.edit.Edit, got {type(edit).__name__}."
        )
    target = check_out(out)
    found = located_in(me_layer, here=False)
    subject = subject_of(model, found, tokenizer=tokenizer)
    check_edit(subject.runnable, edit, found)
    if kind == "hf":
        hf, tokenizer = plain_to_save(subject)
        record = record_of(subject, edit, found, "hf", baked=baked_in(hf.config))
        return place(target, lambda folder: write_model(hf, tokenizer, folder, record), record)
    prefix, facts = _prefix(subject, edit, found, first_token)
    record = record_of(subject, edit, found, kind, facts)
    return place(target, _writer(subject, prefix, kind), record)


def _prefix(
    subject: Subject,
    edit: Edit,
    found: MELayer | None,
    first_token: str | int | ChosenPrefix | None,
) -> tuple[Prefix, PrefixFacts]:
    """Keys and values of the fixed first token under the edit, or of tokens that were searched."""
    chosen = None
    if isinstance(first_token, ChosenPrefix):
        if edit.name != "none":
            raise InterventionError("a searched prefix holds no edit; give Edit(name='none').")
        chosen = first_token
        require_known([chosen.token_ids], vocabulary_of(subject.hf))
        prefix = token_prefix(subject.runnable, chosen.token_ids)
    else:
        token = fixed_first(subject.tokenizer, first_token)
        require_known([[token]], vocabulary_of(subject.hf))
        prefix = constant_prefix(subject.runnable, edit, found, token)
    off = difference(subject.runnable, edit, found, prefix)
    return prefix, facts_of(subject.hf, prefix, subject.tokenizer, off, chosen)


def _writer(subject: Subject, prefix: Prefix, format: Format) -> Callable[[Path], None]:
    if format == "prefix":
        return lambda folder: write_prefix(prefix, folder)
    check_like_peft(subject.hf, prefix)
    row_of(prefix)
    base, revision = subject.origin.name, subject.origin.revision
    return lambda folder: write_adapter(prefix, folder, base=base, revision=revision)


def write_model(
    hf: TransformersModel, tokenizer: Tokenizer, folder: Path, record: EditFile
) -> None:
    """A model folder, whose config says what its weights hold of the record, and what not."""
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / CONFIG
    config = json.loads(path.read_text("utf-8"))
    for name in (NOT_APPLIED, BAKED):  # of an earlier export
        config.pop(name, None)
    if record.edit.name != "none":
        note = f"{WARNING}; see README.md"
        shown = {"name": record.edit.name, "label": record.edit.label}
        config[NOT_APPLIED] = {**shown, "applied": False, "note": note}
    if record.baked:
        config[BAKED] = [made.model_dump(mode="json") for made in record.baked]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def record_of(
    subject: Subject,
    edit: Edit,
    me_layer: MELayer | None,
    format: Format,
    prefix: PrefixFacts | None = None,
    *,
    baked: tuple[Baked, ...] = (),
) -> EditFile:
    """What melens.json says of an export, its files left out."""
    facts = ModelFacts(
        name=subject.origin.name,
        revision=subject.origin.revision,
        weights=subject.weights,
        dtype=dtype_of(subject.hf),
        device=str(next(subject.hf.parameters()).device),
    )
    run = RunInfo.collect(facts, seed=edit.seed, settings={"format": format})
    return EditFile(
        format=format,
        edit=edit,
        me_layer=me_layer,
        probe=probe_of(subject.hf),
        prefix=prefix,
        baked=baked,
        run=run,
    )


def check_out(out: str | Path) -> Path:
    """Refuse a folder that must not be written, before any work.

    Raises:  ResultError: a file, or a folder of other things. OutputError: it cannot be written.
    """
    target = require_path("out", out).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise ResultError(f"{out} is a file; name a folder to export into.")
    try:
        if other := _not_exported(target):
            raise ResultError(
                f"{out} holds {other}, which no earlier export wrote; name another folder."
            )
    except OSError as error:
        raise OutputError(
            f"cannot write into {target.parent}: {error.strerror}; name another folder."
        ) from None
    if target.is_mount():
        raise OutputError(f"{out} is a mount point, which cannot be replaced; name a folder in it.")
    for folder in (target, target.parent):
        try_writing(folder, "name another folder")
    return target


def _not_exported(folder: Path) -> str | None:
    """The first thing in a folder that replacing an earlier export would lose."""
    here = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    try:
        earlier = read_edit(folder) if here else None
    except ResultError:
        earlier = None
    known = {MELENS_JSON, *earlier.files} if earlier else set()
    return next((name for name in here if name not in known), None)


def place(target: Path, write: Callable[[Path], None], record: EditFile) -> Path:
    """Write beside the target and move into place; what was there stays until then."""
    from safetensors import SafetensorError

    def fill(part: Path) -> None:
        write(part)
        if record.format not in CONSTANT and (text := readme(record)) is not None:
            (part / README).write_text(text, "utf-8")
        files = tuple(sorted(path.name for path in part.iterdir()))
        write_edit(record.model_copy(update={"files": files}), part)

    try:
        return write_folder(target, fill)
    except SafetensorError as error:
        raise OutputError(f"cannot write {target}: {str(error)[:160]}.") from None


__all__ = ["MELENS_JSON", "check_out", "export", "place", "record_of", "write_model"]
