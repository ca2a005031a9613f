"""What commands share that read a model's blocks from disk while they run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from melens.cli import output
from melens.cli.job import Job
from melens.cli.options import Dtype
from melens.errors import ResultError
from melens.network import go_offline
from melens.progress import progress_on

KEPT = ".stream"
"""Folder in --out for finished blocks; removed at the end."""
SEQUENCES, LENGTH = 2, 64
"""Reference texts of `locate --stream`: the medians need few, and every token is paid for."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is streamed, and how: options as typed."""

    model: str
    folder: Path | None
    device: str
    dtype: Dtype | None
    revision: str | None
    offline: bool = False
    need_tokenizer: bool = True


@contextmanager
def streamed(wanted: Wanted) -> Iterator[Any]:
    """A streamed bridge with its progress bar; at the end says what was read, and tidies up."""
    if wanted.offline:
        go_offline()
    from melens.models.streamed import load_streamed, stream_of

    keep = None if wanted.folder is None else wanted.folder / KEPT
    bridge = load_streamed(
        wanted.model, device=None if wanted.device == "auto" else wanted.device,
        dtype=wanted.dtype.value if wanted.dtype else None, revision=wanted.revision,
        need_tokenizer=wanted.need_tokenizer, keep=keep,
    )  # fmt: skip
    reading: Any = stream_of(bridge)
    with progress_on("blocks") as tick:
        reading.progress = tick
        yield bridge
        reading.progress = None
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
    output.note(
        f"streamed: {reading.blocks_read} blocks read of {reading.n_layers} in the model "
        f"({reading.passes:.1f} times all), {reading.checkpoint.bytes_read / 1e9:.2f} GB."
    )


def locate_streamed(job: Job) -> Any:
    """`melens locate --stream`: few texts, one batch, one block in memory at a time."""
    from melens.batches import prompts
    from melens.locating import locate

    if job.trust_remote_code:
        raise typer.BadParameter("--stream runs no code of the model's own")
    n = job.n_seq or (None if job.prompt else SEQUENCES)
    texts = prompts(job.source, n=n, length=job.length, bos=job.bos, chat=job.chat)
    wanted = Wanted(job.model, job.out, job.device, job.dtype, job.revision)
    with streamed(wanted) as model:
        if job.length is None:
            limit = getattr(model.cfg, "n_ctx", None) or LENGTH
            texts = dataclasses.replace(texts, length=min(LENGTH, limit))
        rows = len(texts.token_rows(model.tokenizer))
        result = locate(model, texts, batch_size=rows, seed=job.seed)
        output.save(result, job.out, "locate", "profile")
    return result


def read_scan(path: Path | None) -> Any:
    """A saved scan.

    Raises:  ResultError: the file holds something else.
    """
    if path is None:
        return None
    from melens.results import load_result

    found = load_result(path)
    if found.schema_id.split("/")[1] != "scan":
        raise ResultError(
            f"{path} holds a result of '{found.schema_id.split('/')[1]}'; give a scan.json."
        )
    return found
