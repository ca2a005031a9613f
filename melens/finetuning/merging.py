"""A finished training as one model, its mask with it, or the learned sink as a prefix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from melens.errors import ResultError
from melens.exporting.folder import README, check_out, export
from melens.exporting.prefix import PREFIX_FILE, Prefix, change, facts_of, write_prefix
from melens.exporting.subject import MELENS_JSON, probe_of, write_edit
from melens.finetuning.adapters import EMBEDDING
from melens.finetuning.keeping import (
    BEST,
    LAST,
    LOCATED_ON,
    RESULT_FILE,
    SETTINGS,
    SOURCE,
    read_settings,
)
from melens.locating import locate
from melens.models.loading import adopt, load_plain
from melens.models.named import NAMED
from melens.models.origin import Origin, fingerprint
from melens.models.view import view_of
from melens.protocols import Tokenizer, TransformersModel
from melens.results import load_result
from melens.results.edit import Edit, EditFile
from melens.results.finetune import FineTuning
from melens.settings import require_path
from melens.store import write_atomically, write_folder

if TYPE_CHECKING:
    from peft import PeftModel

_MERGED = """# A fine-tuned model, with its mask kept beside it

{summary}

**The mask is in melens.json, not in the weights**: `melens.load(".")` applies it, and so does
`melens generate`. Loaded by transformers, vLLM or anything but melens, this folder is the trained
model without it.
"""


def read_run(folder: str | Path) -> FineTuning:
    """The result of a finished training.

    Raises:  ResultError: no such folder, or a training that has not ended.
    """
    folder = Path(folder)
    if (folder / SETTINGS).is_file() and not (folder / RESULT_FILE).exists():
        raise ResultError(f"the training in {folder} has not ended; run the same command again.")
    found = load_result(folder / RESULT_FILE)
    if not isinstance(found, FineTuning):
        raise ResultError(f"{folder / RESULT_FILE} holds no training.")
    return found


def trained_model(
    folder: str | Path, *, which: str = LAST, device: str | None = None
) -> tuple[TransformersModel, Tokenizer, Origin]:
    """The trained model as plain transformers, adapters merged into its weights.

    Args:    folder: what ``melens.finetune`` wrote. which: ``last`` or ``best``.
    Raises:  ResultError: no finished training, or a learned sink, which is in no weight.
             ModelError, WeightsError: the base model cannot be had.
    """
    result, weights = read_run(folder), Path(folder) / which
    if which not in (LAST, BEST) or not weights.is_dir():
        raise ResultError(f"{folder} has no weights called {which!r}; {LAST} or {BEST}.")
    if result.method == "sink":
        raise ResultError(
            f"{folder} holds a learned sink, a key and value in place of a token, which no weight "
            "can hold; load it with PEFT, or as a prefix with melens.exporting.load_prefix."
        )
    if result.method == "full":
        return load_plain(weights, device=device)
    from peft import PeftModel

    source, revision = read_settings(Path(folder))[SOURCE], result.run.model_revision
    local = Path(source).exists() or source in NAMED
    hf, tokenizer, origin = load_plain(source, device=device, revision=None if local else revision)
    found = fingerprint(adopt(view_of(hf), tokenizer=tokenizer))
    if found != result.run.weights:
        raise ResultError(
            f"{source} has other weights now ({found}) than those that were trained "
            f"({result.run.weights}), and the adapter fits those alone."
        )
    merged = PeftModel.from_pretrained(hf, str(weights)).merge_and_unload()
    return merged, tokenizer, origin


def merge(folder: str | Path, out: str | Path, *, which: str = LAST) -> Path:
    """Write the trained model as one folder; ``melens.load`` applies the mask that belongs to it.

    Trained with ``masked_in`` "inference" or "both", the mask is written into melens.json; the ME
    Layer is located on the trained weights, for it may have moved. Where norms were trained too, a
    mask by their gains takes the dimensions of the trained ones.

    Raises:  as :func:`trained_model`, and as :func:`melens.export` for ``out``.
    """
    if require_path("out", out).resolve() == Path(folder).resolve():
        raise ResultError(f"{out} holds the training itself; name another folder.")
    check_out(out)
    result = read_run(folder)
    hf, tokenizer, _ = trained_model(folder, which=which)
    hf.config._name_or_path = f"{result.run.model}-finetuned"  # not the name of the base any more
    if result.mask.name == "none" or result.masked_in not in ("inference", "both"):
        return export(hf, Edit(name="none"), out=out, tokenizer=tokenizer)
    texts = read_settings(Path(folder))[LOCATED_ON]
    me_layer = locate(adopt(view_of(hf), tokenizer=tokenizer), texts)
    made = export(hf, result.mask, out=out, me_layer=me_layer, tokenizer=tokenizer)
    write_atomically(made / README, _MERGED.format(summary=result.summary()))
    return made


def prefix_of(model: PeftModel, token_id: int) -> Prefix:
    """The column that was trained, as keys and values, of a PEFT model of one virtual token."""
    config: Any = model.active_peft_config
    table = model.get_parameter(f"prompt_encoder.{model.active_adapter}.{EMBEDDING}")
    row = table.detach()[0].cpu()
    heads = config.num_attention_heads
    parts = row.reshape(config.num_layers, 2, heads, 1, config.token_dim // heads)
    return Prefix(token_id, list(parts[:, 0]), list(parts[:, 1]))


def write_sink(
    model: Any, result: FineTuning, token_id: int, tokenizer: Tokenizer, out: Path
) -> Path:
    """The learned sink as melens' own prefix, for :func:`melens.exporting.load_prefix`."""
    hf = model.get_base_model()
    prefix = prefix_of(model, token_id)
    facts = facts_of(hf, prefix, tokenizer, change(hf, prefix)).model_copy(update={"learned": True})
    record = EditFile(
        format="prefix",
        edit=Edit(name="none"),
        me_layer=None,
        probe=probe_of(hf),
        prefix=facts,
        files=(MELENS_JSON, PREFIX_FILE),
        run=result.run,
    )

    def fill(part: Path) -> None:
        write_prefix(prefix, part)
        write_edit(record, part)

    return write_folder(out, fill)
