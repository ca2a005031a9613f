"""Write docs/architectures.md: every causal family of transformers, and what melens can do with it.

    python experiments/make_architectures.py                 # all of them, about half an hour
    python experiments/make_architectures.py GptOssForCausalLM Gemma4ForCausalLM   # these again

Each family is a tiny random model with one massive token planted in one neuron of one FFN (of one
expert where there are experts), at block 1. A measure works if it gives what was planted; what it
says otherwise is its own refusal. Also writes melens/data/architectures.json, which
`melens models families` prints and a test holds against what it measures itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

import families  # noqa: E402
from family_measures import MEASURES, Family  # noqa: E402

from melens.provenance import versions  # noqa: E402
from melens.store import write_atomically  # noqa: E402

DATA = ROOT / "melens" / "data" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"


def main(names: list[str]) -> None:
    """Measure these families (all of them without a name), and write both files."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    known = json.loads(DATA.read_text("utf-8"))["families"] if DATA.exists() else {}
    for name in names or families.TINY:
        with tempfile.TemporaryDirectory() as folder:
            known[name] = measured(name, Path(folder))
        sys.stderr.write(f"{name} {known[name]}\n")
        known = {name: known[name] for name in sorted(known) if name in families.TINY}
        data = {"versions": versions(), "families": known, "left_out": families.LEFT_OUT}
        write_atomically(DATA, json.dumps(data, indent=1) + "\n")
    write_atomically(PAGE, page(json.loads(DATA.read_text("utf-8"))))


def measured(name: str, folder: Path) -> dict[str, str]:
    """Measure -> "" where it works, else the reason that it gives."""
    family = Family(name, folder)
    found: dict[str, str] = {}
    for measure, run in MEASURES.items():
        text = "" if measure != "load" and found.get("load") else said(run, family)
        found[measure] = text.replace(str(folder), "FOLDER").replace(folder.name, "FOLDER")
    return {"way": family.way, **found}


def said(run: Callable[[Family], str], family: Family) -> str:
    """What a measure says: nothing, a refusal, or FAULT and an exception that is no refusal."""
    from melens.errors import MelensError

    try:
        return run(family)
    except MelensError as error:
        return str(error)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"FAULT: {type(error).__name__}: {first}"


def page(data: dict[str, Any]) -> str:
    """The docs page."""
    rows = data["families"]
    opened = [row for row in rows.values() if not row["load"]]
    lines = [
        "# Architectures",
        "",
        "<!-- Written by experiments/make_architectures.py: change that, not this. -->",
        "",
        f"Every causal decoder of transformers {data['versions']['transformers']}, as a tiny",
        "random model with one massive token planted in one FFN neuron of block 1 (of one",
        "expert where there are experts). A cell is `yes` where the measure found what was",
        "planted (or, for masks and patching, equals a plain run), `-` where the model has",
        "nothing to measure, and a number where it refuses: the reasons are below. `lens`:",
        "TransformerLens' own adapter holds the contract; `measured`: the bridge is made from",
        "what was measured; `unread`: so it is, and attention keeps to itself. Layers count",
        "from 0 at the block output.",
        "",
        f"{len(opened)} of {len(rows)} load and are exact.",
        "",
        "| architecture | bridge | " + " | ".join(MEASURES) + " |",
        "|---|---|" + "---|" * len(MEASURES),
    ]
    reasons: dict[str, int] = {}
    for name, row in rows.items():
        cells = [cell(row[measure], row["load"], reasons) for measure in MEASURES]
        lines.append(f"| {name} | {row['way'] or '-'} | " + " | ".join(cells) + " |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += ["", "## Left out", ""]
    lines += [f"- {name}: {why}" for name, why in sorted(data["left_out"].items())]
    return "\n".join(lines) + "\n"


def cell(said: str, refused: str, reasons: dict[str, int]) -> str:
    """One cell; a reason is numbered when it is met first."""
    if said == "none":
        return "-"
    if not said:
        return "" if refused else "yes"
    return str(reasons.setdefault(said, len(reasons) + 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    main(parser.parse_args().names)
