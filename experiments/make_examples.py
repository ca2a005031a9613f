"""Run the examples of docs/examples.md and write below each what it prints.

    python experiments/make_examples.py           # write what is out of date
    python experiments/make_examples.py --check   # write nothing, exit 1 where it prints otherwise

All run from top to bottom in one process and in an empty folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from melens.progress import tell
from melens.store import write_atomically

PAGE = Path(__file__).resolve().parent.parent / "docs" / "examples.md"
EXAMPLE = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)
WIDTH = 110


def main() -> int:
    """Returns 1 where ``--check`` finds other output, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    options = parser.parse_args()
    before = PAGE.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        after = shown(before)
    if after == before:
        return 0
    if options.check:
        sys.stdout.writelines(differences(before, after))
        return 1
    write_atomically(PAGE, after)
    return 0


def shown(page: str) -> str:
    """The page with what each example prints."""
    names: dict[str, object] = {"__name__": "__main__"}

    def run(example: re.Match[str]) -> str:
        start = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(example["code"], "docs/examples.md", "exec"), names)
        tell(f"{time.monotonic() - start:.0f} s: {example['code'].splitlines()[-1][:80]}")
        lines = printed.getvalue().splitlines()
        folded = "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)
        return f"```python\n{example['code']}```\n\n```text\n{folded}\n```\n"

    return EXAMPLE.sub(run, page)


def differences(before: str, after: str) -> list[str]:
    """What is printed now, line by line against the page."""
    import difflib

    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), "page", "now")
    return list(lines)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
