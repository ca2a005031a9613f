"""Turn a Markdown file's bash blocks into one script and its python blocks into another."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main(source: str, target: str) -> None:
    """Write TARGET.sh and TARGET.py with the fenced blocks of SOURCE, in order."""
    text = Path(source).read_text("utf-8")
    for language, ending in (("bash", "sh"), ("python", "py")):
        blocks = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        if not blocks:
            sys.exit(f"{source} shows no {language} block")
        Path(f"{target}.{ending}").write_text("\n".join(blocks), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
