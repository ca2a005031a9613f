"""Processes of their own, without the seconds in which torch and transformers are imported."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

LIBRARIES = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "transformer_lens.model_bridge",
]


class Done(NamedTuple):
    """How a process ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str


def forked(call, *args):
    """A running fork of this process, which has everything that is imported here."""
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(call, args))
    process.start()
    return process


def _alone(call, args):
    import torch

    torch.set_num_threads(1)  # the parent's threads are not in a fork
    call(*args)


def fresh(code, *args):
    """Run code as ``python -c`` does; the libraries are imported already, melens is not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_run, args=(code, list(map(str, args)), folder))
        process.start()
        process.join()
        written = [(Path(folder) / name).read_text("utf-8") for name in ("1", "2")]
    return Done(process.exitcode, *written)


def _run(code, args, folder):
    assert "melens" not in sys.modules
    for number in (1, 2):
        os.dup2(os.open(Path(folder) / str(number), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["-c", *args]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
