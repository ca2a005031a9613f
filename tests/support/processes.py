"""Processes of their own, without the seconds in which torch and transformers are imported."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

LIBRARIES = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "transformer_lens.model_bridge",
]
LIMIT = 120.0


class Done(NamedTuple):
    """How a process ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str


def forked(call, *args):
    """A running fork of this process, which has everything that is imported here."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_alone, args=(call, args), daemon=True)
    process.start()
    return process


def ended(*processes):
    """Exit codes; those that have not ended in two minutes are killed."""
    until = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _alone(call, args):
    import torch

    torch.set_num_threads(1)  # the parent's threads are not in a fork
    call(*args)


def fresh(code, *args):
    """Run code as ``python -c`` does; the libraries are imported already, melens is not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        given = code, list(map(str, args)), dict(os.environ), folder
        process = context.Process(target=_run, args=given, daemon=True)
        process.start()
        (exit_code,) = ended(process)
        written = [(Path(folder) / name).read_text("utf-8") for name in ("1", "2")]
    return Done(exit_code, *written)


def _run(code, args, environment, folder):
    for number in (1, 2):  # first, so that whatever fails below is read by the caller
        os.dup2(os.open(Path(folder) / str(number), os.O_WRONLY | os.O_CREAT), number)
    assert "melens" not in sys.modules
    os.environ.clear()  # it is the one of the first call
    os.environ.update(environment)
    sys.argv = ["-c", *args]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
