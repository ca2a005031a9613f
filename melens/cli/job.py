"""What every measuring command does: refuse early, load, locate if needed, save, show."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from melens.cli import output
from melens.cli.options import OutputOptions, RunOptions, TextOptions, has_edit
from melens.cli.output import BUNDLED
from melens.collector import rarely_collected
from melens.errors import ModelError, ResultError
from melens.progress import Display, progress_on
from melens.protocols import HookedModel, Options
from melens.results.base import kind_name, run_of

if TYPE_CHECKING:
    from melens.batches import Prompts
    from melens.provenance import RunInfo
    from melens.results import MELayer, Result, WeightScan

ALL_BUNDLED = TextOptions()
LOADER: ContextVar[Callable[..., HookedModel] | None] = ContextVar("loader", default=None)
"""What gives commands their model, where it is not loaded for one command alone."""
NOT_SAVED = OutputOptions()


@dataclass
class Job:
    """One command's shared options, as typed."""

    model: str
    run: RunOptions
    texts: TextOptions = ALL_BUNDLED
    output: OutputOptions = NOT_SAVED
    located: Path | None = None
    source: str | Path | Sequence[str] = BUNDLED
    """The texts' source, once looked at."""
    saved: MELayer | None = None
    """The ME Layer that ``located`` holds."""
    predicted: str = ""
    """What ``located`` says of it where it is a scan, which predicts and does not locate."""

    @classmethod
    def of(
        cls,
        model: str,
        run: RunOptions,
        *,
        texts: TextOptions = ALL_BUNDLED,
        out: OutputOptions = NOT_SAVED,
        located: Path | None = None,
        edits: bool = False,
    ) -> Job:
        """From a command's options; refuses before torch loads.

        Args:    located: the file with the ME Layer.
                 edits: whether the command has an edit of its own.
        """
        job = cls(model, run, texts, out, located)
        job.source = output.source(texts.text, texts.prompt, lines=texts.lines)
        if not edits and has_edit(model):
            output.note(f"{model} has a melens.json; its edit is not applied here.")
        output.refuse_unwritable(job.out)
        return job

    @property
    def out(self) -> Path | None:
        """The folder for results."""
        return self.output.out

    def prompts(self, n: int | None = None) -> Prompts:
        """The texts, cut as typed, or to ``n`` of them."""
        from melens.batches import prompts

        cut = self._cut() if n is None else {**self._cut(), "n": n}
        return prompts(self.source, **cut)

    def choices(self) -> Options:
        """What was chosen of how model and texts are read, where it is not the default."""
        chosen = {**self.run.loading(), **self._cut(), "chat": self.texts.chat or None}
        chosen["trust_remote_code"] = self.run.trust_remote_code or None
        return {name: value for name, value in chosen.items() if value is not None}

    def _cut(self) -> Options:
        texts = self.texts
        return {"n": texts.n_seq, "length": texts.length, "bos": texts.bos, "chat": texts.chat}

    @rarely_collected()  # here libraries are imported
    def load(self) -> tuple[HookedModel, Prompts]:
        """The model, and the texts."""
        texts = self.prompts()
        self.saved = self._read_located()
        loader = LOADER.get()
        if loader is None:
            from melens.models import load  # not melens.load, which puts a saved edit in force

            loader = load
        return loader(self.model, **self.run.loading()), texts

    def locate(self, model: HookedModel, texts: Prompts, *, overwrite: bool = False) -> MELayer:
        """The ME Layer: read, or found now; saved beside what comes next, never over an older one
        unless asked.
        """  # noqa: D205
        if self.saved is not None:
            return self.saved
        from melens.locating import locate

        with self.bar() as tick:
            found = locate(
                model,
                texts,
                batch_size=self.run.batch_size,
                seed=self.run.seed,
                progress=tick,
            )
        if self.predicted:
            layer = "none" if found.me_layer is None else found.me_layer
            output.note(f"{self.located} {self.predicted}; located now, the ME Layer is {layer}.")
        if overwrite or self.out is None or not (self.out / "locate.json").exists():
            output.save(found, self.out, "locate", "profile")
        return found

    def bar(self, unit: str = "sequences") -> AbstractContextManager[Display]:
        """Progress over sequences, or other units of work."""
        return progress_on(unit)

    def finish(self, result: Result, *, same_texts: bool = True, explain: bool = False) -> None:
        """Save and print; remark where the ME Layer is of other texts, if that matters here."""
        if self.saved is not None and (said := _other_texts(self.saved, result, same_texts)):
            output.note(said)
        output.save(result, self.out, kind_name(result), kind_name(result))
        output.show(result, as_json=self.output.as_json, folder=self.out, explain=explain)

    def _read_located(self) -> MELayer | None:
        if self.located is None:
            return None
        from melens.results import load_result
        from melens.results.reading import measured_or_none, predicted

        result = load_result(self.located)
        found = measured_or_none(result, str(self.located))
        if found is None:
            self.predicted = predicted(result)
        return found


def _other_texts(saved: MELayer, result: Result, same_texts: bool) -> str:
    """What to remark of the texts that a saved ME Layer was located on; empty where nothing is."""
    run = run_of(result)
    before, now = saved.run.start, None if run is None else run.start
    if before and now and before != now:
        return (
            f"the ME Layer was located on other texts ({before}) than these ({now}): other tokens "
            "may be massive here."
        )
    if not same_texts or _texts_of(saved.run) == _texts_of(run):
        return ""
    if before and now:
        return "the ME Layer was located on other texts (BOS is the same)."
    return "the ME Layer was located on other texts; whether they began with BOS is not said."


def _texts_of(run: RunInfo | None) -> object:
    return None if run is None else run.settings.get("ids")


KEPT = ".stream"
"""Folder in --out for finished blocks; removed at the end."""
SEQUENCES, LENGTH = 2, 64
"""Reference texts of `locate --stream`: the medians need few, and every token is paid for."""


@contextmanager
def streamed(
    model: str, run: RunOptions, folder: Path | None, *, need_tokenizer: bool = True
) -> Iterator[HookedModel]:
    """A streamed bridge with its progress bar; at the end says what was read, and tidies up."""
    if run.trust_remote_code:
        raise typer.BadParameter("--stream runs no code of the model's own")
    from melens.streaming.streamed import load_streamed, stream_of

    keep = None if folder is None else folder / KEPT
    how = run.loading()
    if "device_map" in how:
        raise ModelError("--stream reads one block at a time by itself; drop --device-map.")
    del how["trust_remote_code"]
    bridge = load_streamed(model, **how, need_tokenizer=need_tokenizer, keep=keep)
    reading = stream_of(bridge)
    assert reading is not None
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


def locate_streamed(job: Job) -> MELayer:
    """`melens locate --stream`: few texts, one batch, one block in memory at a time."""
    from melens.locating import locate

    length = job.texts.length
    texts = job.prompts(job.texts.n_seq or (None if job.texts.prompt else SEQUENCES))
    with streamed(job.model, job.run, job.out) as model:
        if length is None:
            limit = getattr(model.cfg, "n_ctx", None) or LENGTH
            texts = dataclasses.replace(texts, length=min(LENGTH, limit))
        rows = len(texts.token_rows(model.tokenizer))
        result = locate(model, texts, batch_size=rows, seed=job.run.seed)
        output.save(result, job.out, "locate", "profile")
    return result


def read_scan(path: Path | None) -> WeightScan | None:
    """A saved scan.

    Raises:  ResultError: the file holds something else.
    """
    if path is None:
        return None
    from melens.results import WeightScan, load_result

    found = load_result(path)
    if not isinstance(found, WeightScan):
        raise ResultError(f"{path} holds a result of '{kind_name(found)}'; give a scan.json.")
    return found
