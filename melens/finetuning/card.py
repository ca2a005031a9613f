"""README.md of a run: what was trained how, the ME Layer before and after, how to load it."""

from __future__ import annotations

from pathlib import Path

from melens.finetuning.keeping import BEST, LAST
from melens.formatting import clipped
from melens.results.finetune import WHERE, EmergenceRow, FineTuning
from melens.store import write_atomically

CARD = "README.md"
_HEAD = """---
base_model: {model}
library_name: {library}
tags:
- melens
---

# {model}, fine-tuned

{summary}

| | |
| --- | --- |
{facts}

## The ME Layer before and after

Layers count from 0, at the block output.

{looks}

## How to load it

{load}

`melens finetune` wrote this page; every number is in `finetune.json`, each step's in
`losses.jsonl` and `emergence.jsonl`.
"""
_ADAPTER = """```python
from melens.finetuning import trained_model

model, tokenizer, _ = trained_model(".")  # this folder; the adapter merged into its base
```

`last` is a PEFT adapter of `{model}`: `PeftModel.from_pretrained(base, "last")` opens it."""
_PREFIX = """`last` is a PEFT prefix adapter of `{model}`, which `PeftModel.from_pretrained` opens.
`prefix` holds the same for `melens.exporting.load_prefix`."""
_MODEL = """```python
import melens

model = melens.load("last")  # a folder beside this page; transformers reads it too
```"""
_SINK = "\n\nThe adapter stands for the first token `{token}`: leave that token out of the input."
_MASKED = """

It was trained to be used with the mask, which is in no weight. `melens finetune ... --merge` (in
Python `melens.finetuning.merge`) writes a model folder whose mask `melens.load` applies."""


def write_card(result: FineTuning, folder: Path, *, first_token: str | None = None) -> None:
    """The page, beside the result.

    Args:    first_token: of method sink, the token that the adapter stands for.
    """
    model = clipped(result.run.model).replace("`", "'")
    adapter = result.method != "full"
    form = {"lora": _ADAPTER, "sink": _PREFIX, "full": _MODEL}[result.method]
    load = form.format(model=model)
    if result.method == "sink":
        load += _SINK.format(token=clipped(first_token or "").replace("`", "'"))
    elif result.mask.name != "none" and result.masked_in in ("inference", "both"):
        load += _MASKED
    text = _HEAD.format(
        model=model,
        library="peft" if adapter else "transformers",
        summary=clipped(result.summary(), 600),
        facts=_facts(result),
        looks=_looks(result),
        load=load,
    )
    write_atomically(folder / CARD, text)


def _facts(result: FineTuning) -> str:
    mask = "none" if result.mask.name == "none" else result.mask.label
    rows = {
        "objective, method": f"{result.objective}, {result.method}",
        "trained": f"{result.trained:,} of {result.of:,} numbers",
        "tokens edited": f"{result.edited_tokens:,} in all passes",
        "mask": mask if mask == "none" else f"{mask}, {WHERE[result.masked_in]}",
        "data": f"{result.texts:,} rows, {result.tokens:,} tokens (SHA-256 {result.data[:12]}); "
        f"{result.too_long:,} too long and left out",
        "steps": f"{result.steps}, seed {result.run.seed}",
        "weights": f"`{LAST}`" + f", `{BEST}` (step {result.best_step})" * bool(result.best_step),
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _looks(result: FineTuning) -> str:
    if not result.looks:
        return "Not looked at: the residual stream of the base model is not trained here."
    head = "| step | verdict | ME Layer | coordinate | dimensions | sink rate | key rank |"
    rows = [head, "| --- " * 7 + "|"]
    rows += [_look(row) for row in dict.fromkeys((result.looks[0], result.looks[-1]))]
    return "\n".join(rows)


def _look(row: EmergenceRow) -> str:
    cells = (
        f"{row.step}",
        row.verdict,
        "none" if row.me_layer is None else f"{row.me_layer}",
        "" if row.coordinate is None else f"{row.coordinate:,.0f}",
        ", ".join(map(str, row.dims[:4])),
        "" if row.sink_rate is None else f"{row.sink_rate:.3f}",
        "" if row.key_rank is None else f"{row.key_rank:.1f}",
    )
    return f"| {' | '.join(cells)} |"
