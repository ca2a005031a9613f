"""export and generate: load, find where the edit acts, run or save, show."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melens.cli import options as opt
from melens.cli import output
from melens.cli.groups import without
from melens.cli.job import Job
from melens.cli.render import say, say_json, show_answers_beside
from melens.errors import EditWarning, InterventionError, NoTokenError, PromptError, ResultError
from melens.formatting import brief
from melens.framing import doubled_first
from melens.progress import remark
from melens.protocols import (
    AnyModel,
    HookedModel,
    JsonObject,
    Tokenizer,
    TransformersModel,
)
from melens.store import TEXT, lines_of, read_stdin

if TYPE_CHECKING:
    from melens.batches import Prompts
    from melens.results import MELayer
    from melens.results.baked import WeightEdit
    from melens.results.edit import Edit

ON_PLAIN = ("none", "wemask", "drop-key")
"""Edits that a transformers model can have without a bridge, which decodes slower."""


@dataclass
class EditJob:
    """A command's shared options and the edit they mean."""

    job: Job
    edit: Edit

    @classmethod
    def of(
        cls,
        model: str,
        run: opt.RunOptions,
        edit: opt.EditOptions,
        *,
        texts: opt.TextOptions,
        located: Path | None,
    ) -> EditJob:
        """From a command's options; refuses before torch loads."""
        chosen = opt.edit_of(edit, model)
        return cls(Job.of(model, run, texts=texts, located=located, edits=True), chosen)

    def export(self, format: str, out: Path, first_token: str | None) -> Path:
        """Write the edit into a folder."""
        if first_token is not None and format == "hf":
            raise InterventionError("--first-token belongs to the formats prefix and peft.")
        from melens.exporting.folder import check_out, export
        from melens.exporting.prefix import fixed_first
        from melens.framing import require_known

        check_out(out)
        loaded, texts = self.job.load()
        if format != "hf":
            token = fixed_first(loaded.tokenizer, first_token)
            require_known([[token]], loaded.cfg.d_vocab)
            texts = self._with_bos(texts, loaded.tokenizer, [token])
        found = self.me_layer(loaded, texts)
        return export(
            loaded, self.edit, format=format, out=out, me_layer=found, first_token=first_token
        )

    def answers(
        self, texts: Sequence[str], chat: bool | None, *, max_new_tokens: int, temperature: float
    ) -> list[JsonObject]:
        """Both answers to each prompt, and how many of their tokens are equal before they part."""
        from melens.batches import encode_all
        from melens.chat import in_template
        from melens.evaluating.edits import applied, where_held
        from melens.framing import require_known
        from melens.interventions.massive import with_firsts
        from melens.interventions.wemask import MaskRecord

        loaded, bundled = self.job.load()
        tokenizer = loaded.tokenizer
        chat = in_template(tokenizer, chat)
        bos = None if chat else self.job.texts.bos
        prompts = encode_all(tokenizer, texts, bos=bos, chat=chat)
        require_known(prompts, loaded.cfg.d_vocab)
        _check_starts(texts, prompts, tokenizer, chat=chat)
        _check_room(prompts, loaded.cfg.n_ctx, max_new_tokens)
        if chat:
            bundled = dataclasses.replace(bundled, chat=True)
        else:
            bundled = self._with_bos(bundled, tokenizer, [ids[0] for ids in prompts])
        found = self.me_layer(loaded, bundled)
        if found is not None:
            found = with_firsts(loaded, found, [ids[0] for ids in prompts])
        model = self._plain() if self.edit.name in ON_PLAIN else loaded
        del loaded
        rows = []
        with self.job.bar("prompts") as tick:
            for text, ids in zip(texts, prompts, strict=True):
                draw = {
                    "count": max_new_tokens,
                    "temperature": temperature,
                    "seed": self.job.run.seed,
                }
                without = _continue(model, tokenizer, ids, draw)
                with where_held(applied(model, self.edit, found)) as record:
                    edited = _continue(model, tokenizer, ids, draw)
                count = record.edited if isinstance(record, MaskRecord) else record
                rows.append(_row(text, without, edited, tokenizer))
                rows[-1]["tokens_edited"] = 0 if count is None else count.tokens
                tick(len(rows), len(texts))
        _require_edited(rows, self.edit)
        return rows

    def me_layer(self, loaded: HookedModel, texts: Prompts) -> MELayer | None:
        """The ME Layer: read, of the model's melens.json, or located; None where none is needed."""
        if self.edit.name == "none":
            return None
        from melens.exporting.subject import accept, read_edit
        from melens.interventions.target import require_located_here

        record = read_edit(self.job.model)
        if record is not None and record.format == "hf" and record.me_layer is not None:
            try:
                accept(loaded, record, name=f"the edit in {self.job.model}")
            except ResultError as error:
                output.note(f"{error} The ME Layer is located again.")
            else:
                if self.job.saved is None:
                    return record.me_layer
        found = self.job.locate(loaded, texts)
        require_located_here(loaded, found)
        return found

    def _with_bos(self, texts: Prompts, tokenizer: Tokenizer, firsts: Sequence[int]) -> Prompts:
        """Texts to locate on, with BOS in front where that is what the model is given."""
        if self.job.texts.bos is not None or tokenizer.bos_token_id is None:
            return texts
        starts = all(token == tokenizer.bos_token_id for token in firsts)
        return dataclasses.replace(texts, bos=True) if starts else texts

    def _plain(self) -> TransformersModel:
        from melens.models import load_plain

        return load_plain(self.job.model, **self.job.run.loading())[0]


def _require_edited(rows: Sequence[JsonObject], edit: Edit) -> None:
    """Say which prompts no edit touched.

    Raises:  NoTokenError: it touched none.
    """
    left = [f"{row['prompt']!r:.40}" for row in rows if not row["tokens_edited"]]
    if edit.name == "none" or not left:
        return
    if len(left) == len(rows):
        raise NoTokenError(
            "no prompt held a massive token, so nothing was edited; locate on texts that begin as "
            "the prompts do (--bos, --chat)."
        )
    said = f"no token was edited in {', '.join(left)}: none of theirs is massive."
    warnings.warn(said, EditWarning, stacklevel=3)


def export_searched(job: Job, format: str, out: Path, most: int) -> Path:
    """Write the keys and values of the tokens that a search puts before every text."""
    from melens.exporting.folder import check_out, export
    from melens.exporting.prefix_search import choose_prefix
    from melens.results.edit import Edit

    check_out(out)
    loaded, texts = job.load()
    found = job.locate(loaded, texts)
    chosen = choose_prefix(loaded, texts, me_layer=found, most=most)
    none = Edit(name="none")
    return export(loaded, none, format=format, out=out, me_layer=found, first_token=chosen)


def export_baked(
    model: str, run: opt.RunOptions, edits: Sequence[WeightEdit], out: Path, format: str
) -> Path:
    """Write a model whose weights hold the edits."""
    from melens.exporting.bake import bake
    from melens.exporting.folder import check_out

    check_out(out)
    return bake(
        model,
        edits,
        out=out,
        format=format,
        revision=run.revision,
        trust_remote_code=run.trust_remote_code,
    )


def _refuse_beside(
    option: str, way_out: str, edit: opt.EditOptions, others: Mapping[str, object]
) -> None:
    """Refuse an edit, or another option, beside one that is an export of its own.

    Raises:  InterventionError: naming it.
    """
    given = {f.name: getattr(edit, f.name) for f in dataclasses.fields(edit)}
    given |= others
    if named := [name for name, value in given.items() if value is not None]:
        raise InterventionError(
            f"{option} takes no other edit; drop --{named[0].replace('_', '-')}, or {way_out}."
        )


def prompts_of(given: Sequence[str] | None) -> list[str]:
    """The prompts as typed; ``-`` stands for the lines of stdin.

    Raises:  PromptError: none, or an empty one.
    """
    if not given:
        raise PromptError("give at least one --prompt TEXT, or --prompt - to read stdin.")
    found: list[str] = []
    for text in given:
        if text != "-":
            found.append(text)
            continue
        lines = lines_of(read_stdin(TEXT, error=PromptError))
        found += [line for line in lines if line.strip()]
    if not found or not all(text.strip() for text in found):
        raise PromptError("a prompt is empty; give at least one character.")
    return found


def _check_starts(
    texts: Sequence[str], prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, *, chat: bool
) -> None:
    """Refuse a prompt that begins with BOS twice: the second would be an ordinary token or a second
    massive one, and the answer that of another text.

    Raises:  PromptError: naming it.
    """  # noqa: D205
    row = doubled_first(prompts)
    if row is None or prompts[row][0] != tokenizer.bos_token_id:
        return
    why = (
        "the chat template writes it, and the tokenizer puts it again; mend one of them"
        if chat
        else "it is written in the prompt, and the tokenizer puts it again; leave it out of the "
        "prompt"
    )
    raise PromptError(f"the prompt {brief(texts[row], 40)} begins with BOS twice: {why}.")


def _check_room(prompts: Sequence[Sequence[int]], limit: int | None, count: int) -> None:
    longest = max(map(len, prompts))
    if limit and longest + count > limit:
        raise PromptError(
            f"a prompt of {longest} tokens and {count} new ones are over the model's context of "
            f"{limit}; lower --max-new-tokens or shorten the prompt."
        )


def _continue(
    model: AnyModel, tokenizer: Tokenizer, ids: Sequence[int], draw: JsonObject
) -> list[int]:
    """New token ids; the model's own end tokens, but none of its other generation settings."""
    import torch
    from transformers import GenerationConfig

    from melens.exporting.subject import transformers_of
    from melens.placement import input_device

    hf = transformers_of(model)
    own = getattr(hf, "generation_config", None)
    end = getattr(own, "eos_token_id", None) or tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    pad = (end[0] if isinstance(end, list) else end) if pad is None else pad
    settings: JsonObject = {"max_new_tokens": draw["count"], "do_sample": False}
    if draw["temperature"] > 0:
        settings |= {"do_sample": True, "temperature": draw["temperature"], "top_k": 0}
    config = GenerationConfig(**settings, eos_token_id=end, pad_token_id=pad)
    row = torch.tensor([list(ids)], device=input_device(hf))
    from melens.models.contract import failing

    with torch.random.fork_rng(), failing(f"{type(hf).__name__} cannot generate"):
        torch.manual_seed(draw["seed"])
        made = hf.generate(row, attention_mask=torch.ones_like(row), generation_config=config)
    return made[0, len(ids) :].tolist()


def _row(text: str, without: list[int], edited: list[int], tokenizer: Tokenizer) -> JsonObject:
    same = next(
        (i for i, (a, b) in enumerate(zip(without, edited, strict=False)) if a != b),
        min(len(without), len(edited)),
    )
    return {
        "prompt": text,
        "without": tokenizer.decode(without, skip_special_tokens=True),
        "with": tokenizer.decode(edited, skip_special_tokens=True),
        "first_difference": None if without == edited else same,
    }


def show_answers(rows: Sequence[JsonObject], *, label: str, as_json: bool) -> None:
    """Answers side by side; ``first_difference`` counts new tokens from 0."""
    if as_json:
        say_json({"edit": label, "rows": list(rows)})
        return
    for row in rows:
        say(f"> {row['prompt']}\n")
        show_answers_beside(
            ("without", f"with {label}"), [row[name].strip() for name in ("without", "with")]
        )
        at = row["first_difference"]
        say("\nthe same answer\n" if at is None else f"\ndiffer from new token {at} on\n")


def show_export(folder: Path, *, as_json: bool) -> None:
    """What was written."""
    from melens.exporting.folder import README, WARNING
    from melens.exporting.subject import read_edit

    record = read_edit(folder)
    assert record is not None
    if record.format == "hf" and record.edit.name != "none":
        output.note(f"{WARNING}; {folder / README} has the lines that load it right.")
    if as_json:
        say_json({"path": str(folder), **record.to_dict()})
        return
    say(record.summary())
    remark(f"wrote {folder}")


class ExportFormat(StrEnum):
    """What is written, as in ``melens.results.edit.Format``."""

    hf = "hf"
    prefix = "prefix"
    peft = "peft"
    gguf = "gguf"


def export(
    model: opt.Model,
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="A new or empty folder, or an earlier export to replace."),
    ],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="hf: a model folder with melens.json; prefix: keys and values of the fixed first "
            "token; peft: the same as a prefix-tuning adapter; gguf: with --bake, of a GGUF."
        ),
    ] = ExportFormat.hf,
    edit: opt.EditOptions,
    located: opt.Located = None,
    bake: Annotated[
        list[str] | None,
        typer.Option(
            "--bake",
            help="A change of the weights, for all tokens and any engine; several times. "
            "weight:LAYER,DIM,NEURON[,FACTOR] (down projection), neuron:LAYER,NEURON[,FACTOR], "
            "gain:LAYER,NORM,DIM[,FACTOR], expert:LAYER,EXPERT, transplant:LAYER,DONOR-LAYER; or a "
            "JSON file with a list of them. FACTOR 0 unless given.",
        ),
    ] = None,
    first_token: Annotated[
        str | None,
        typer.Option(
            help="For prefix and peft, a text of one token (default: BOS where the tokenizer puts "
            "it first, or what the chat template starts with)."
        ),
    ] = None,
    search_prefix: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4,
            help="For prefix and peft: no edit, but the fewest tokens, up to this many, after "
            "which no token of the texts is massive. They are put before every text.",
        ),
    ] = None,
    texts: Annotated[opt.TextOptions, without("text", "lines", "prompt", "chat")],
    as_json: opt.Json = False,
    run: opt.SeededRun,
) -> None:
    """Save MODEL's edit to be used elsewhere: as a model folder, a prefix, or a PEFT adapter.

    With a fixed first token the mask is a constant edit of that token's keys and values: prefix
    and peft hold them, need no melens, and cost nothing while decoding. Leave the first token out
    of a peft adapter's input. The ME Layer is located first, unless --located has it; for prefix
    and peft on texts that start with the first token, where that is BOS.

    A folder of --format hf has its edit in melens.json: only melens applies it. Loaded by
    transformers or anything else it is the model without the edit; README.md and melens_edit in
    config.json say so. A change by --bake is in the weights: every engine that loads it has it.

    Examples:
      melens export smollm2-135m --format hf -o runs/masked

      melens export smollm2-135m --bake weight:0,2,3 --bake gain:1,ln2,7,0.5 -o runs/baked

      melens export smollm2-135m --bake weight:0,2,3 --format gguf -o runs/gguf

      melens export smollm2-135m --format peft --mask-rate 0.5 -o runs/adapter

      melens export smollm2-135m --format prefix --located runs/demo/locate.json -o runs/prefix
    """
    beside: dict[str, object] = {"first_token": first_token, "bake": bake}
    if search_prefix is not None:
        fits = format in (ExportFormat.prefix, ExportFormat.peft)
        beside["format"] = None if fits else format
        _refuse_beside("--search-prefix", "use --format prefix or peft", edit, beside)
        searched = Job.of(model, run, edits=True, texts=texts, located=located)
        made = export_searched(searched, format.value, out, search_prefix)
        show_export(made, as_json=as_json)
        return
    if bake is not None:
        from melens.results.baked import weight_edits

        edits = weight_edits(bake)
        beside |= {"located": located, "bake": None}
        fits = format in (ExportFormat.hf, ExportFormat.gguf)
        beside["format"] = None if fits else format
        _refuse_beside("--bake", "export that edit of the baked folder", edit, beside)
        show_export(export_baked(model, run, edits, out, format.value), as_json=as_json)
        return
    if format is ExportFormat.gguf:
        raise InterventionError("--format gguf holds changes of weights alone; give --bake.")
    job = EditJob.of(model, run, edit, texts=texts, located=located)
    made = job.export(format.value, out, first_token)
    show_export(made, as_json=as_json)


def generate(
    model: opt.Model,
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="A prompt; may be given several times; - reads stdin, one a line.",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts through the chat template (default: where the tokenizer has one).",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 = greedy; above, both answers are drawn by --seed.")
    ] = 0.0,
    edit: opt.EditOptions,
    located: opt.Located = None,
    bos: opt.Bos = None,
    as_json: opt.Json = False,
    run: opt.SeededRun,
) -> None:
    """Show MODEL's answers with and without an edit, side by side.

    The ME Layer is located first, unless --located has it, on the bundled texts, with BOS in
    front where the prompts start with it.

    Examples:
      melens generate smollm2-135m --prompt "Name three rivers."

      melens generate smollm2-135m -p "2 + 2 =" --no-chat --mask-select activation --mask-rate 0.1

      echo "Name three rivers." | melens generate smollm2-135m --prompt - --json
    """
    given = prompts_of(prompt)
    job = EditJob.of(model, run, edit, texts=opt.TextOptions(bos=bos), located=located)
    rows = job.answers(given, chat, max_new_tokens=max_new_tokens, temperature=temperature)
    show_answers(rows, label=job.edit.label, as_json=as_json)
