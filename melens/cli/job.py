"""What every measuring command does: refuse early, load, locate if needed, save, show."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melens.cli import output
from melens.cli.options import Dtype
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
            self.model, device=None if self.device == "auto" else self.device,
            dtype=self.dtype.value if self.dtype else None, revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
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
