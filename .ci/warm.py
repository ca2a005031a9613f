"""Run a script of commands; every plain ``melens`` line in a fork of one warm process.

    python .ci/warm.py runs/readme.4.sh

Starting melens takes seconds: torch, transformers and TransformerLens are imported. Here they are
imported once. A line with anything of the shell in it (a pipe, a redirection) runs in bash as it
is, with processes of its own. The first line that fails ends the script with its exit code.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import NoReturn

HEAVY = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformer_lens.model_bridge",
    "melens.cli.app",
    "melens.models.loading",
    "melens.figures",
    "melens.isolating",
    "melens.evaluating",
    "melens.tuning",
    "melens.exporting",
)
OF_THE_SHELL = re.compile(r"[|<>&;$`*?\\]")


def main(script: str) -> int:
    """The exit code of the first line that failed, or 0."""
    for name in HEAVY:
        import_module(name)
    gc.freeze()  # forks share what was imported
    for line in Path(script).read_text("utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        start = monotonic()
        sys.stderr.write(f"+ {line}\n")
        sys.stderr.flush()
        code = forked(line) if is_plain(line) else in_bash(line)
        sys.stderr.write(f"  {monotonic() - start:.1f} s, exit code {code}\n")
        if code:
            return code
    return 0


def is_plain(line: str) -> bool:
    """Whether the line is a call of melens and nothing else, quoted arguments aside."""
    unquoted = re.sub(r"\"[^\"$`\\]*\"|'[^']*'", "", line)
    return line.startswith("melens ") and not OF_THE_SHELL.search(unquoted)


def in_bash(line: str) -> int:
    """The line's exit code in a bash of its own."""
    return subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=False).returncode


def forked(line: str) -> int:
    """The exit code of melens with the line's arguments; it sees them as in a new process."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        program = Path(sys.executable).with_name("melens")
        sys.argv = [str(program), *shlex.split(line)[1:]]
        _end(import_module("melens.cli.app").main)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _end(call: Callable[[], None]) -> NoReturn:
    """End the fork with the code of a call, without taking all that was imported down with it."""
    code: object = 1
    try:
        call()
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
