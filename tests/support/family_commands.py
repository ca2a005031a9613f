"""Every command on one family's folder, as a user types it: a result, or one line that says why."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from melens.cli.app import _run

TEXT = "the cat sat on a mat 7"
FEW = ["--n-seq", "2", "--length", "12", "--bos"]
MASK = ["--mask-select", "activation", "--mask-rate", "0.25"]
UNEXPECTED = "could not run ("
"""How the last resort begins: an exception that nobody foresaw."""


def lines(model: Path, out: Path) -> Iterator[list[str]]:
    """The command lines; ``out`` is where results go."""
    text = ["--text", str(out / "text.txt"), *FEW]
    name, first = str(model), ["--first-token", "<s>"]
    located = ["--located", str(out / "locate" / "locate.json")]
    yield ["locate", name, *text, "--out", str(out / "locate")]
    yield ["locate", name, *text, "--stream"]
    yield ["scan", name, "--out", str(out / "scan")]
    yield ["reach", name, "--sample", "2"]
    yield ["describe", name, *text, *located, "--first-tokens", "2"]
    for command in ("collapse", "sinks", "mixers", "super-weights", "isolate"):
        yield [command, name, *text, *located]
    yield ["metric", name, "effective_rank", *text]
    yield ["attention", name, "--prompt", TEXT, "--out", str(out / "attention")]
    pair = ["--clean", TEXT, "--corrupted", TEXT.replace("cat", "dog")]
    yield ["patch", name, *pair, "--metric", "loss"]
    data = ["--data", str(out / "text.txt"), "--length", "12", "--bos"]
    yield ["eval", name, *data, "-n", "2", *MASK, *located]
    yield ["tune", name, *data, "-n", "60", "--budget", "240", *located]
    yield ["long-context", name, "--lengths", "60", "--depths", "0.5", "--seeds", "1", *located]
    yield ["generate", name, "--prompt", f"<s>{TEXT}", *MASK, *located, "--max-new-tokens", "3"]
    mask = ["--mask-rate", "0.25", *located]
    yield ["export", name, "--format", "hf", *mask, "-o", str(out / "hf")]
    for form in ("prefix", "peft"):
        yield ["export", name, "--format", form, *mask, *first, "-o", str(out / form)]
    yield ["generate", str(out / "hf"), "--prompt", f"<s>{TEXT}", "--max-new-tokens", "3"]
    yield ["check", name, *text, "--budget", "quick"]
    yield ["diff", name, name, *text]
    rows = ["--data", str(out / "rows.jsonl"), "--steps", "1", "--dry-run"]
    yield ["finetune", name, *rows, "-o", str(out / "tuned")]


def run_all(model: Path, out: Path) -> dict[str, str]:
    """What goes wrong in a way that a user should never see, by command line."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "text.txt").write_text("\n\n".join(f"{TEXT}{i} and so on" for i in range(60)), "utf-8")
    (out / "rows.jsonl").write_text('{"question": "2 and 2", "answer": "4"}\n' * 4, "utf-8")
    return {" ".join(line): said for line in lines(model, out) if (said := fault(line))}


def fault(line: list[str]) -> str:
    """Nothing, or how one command ended as none may."""
    shown, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(told):
        code = _run(line, debug=False)
    said = told.getvalue()
    refusal = said.strip().splitlines()[-1:] or [""]
    if code not in (0, 1, 2, 3):
        return f"exit code {code}: {said[-300:]}"
    if UNEXPECTED in said or "Traceback" in said:
        return f"exit code {code}: {said[-400:]}"
    return "" if code < 2 or refusal[0] else f"exit code {code} without a word"
