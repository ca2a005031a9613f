"""What sweeps cost: a cell beside the call that it makes, and two workers beside one.

    python benchmarks/scale.py --no-ray --cells 3     # the overhead alone: half a minute
    python benchmarks/scale.py                        # SmolLM2-135M, two cores: five minutes

Overhead: the same located texts as cells of a sweep in this process and as plain calls, in turns.
Workers: 8 equal cells of ``collapse`` on a Ray cluster of this machine, one core and one thread a
worker; the cluster's own start is in neither time, the start of each worker is in both.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from common import seconds

MODEL = "smollm2-135m"
TEXTS = {"n-seq": 1, "length": 16}


def overhead(n: int, folder: Path) -> dict[str, float]:
    """Milliseconds of a cell beyond its call, medians over cells that ran in turns."""
    import melens
    from melens.sweeping.cells import cells_of
    from melens.sweeping.config import read_config
    from melens.sweeping.work import LastModel, Work, run_work

    run = {"command": "locate", "seed": list(range(n + 1)), **TEXTS}
    cells = cells_of(read_config({"model": MODEL, "run": [run]}))
    model, texts = melens.load(MODEL), melens.prompts(n=1, length=16)
    kept = LastModel()
    kept(MODEL)
    plain, swept = [], []
    work = Work.of(folder, cells, session="benchmark")
    ended = [time.perf_counter()]

    def told(_: Any) -> None:
        swept.append(time.perf_counter() - ended[-1])
        plain.append(seconds(lambda: melens.locate(model, texts, seed=len(plain))))
        ended.append(time.perf_counter())

    run_work(work, told=told)
    cell, call = (statistics.median(times[1:]) for times in (swept, plain))
    return {"cell_ms": 1e3 * cell, "call_ms": 1e3 * call, "overhead_ms": 1e3 * (cell - call)}


def workers(n_seq: int, length: int, folder: Path) -> dict[str, float]:
    """Seconds of 8 equal cells with one worker and with two."""
    import melens

    ray = import_module("ray")  # an extra
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    took = {}
    for count in (1, 2):
        run = {"command": "collapse", "seed": list(range(8)), "n-seq": n_seq, "length": length}
        engine = {"name": "ray", "workers": count, "cpus": 1}
        config = {"model": MODEL, "run": [run], "engine": engine}
        out = folder / str(count)
        took[count] = seconds(lambda c=config, o=out: melens.sweep(c, out=o, quiet=True))
    ray.shutdown()
    return {"one_s": took[1], "two_s": took[2], "ratio": took[2] / took[1]}


def main() -> None:
    """Print both as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, default=12, help="cells of the overhead")
    parser.add_argument("--n", type=int, default=4, help="sequences of a cell, for the workers")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--no-ray", action="store_true", help="leave the workers out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"overhead": overhead(given.cells, Path(folder) / "cells")}
        if not given.no_ray:
            found["workers"] = workers(given.n, given.length, Path(folder))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
