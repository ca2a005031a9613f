"""Where cells run: in this process, on Ray, or as SLURM jobs through submitit.

All of them run :func:`melens.sweeping.work.run_work`; what is done stands in the sweep's folder,
which every machine must see.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from melens.errors import EngineError, MissingPackageError, SweepError
from melens.formatting import brief
from melens.models.complaints import first_line
from melens.progress import remark, restored
from melens.protocols import Options
from melens.sweeping.cells import SweepCell
from melens.sweeping.config import EngineConfig
from melens.sweeping.work import Work, run_work

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission

FIRST_WAIT = 1.0
"""Seconds before work that was lost begins again; doubled each time."""
SESSION = ".session"
"""File in a sweep's folder that names the sweep at work."""
JOBS = "jobs"
"""Folder for submitit's own files."""
EVERY = 0.5
"""Seconds between two looks at jobs."""


class Engine(Protocol):
    """Runs work until all of it has ended."""

    def run(self, works: Sequence[Work]) -> None:
        """Run it; what cannot be run after all is left missing."""
        ...


def parts_of(cells: Sequence[SweepCell], workers: int) -> list[list[SweepCell]]:
    """Cells for one worker at a time: those of one model together, in several parts where there
    are more workers than models.
    """  # noqa: D205
    models = [list(group) for _, group in itertools.groupby(cells, key=lambda cell: cell.model)]
    share = -(-workers // max(1, len(models)))
    return [
        part
        for group in models
        for part in (group[start::share] for start in range(min(share, len(group))))
    ]


@contextmanager
def engine_of(how: EngineConfig, folder: Path) -> Iterator[Engine]:
    """The engine, ready to run; refuses before any cell runs.

    Raises:  MissingPackageError: its extra is not installed. EngineError: no cluster answers.
             SweepError: settings that it cannot follow.
    """
    if how.name == "local":
        yield Local(how)
    elif how.name == "ray":
        with _ray(how) as ray:
            yield OnRay(how, ray)
    else:
        if how.gpus != int(how.gpus):
            raise SweepError(f"a SLURM job has whole GPUs, got gpus = {how.gpus:g}.")
        yield OnSlurm(how, folder, _submitit(how))


@dataclass
class Local:
    """In this process, one cell after the other."""

    how: EngineConfig

    def __post_init__(self) -> None:
        """Refuse what one process cannot do."""
        if self.how.workers > 1:
            raise SweepError(
                f"{self.how.workers} workers need an engine of their own; add --engine ray "
                "(this machine or a cluster) or --engine slurm."
            )

    def run(self, works: Sequence[Work]) -> None:
        """Run it here."""
        for work in works:
            run_work(replace(work, threads=self.how.cpus))


@contextmanager
def _ray(how: EngineConfig) -> Iterator[ModuleType]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what fails is said in one line
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray = import_module("ray")
    except ImportError:
        raise MissingPackageError("Ray is not installed; pip install 'melens[ray]'.") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, how)
    try:
        _require_resources(ray, how)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: ModuleType, how: EngineConfig) -> None:
    if how.address is not None and how.address != "auto":
        _require_answer(how.address)
    where: Options = {"address": how.address} if how.address else {"include_dashboard": False}
    if how.address is None:
        where["num_cpus"] = max(how.workers * (how.cpus or 1), os.cpu_count() or 1)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **where)
    except Exception as error:  # ConnectionError, RuntimeError, and what its libraries raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        place = how.address or "this machine"
        raise EngineError(f"no Ray cluster answers at {place}: {first[:200]}") from None


def _require_answer(address: str) -> None:
    """Ray itself waits for minutes.

    Raises:  SweepError: no address. EngineError: nothing listens there.
    """
    import socket

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise SweepError(
            f"address {brief(address, 60)} is not HOST:PORT; give the one that 'ray start --head' "
            "printed, or auto."
        )
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise EngineError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one with "
            "'ray start --head', or leave the address out."
        ) from None


def _require_resources(ray: ModuleType, how: EngineConfig) -> None:
    """A task that no machine can hold would wait for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": how.cpus or 1, "GPU": how.gpus, "memory": (how.memory_gb or 0) * 1e9}
    if not any(all(m.get(name, 0) >= need for name, need in wanted.items()) for m in machines):
        held = [max(m.get(name, 0) for m in machines) for name in wanted]
        raise SweepError(
            f"a worker is to have {wanted['CPU']} CPUs, {how.gpus:g} GPUs and "
            f"{how.memory_gb or 0:g} GB; this cluster's machines have at most {held[0]:g} CPUs, "
            f"{held[1]:g} GPUs and {held[2] / 1e9:.1f} GB."
        )


@dataclass
class OnRay:
    """Tasks of a Ray cluster; Ray decides where and when."""

    how: EngineConfig
    ray: ModuleType

    def run(self, works: Sequence[Work]) -> None:
        """Run it; work whose worker or machine was lost begins again, at its first open cell."""
        waiting, tasks = list(works), dict[object, tuple[Work, int]]()
        try:
            while waiting or tasks:
                while waiting and len(tasks) < self.how.workers:
                    work = waiting.pop(0)
                    tasks[self._start(work)] = (work, 0)
                self._wait(tasks)
        except BaseException:
            for task in tasks:
                self.ray.cancel(task, force=True)
            raise

    def _wait(self, tasks: dict[object, tuple[Work, int]]) -> None:
        """Until one task has ended; start it again where its worker was lost."""
        ended, _ = self.ray.wait(list(tasks), num_returns=1)
        work, lost = tasks.pop(ended[0])
        try:
            self.ray.get(ended[0])
        except self.ray.exceptions.RayTaskError as error:
            raise EngineError(f"a worker could not begin: {first_line(error.cause)}") from None
        except self.ray.exceptions.RayError as error:
            # A cell that loses its worker ends by itself after so many times.
            if lost > self.how.retries * len(work.cells):
                raise EngineError(f"workers were lost {lost} times: {first_line(error)}") from None
            _say_lost(first_line(error), wait := FIRST_WAIT * 2 ** min(lost, 5))
            time.sleep(wait)
            tasks[self._start(work)] = (work, lost + 1)

    def _start(self, work: Work) -> object:
        cpus = self.how.cpus or 1  # of another machine; this one's cores say nothing about it
        task = self.ray.remote(_begin).options(
            num_cpus=cpus,
            num_gpus=self.how.gpus,
            memory=None if self.how.memory_gb is None else int(self.how.memory_gb * 1e9),
            max_retries=0,
            runtime_env={"env_vars": environment()},
        )
        return task.remote(replace(work, threads=cpus))


def environment() -> dict[str, str]:
    """What a worker needs of this process's environment: melens' own switches, and offline.

    No token: schedulers show the environment of what they run.
    """
    prefixes = ("MELENS_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TQDM_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(prefixes) and "TOKEN" not in name.removeprefix("TOKENIZERS_")
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _begin(work: Work) -> None:
    """In a worker."""
    require_shared(work)
    run_work(work)


def require_shared(work: Work) -> None:
    """Refuse a machine that does not see this sweep's folder.

    Raises:  EngineError: naming the machine.
    """
    import platform

    try:
        seen = (Path(work.folder) / SESSION).read_text("utf-8")
    except OSError:
        seen = ""
    if seen != work.session:
        raise EngineError(
            f"{platform.node()} does not see {work.folder}; put --out on a disk that all machines "
            "share."
        )


def _say_lost(said: str, wait: float) -> None:
    remark(f"a worker was lost ({said}); its open cells begin again in {wait:g} s.")


def _submitit(how: EngineConfig) -> ModuleType:
    try:
        submitit = import_module("submitit")
    except ImportError:
        raise MissingPackageError(
            "submitit is not installed; pip install 'melens[slurm]'."
        ) from None
    if how.cluster == "slurm" and shutil.which("sbatch") is None:
        raise EngineError(
            "there is no sbatch here; run this on a SLURM login node, or set cluster = 'local' in "
            "[engine]."
        )
    return submitit


class JobOfCells:
    """What a SLURM job runs; submitit asks it what to queue again before the time is over."""

    def __call__(self, work: Work) -> None:
        """Run the cells."""
        _begin(work)

    def checkpoint(self, work: Work) -> DelayedSubmission:
        """The same work: what is done stands in the folder."""
        return import_module("submitit").helpers.DelayedSubmission(self, work)


@dataclass
class OnSlurm:
    """An array of SLURM jobs, or processes of this machine."""

    how: EngineConfig
    folder: Path
    submitit: ModuleType

    def run(self, works: Sequence[Work]) -> None:
        """Run it; a job that was lost is submitted again, with what is open of its cells."""
        waiting, lost = list(works), dict[int, int]()
        running: dict[Job[None], Work] = {}
        try:
            while waiting or running:
                room = len(waiting) if self.how.cluster == "slurm" else self._room(running)
                now, waiting = waiting[:room], waiting[room:]
                running |= zip(self._submit(now), now, strict=True) if now else ()
                ended = [job for job in running if job.done()]
                for job in ended:
                    waiting += self._again(job, running.pop(job), lost)
                if not ended:
                    time.sleep(EVERY)
        except BaseException:
            for job in running:
                job.cancel()
            raise

    def _room(self, running: dict[Job[None], Work]) -> int:
        return max(0, self.how.workers - len(running))

    def _submit(self, works: Sequence[Work]) -> list[Job[None]]:
        executor = self.submitit.AutoExecutor(self.folder / JOBS, cluster=self.how.cluster)
        cpus = self.how.cpus or max(1, (os.cpu_count() or 1) // self.how.workers)
        executor.update_parameters(
            timeout_min=self.how.minutes,
            cpus_per_task=cpus,
            name="melens",
            **({"gpus_per_node": int(self.how.gpus)} if self.how.gpus else {}),
            **({"mem_gb": self.how.memory_gb} if self.how.memory_gb else {}),
            **(
                {"slurm_array_parallelism": self.how.workers} if self.how.cluster == "slurm" else {}
            ),
            **({"slurm_additional_parameters": self.how.slurm} if self.how.slurm else {}),
        )
        with _environment(environment()):
            jobs: Iterable[Job[None]] = executor.map_array(
                JobOfCells(), [replace(work, threads=cpus) for work in works]
            )
        return list(jobs)

    def _again(self, job: Job[None], work: Work, lost: dict[int, int]) -> list[Work]:
        """The work of a job that did not come to its end."""
        said = _failure(job, self.submitit)
        if said is None:
            return []
        if "EngineError" in said:
            raise EngineError(f"a worker could not begin: {said}")
        times = lost.get(id(work), 0)
        if times > self.how.retries * len(work.cells):
            raise EngineError(f"jobs were lost {times} times: {said}")
        _say_lost(said, wait := FIRST_WAIT * 2 ** min(times, 5))
        time.sleep(wait)
        lost[id(work)] = times + 1
        return [work]


def _failure(job: Job[None], submitit: ModuleType) -> str | None:
    """What became of a job that has ended; None where it came to its end."""
    try:
        error = job.exception()
    except submitit.core.utils.UncompletedJobError:
        return f"job {job.job_id} left no result, see {job.paths.stderr}"
    if error is None:
        return None
    lines = [line for line in str(error).strip().splitlines() if line.strip("- ")]
    return (lines or [type(error).__name__])[-1][:200]


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Jobs inherit the environment that they are submitted in."""
    with restored(wanted):
        os.environ.update(wanted)
        yield
