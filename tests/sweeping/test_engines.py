"""The same sweep in this process, on a Ray cluster of two nodes and through submitit; run with
make test-engines.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

pytestmark = [pytest.mark.engines, pytest.mark.enable_socket]
TIMED = ("run_created", "run_command")
EVERY = 0.02
"""Seconds between two looks at states, which are files: the cores are the workers'."""
TABLES = (("locate", "summary"), ("locate", "profile"), ("scan", "candidates"))


@pytest.fixture(scope="module")
def config(folders):
    """Ten cells on two models."""
    return {
        "model": [str(folder) for folder in folders.values()],
        "run": [
            {"command": "locate", "seed": list(range(4)), "n-seq": 2, "length": 16, "bos": True},
            {"command": "scan", "reach": False},
        ],
    }


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The sweep in this process."""
    import melens

    out = tmp_path_factory.mktemp("alone")
    assert melens.sweep(config, out=out, quiet=True).count("done") == 10
    return out


def same_rows(one, other, tables=TABLES):
    from melens.sweeping import gather

    for kind, table in tables:
        frames = [gather(out, kind, table) for out in (one, other)]
        kept = [f.drop(columns=[c for c in TIMED if c in f.columns]) for f in frames]
        assert kept[0].equals(kept[1]), (kind, table)


@pytest.fixture
def cluster():
    """Two nodes of one CPU each on this machine; the second may be taken away."""
    from ray.cluster_utils import Cluster

    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def when(found, act):
    """Wait in a thread until ``found`` gives something, and do something with it."""

    def run():
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if (it := found()) is not None:
                act(it)
                done.append(it)
                return
            time.sleep(EVERY)

    done = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, done


def running(out, after):
    """The cells that are running and their processes, once so many are done; None before."""
    from melens.sweeping.work import read_state

    states = {home.name: read_state(home) for home in out.glob("cells/*")}
    if sum(state.get("status") == "done" for state in states.values()) < after:
        return None
    pids = {name: s["pid"] for name, s in states.items() if s.get("status") == "running"}
    return pids or None


@pytest.mark.filterwarnings("ignore")
def test_a_worker_killed_in_mid_cell_and_a_node_taken_away_lose_nothing(
    config, alone, cluster, tmp_path, capsys
):
    import melens

    def lose_both():
        """The node while both have work; then, with one left, the worker in mid-cell."""
        drop, gone = when(
            lambda: running(tmp_path, 1), lambda _: cluster.remove_node(cluster.second)
        )
        drop.join()

        def begun_since():
            """What runs on the node that is left: a lost cell says ``running`` as well."""
            now = running(tmp_path, 6) or {}
            return next((pid for name, pid in now.items() if name not in gone[0]), None)

        kill, killed = when(begun_since, lambda pid: os.kill(pid, signal.SIGKILL))
        kill.join()
        lost.append((killed, gone))

    lost = []
    thread = threading.Thread(target=lose_both, daemon=True)
    thread.start()
    made = melens.sweep(
        config, out=tmp_path, engine="ray", workers=2, address=cluster.address, quiet=True
    )
    thread.join(timeout=10)
    assert [len(one) for one in lost[0]] == [1, 1]
    assert made.count("done") == 10
    assert capsys.readouterr().err.count("a worker was lost") >= 2
    same_rows(alone, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_one_worker_takes_one_models_cells_after_the_other(config, alone, tmp_path):
    """A cluster of its own; two models' cells, and never two of them at once."""
    import melens
    from melens.sweeping.work import read_state

    over, most = threading.Event(), []

    def count():
        while not over.wait(EVERY):
            states = [read_state(home).get("status") for home in tmp_path.glob("cells/*")]
            most.append(states.count("running"))

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    made = melens.sweep(config, out=tmp_path, engine="ray", workers=1, quiet=True)
    over.set()
    counter.join()
    assert made.count("done") == 10
    assert max(most) == 1
    same_rows(alone, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_cell_that_always_kills_its_worker_fails_alone(config, tmp_path):
    """Through submitit: jobs as processes of this machine."""
    import melens
    from melens.sweeping.cells import cells_of
    from melens.sweeping.config import read_config
    from melens.sweeping.work import CELLS, read_state

    few = {"model": config["model"][:1], "run": [{**config["run"][0], "seed": [0, 1, 2]}]}
    engine = {"name": "slurm", "cluster": "local", "workers": 2, "retries": 1}
    alone, tmp_path = tmp_path / "alone", tmp_path / "jobs"
    melens.sweep(few, out=alone, quiet=True)
    victim = cells_of(read_config(few))[1]
    over, killed = threading.Event(), []

    def kill_always():
        while not over.wait(EVERY):
            state = read_state(tmp_path / CELLS / victim.id)
            if state.get("status") == "running" and state["pid"] not in killed:
                os.kill(state["pid"], signal.SIGKILL)
                killed.append(state["pid"])

    killer = threading.Thread(target=kill_always, daemon=True)
    killer.start()
    made = melens.sweep({**few, "engine": engine}, out=tmp_path, quiet=True)
    over.set()
    killer.join()
    assert [row.cell for row in made.cells if row.status == "failed"] == [victim.id]
    row = next(row for row in made.cells if row.status == "failed")
    assert row.error.startswith("its worker was lost 2 times")
    assert len(killed) == 2
    assert made.count("done") == 2
    assert melens.sweep({**few, "engine": engine}, out=tmp_path, quiet=True).count("done") == 3
    same_rows(alone, tmp_path, TABLES[:2])


def test_what_does_not_answer_is_refused_before_any_cell(config, tmp_path, monkeypatch):
    import melens
    from melens.errors import EngineError, MissingPackageError, SweepError

    monkeypatch.setattr("melens.sweeping.work.run_cell", None)
    for engine, error, said in (
        ({"name": "ray", "address": "127.0.0.1:9"}, EngineError, "no Ray cluster answers at 127"),
        ({"name": "ray", "address": "nowhere"}, SweepError, "is not HOST:PORT"),
        ({"name": "slurm"}, EngineError, "there is no sbatch here"),
    ):
        with pytest.raises(error, match=said) as found:
            melens.sweep({**config, "engine": engine}, out=tmp_path, quiet=True)
        assert "\n" not in str(found.value)
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'melens\[slurm\]'"):
        melens.sweep({**config, "engine": {"name": "slurm"}}, out=tmp_path, quiet=True)
