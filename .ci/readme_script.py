"""Turn a Markdown file's bash blocks into scripts and its python blocks into one."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main(source: str, target: str) -> None:
    """Write TARGET.1.sh, TARGET.2.sh, ... (a bash block each) and TARGET.py, in order.

    What the page says that its python prints ("It prints", and a text block) is TARGET.expected.
    """
    text = Path(source).read_text("utf-8")
    shell, python = (
        re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        for language in ("bash", "python")
    )
    if not shell or not python:
        sys.exit(f"{source} shows no bash block or no python block")
    for number, block in enumerate(shell, 1):
        Path(f"{target}.{number}.sh").write_text(block, "utf-8")
    Path(f"{target}.py").write_text("\n".join(python), "utf-8")
    for printed in re.findall(r"^It prints\n\n```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        Path(f"{target}.expected").write_text(printed, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
