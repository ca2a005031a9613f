"""What every measuring command does: refuse early, load, locate if needed, save, show."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from melens.cli import output
from melens.cli.options import Dtype
from melens.errors import ResultError
from melens.network import go_offline
from melens.progress import Display, progress_on


@dataclass
class Job:
    """One command's shared options, as typed."""

    model: str
    text: Path | None
    prompt: list[str] | None
    bos: bool | None
    chat: bool
    n_seq: int | None
    length: int | None
    out: Path | None
    as_json: bool
    device: str
    dtype: Dtype | None
    revision: str | None
    trust_remote_code: bool
    offline: bool
    batch_size: int = 4
    seed: int = 0
    located: Path | None = None
    lines: bool = False
    source: Any = None
    """The texts' source, once looked at."""
    saved: Any = None
    """The ME Layer that ``located`` holds."""

    @classmethod
    def of(cls, options: dict[str, Any]) -> Job:
        """From a command's arguments, those of its own left out; refuses before torch loads."""
        job = cls(**{name: options[name] for name in cls.__dataclass_fields__ if name in options})
        job.source = output.source(job.text, job.prompt, lines=job.lines)
        if "edit" not in options and (Path(job.model).expanduser() / "melens.json").is_file():
            output.note(f"{job.model} has a melens.json; its edit is not applied here.")
        if job.offline:
            go_offline()
        job.out = output.writable(job.out)
        return job

    def load(self) -> tuple[Any, Any]:
        """The model, and the texts."""
        from melens.batches import prompts
        from melens.models import load  # not melens.load, which puts a saved edit in force

        texts = prompts(self.source, n=self.n_seq, length=self.length, bos=self.bos, chat=self.chat)
        self.saved = self._read_located()
        model = load(
            self.model,
            device=None if self.device == "auto" else self.device,
            dtype=self.dtype.value if self.dtype else None,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        return model, texts

    def locate(self, model: Any, texts: Any, *, overwrite: bool = False) -> Any:
        """The ME Layer: read, or found now; saved beside what comes next, never over an older one
        unless asked.
        """  # noqa: D205
        if self.saved is not None:
            return self.saved
        from melens.locating import locate

        with self.bar() as tick:
            found = locate(model, texts, batch_size=self.batch_size, seed=self.seed, progress=tick)
        if overwrite or self.out is None or not (self.out / "locate.json").exists():
            output.save(found, self.out, "locate", "profile")
        return found

    def bar(self, unit: str = "sequences") -> AbstractContextManager[Display]:
        """Progress over sequences, or other units of work."""
        return progress_on(unit)

    def finish(self, result: Any, *, same_texts: bool = True) -> None:
        """Save and print; remark where the ME Layer is of other texts, if that matters here."""
        if self.saved is not None and (said := _other_texts(self.saved, result, same_texts)):
            output.note(said)
        output.save(result, self.out, result.kind, result.kind)
        output.show(result, as_json=self.as_json, folder=self.out)

    def _read_located(self) -> Any:
        if self.located is None:
            return None
        from melens.results import load_located

        return load_located(self.located)


def _other_texts(saved: Any, result: Any, same_texts: bool) -> str:
    """What to remark of the texts that a saved ME Layer was located on; empty where nothing is."""
    before, now = saved.run.start, result.run.start
    if before and now and before != now:
        return (
            f"the ME Layer was located on other texts ({before}) than these ({now}): other tokens "
            "may be massive here."
        )
    if not same_texts or _texts_of(saved) == _texts_of(result):
        return ""
    if before and now:
        return "the ME Layer was located on other texts (BOS is the same)."
    return "the ME Layer was located on other texts; whether they began with BOS is not said."


def _texts_of(result: Any) -> Any:
    return result.run.settings.get("ids")


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
    from melens.streaming.streamed import load_streamed, stream_of

    keep = None if wanted.folder is None else wanted.folder / KEPT
    bridge = load_streamed(
        wanted.model,
        device=None if wanted.device == "auto" else wanted.device,
        dtype=wanted.dtype.value if wanted.dtype else None,
        revision=wanted.revision,
        need_tokenizer=wanted.need_tokenizer,
        keep=keep,
    )
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
