"""RunInfo: what made a result, so that a number can be traced and made again."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

PACKAGES = ("melens", "torch", "transformers", "transformer-lens")


@dataclass(frozen=True)
class ModelFacts:
    """What a run knows of its model."""

    name: str
    revision: str | None
    weights: str | None
    dtype: str
    device: str


class RunInfo(BaseModel):
    """Versions, model and settings behind a result; only ``created`` differs between equal runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    model_revision: str | None
    weights: str | None
    """Short hash over a fixed sample of every parameter."""
    dtype: str
    device: str
    seed: int
    settings: dict[str, str | int | bool | None]
    """What the run was fed: counts, a hash of the token ids, BOS and chat policy."""
    command: str
    versions: dict[str, str]
    git: str | None
    created: str
    """UTC, ISO 8601."""

    @property
    def start(self) -> str | None:
        """How the texts began; None where no texts were run, or an older record does not say."""
        if "bos_first" not in self.settings:
            return None
        return bos_said(self.settings["bos_first"])

    def flag(self, name: str) -> bool | None:
        """A setting that is true or false; None where it is neither."""
        value = self.settings.get(name)
        return value if isinstance(value, bool) else None

    @property
    def subject(self) -> str:
        """The model, and how its texts began: the same weights and words give other numbers."""
        said, of = [self.start] if self.start else [], self.settings.get("sequences")
        if unknown := self.settings.get("unknown_texts"):
            said.append(f"{unknown} of {of} texts hold nothing but unknown tokens")
        if repeated := self.settings.get("repeated_texts"):
            said.append(f"{repeated} of {of} texts repeat a few tokens")
        return f"{self.model} ({'; '.join(said)})" if said else self.model

    @classmethod
    def collect(
        cls, model: ModelFacts, *, seed: int, settings: dict[str, str | int | bool | None]
    ) -> RunInfo:
        """Record this process beside the facts about the model that the caller knows."""
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        return cls(
            model=model.name,
            model_revision=model.revision,
            weights=model.weights,
            dtype=model.dtype,
            device=model.device,
            seed=seed,
            settings=settings,
            command=command_line(),
            versions=versions(),
            git=git_commit(),
            created=now.isoformat(),
        )


def bos_said(start: object) -> str:
    """How texts began, in words.

    Args:    start: a run's ``bos_first``; None where some of its texts begin with BOS.
    """
    return "BOS before some texts" if start is None else "with BOS" if start else "without BOS"


def command_line() -> str:
    """The command as typed, the program by its name alone."""
    program, *args = sys.argv or ["python"]
    return shlex.join([Path(program).name or "python", *args])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on; read once a process."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def git_commit() -> str | None:
    """Commit of the checkout that melens runs from; None where it is an installed package.

    Asked once a process: the code that runs is that of its start.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
