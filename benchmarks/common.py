"""What the benchmarks share: seconds of a task, and the memory it adds to a fresh process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def seconds(task: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def status_megabytes(field: str) -> float:
    """A line of /proc/self/status in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def print_added_megabytes(task: Callable[[], object]) -> None:
    """What ``task`` adds to this process at its peak, as JSON; the high-water mark is reset."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status_megabytes("VmRSS")
    task()
    print(json.dumps(status_megabytes("VmHWM") - before))


def peak_megabytes(script: str, task: str, arguments: argparse.Namespace, n: int) -> float:
    """The same, in a fresh process that runs ``script --alone task``."""
    done = subprocess.run(
        [
            sys.executable,
            script,
            "--alone",
            task,
            "--model",
            arguments.model,
            "--n",
            str(n),
            "--length",
            str(arguments.length),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
