"""What a sweep is asked for: a TOML file of runs, in which a list is an axis."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from melens.errors import SweepError
from melens.formatting import brief
from melens.protocols import JsonObject
from melens.registry import unknown_name
from melens.store.disk import PAGE, read_text

EngineName = Literal["local", "ray", "slurm"]


class EngineConfig(BaseModel):
    """Where cells run, and what each worker gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: EngineName = "local"
    workers: int = Field(default=1, ge=1)
    """Cells that run at a time; more than one needs Ray or SLURM."""
    cpus: int | None = Field(default=None, ge=1)
    """Of a worker, which are its threads too; None = all of the machine, shared by the workers."""
    gpus: float = Field(default=0, ge=0)
    """Of a worker."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Of a worker."""
    retries: int = Field(default=3, ge=0)
    """Times that a cell begins again after its worker was lost."""
    address: str | None = None
    """Of a running Ray cluster; None = one of this machine's own, for the sweep alone."""
    cluster: Literal["slurm", "local"] = "slurm"
    """What submitit hands jobs to; local = processes of this machine."""
    minutes: int = Field(default=240, ge=1)
    """Limit of a SLURM job."""
    slurm: dict[str, str | int] = {}
    """More of SLURM's own settings, e.g. partition or account."""


@dataclass(frozen=True)
class RunConfig:
    """One command of a sweep with its options; a list of values is an axis."""

    command: str
    models: tuple[str, ...]
    options: JsonObject
    """By name as on the command line, without the dashes before it."""


@dataclass(frozen=True)
class SweepConfig:
    """A sweep as asked for."""

    runs: tuple[RunConfig, ...]
    out: Path | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    common: JsonObject = field(default_factory=dict)
    """Options of all runs; a command that has no such option goes without."""


def read_config(given: str | Path | Mapping[str, object]) -> SweepConfig:
    """A sweep from a TOML file, or from what such a file would hold.

    Raises:  SweepError: not TOML, or a key that has no meaning; names the place.
    """
    if isinstance(given, Mapping):
        return _config(dict(given), "the config")
    if not isinstance(given, (str, Path)):
        raise SweepError(
            f"a sweep's config is a TOML file or a mapping, got a {type(given).__name__}."
        )
    path = Path(given).expanduser()
    text = read_text(path, PAGE, error=SweepError, what="the config")
    try:
        return _config(tomllib.loads(text), str(path))
    except tomllib.TOMLDecodeError as error:
        raise SweepError(f"{path} is not valid TOML: {error}.") from None


def _config(data: JsonObject, name: str) -> SweepConfig:
    runs = data.pop("run", None)
    if not isinstance(runs, list) or not runs or not all(isinstance(r, Mapping) for r in runs):
        raise SweepError(
            f"{name} needs at least one [[run]] with a command, e.g. command = 'locate' (two "
            "brackets, no s)."
        )
    engine = _engine(data.pop("engine", {}), name)
    out, models = data.pop("out", None), data.pop("model", None)
    if out is not None and not isinstance(out, str):
        raise SweepError(f"{name}: out must be a folder's name, got {brief(out, 40)}.")
    if bad := [key for key, value in data.items() if isinstance(value, Mapping)]:
        raise SweepError(f"{name}: {unknown_name('table', bad[0], ('run', 'engine'))}")
    made = tuple(_run(dict(run), models, f"{name}, run {i}") for i, run in enumerate(runs, 1))
    return SweepConfig(made, None if out is None else Path(out).expanduser(), engine, data)


def _engine(given: object, name: str) -> EngineConfig:
    try:
        return EngineConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["engine", *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            known = unknown_name("key", str(first["loc"][-1]), EngineConfig.model_fields)
            raise SweepError(f"{name}: [engine]: {known}") from None
        raise SweepError(f"{name}: {place}: {first['msg']}.") from None


def _run(run: JsonObject, models: object, name: str) -> RunConfig:
    command = run.pop("command", None)
    if not isinstance(command, str):
        raise SweepError(f"{name} names no command; add e.g. command = 'locate'.")
    asked = run.pop("model", models)
    listed = [asked] if isinstance(asked, str) else asked
    if not isinstance(listed, list) or not listed or not all(isinstance(m, str) for m in listed):
        raise SweepError(
            f"{name} ({brief(command, 40)}) needs a model: a name or a list of names, in the run "
            f"or at the top; got {brief(asked, 40)}."
        )
    return RunConfig(command, tuple(dict.fromkeys(listed)), run)


def combinations(axes: Mapping[str, Sequence[object]]) -> Iterator[JsonObject]:
    """Every choice of one value an axis, the last axis the fastest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
