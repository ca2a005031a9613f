"""Sweeps in this process: what is kept, taken up again, refused, and read as one table."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path

import pytest
from processes import forked

TIMED = ("run_created", "run_command")


def summary(folder, kind, **options):
    """One row a cell, without what differs between equal runs."""
    from melens.sweeping import gather

    frame = gather(folder, kind, **options)
    return frame.drop(columns=[name for name in TIMED if name in frame.columns])


def test_every_cell_equals_its_call_and_runs_once(config, folders, tmp_path, monkeypatch):
    import melens
    from melens.models import loading
    from melens.sweeping import results_of

    config["model"] = [str(folder) for folder in folders.values()]
    loads, load = [], loading.load
    monkeypatch.setattr("melens.models.load", lambda name, **how: loads.append(name) or load(name))
    made = melens.sweep(config, out=tmp_path, quiet=True)
    assert made.summary() == "6 of 6 cells are done."
    assert loads == [str(folder) for folder in folders.values()]  # once a model
    texts = melens.prompts("bundled", n=2, length=16, bos=True)
    for row, result in results_of(tmp_path, "locate"):
        alone = melens.locate(row.model, texts, seed=row.options["seed"])
        assert result.profile == alone.profile
        assert (result.me_layer, result.run.seed) == (3, row.options["seed"])
        assert result.run.command.startswith(f"melens {' '.join(row.argv)} --json")
    frame = summary(tmp_path, "locate")
    assert frame["me_layer"].tolist() == [3] * 4
    assert frame["model"].tolist() == [str(f) for f in folders.values() for _ in range(2)]
    before = _stamps(tmp_path)
    again = melens.sweep(config, out=tmp_path, quiet=True)
    assert again.cells == made.cells
    assert _stamps(tmp_path) == before


def _stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/cell.json")}


def test_a_longer_config_runs_only_what_is_new(config, tmp_path):
    import melens

    melens.sweep(config, out=tmp_path, quiet=True)
    before = _stamps(tmp_path)
    config["run"][0]["seed"] = [0, 2]
    made = melens.sweep(config, out=tmp_path, quiet=True)
    assert [row.options.get("seed") for row in made.cells if row.command == "locate"] == [0, 2]
    after = _stamps(tmp_path)
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1
    assert sorted(set(summary(tmp_path, "locate")["seed"])) == [0, 2]  # the config's own cells


def test_a_failed_cell_is_a_row_and_runs_again(config, tmp_path, monkeypatch):
    import melens
    from melens import locating
    from melens.errors import ModelError

    calls, locate = [], locating.locate

    def fail_once(*args, **how):
        calls.append(how["seed"])
        if len(calls) == 1:
            raise ModelError("the first one fails.")
        return locate(*args, **how)

    monkeypatch.setattr("melens.locating.locate", fail_once)
    made = melens.sweep(config, out=tmp_path, quiet=True)
    first = made.cells[0]
    assert (first.status, first.exit_code, first.error) == ("failed", 2, "the first one fails.")
    assert [row.status for row in made.cells[1:]] == ["done"] * 2
    assert made.summary().startswith("2 of 3 cells are done; 1 failed (first: locate ")
    assert melens.sweep(config, out=tmp_path, quiet=True).count("done") == 3
    assert calls == [0, 1, 0]


def test_killed_five_times_it_equals_an_undisturbed_one(config, tmp_path):
    """14 cells; each process is killed after a further cell or two, wherever it is then."""
    import melens

    del config["run"][1]
    config["run"][0] |= {"seed": list(range(14)), "n-seq": 1, "length": 8}
    rng = random.Random(0)
    for _ in range(5):
        done = _done(tmp_path / "killed")
        process = forked(partial(melens.sweep, config, out=tmp_path / "killed", quiet=True))
        aim = done + rng.randint(1, 2)
        while process.is_alive() and _done(tmp_path / "killed") < aim:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.join()
    assert 5 <= _done(tmp_path / "killed") < 14
    assert melens.sweep(config, out=tmp_path / "killed", quiet=True).count("done") == 14
    melens.sweep(config, out=tmp_path / "whole", quiet=True)
    for table in ("summary", "profile", "massive"):
        killed = summary(tmp_path / "killed", "locate", table=table)
        assert killed.equals(summary(tmp_path / "whole", "locate", table=table))


def _done(folder):
    from melens.sweeping.work import read_state

    return sum(read_state(home).get("status") == "done" for home in folder.glob("cells/*"))


def test_two_sweeps_do_not_work_in_one_folder(config, tmp_path):
    from filelock import FileLock

    import melens
    from melens.errors import OutputError

    with FileLock(tmp_path / ".sweep.lock"), pytest.raises(OutputError, match="another sweep"):
        melens.sweep(config, out=tmp_path, quiet=True)


def test_a_worker_that_comes_late_leaves_a_done_cell_alone(config, tmp_path, monkeypatch):
    """Another one, left behind by a driver that was killed, may have run it meanwhile."""
    import melens
    from melens.sweeping.cells import cells_of
    from melens.sweeping.config import read_config
    from melens.sweeping.work import Work, run_work

    melens.sweep(config, out=tmp_path, quiet=True)
    monkeypatch.setattr("melens.sweeping.work.run_cell", None)
    told = []
    run_work(Work.of(tmp_path, cells_of(read_config(config)), session="late"), told=told.append)
    assert told == []


def test_an_interrupted_cell_is_missing_and_not_failed(config, tmp_path, monkeypatch):
    import melens
    from melens.sweeping import read_sweep
    from melens.sweeping.work import read_state

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("melens.locating.locate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        melens.sweep(config, out=tmp_path, quiet=True)
    assert {row.status for row in read_sweep(tmp_path).cells} == {"missing"}
    state = read_state(next(home for home in tmp_path.glob("cells/*") if read_state(home)))
    assert (state["status"], "begun" in state) == ("interrupted", False)  # no worker was lost
    monkeypatch.undo()
    assert melens.sweep(config, out=tmp_path, quiet=True).count("done") == 3


def test_out_of_memory_halves_the_batch_once_and_says_so(config, folders, tmp_path, monkeypatch):
    import torch

    import melens
    from melens import locating

    sizes, locate = [], locating.locate

    def short_of_memory(*args, batch_size, **how):
        sizes.append(batch_size)
        if batch_size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return locate(*args, batch_size=batch_size, **how)

    monkeypatch.setattr("melens.locating.locate", short_of_memory)
    config["model"], config["run"] = str(folders["llama"]), [{"command": "locate", "length": 8}]
    limit = 2
    row = melens.sweep(config, out=tmp_path / "a", quiet=True).cells[0]
    assert (row.status, sizes) == ("done", [4, 2])
    assert row.notes == ("out of memory; run again with --batch-size 2 instead of 4",)
    limit = 1
    row = melens.sweep(config, out=tmp_path / "b", quiet=True).cells[0]
    assert (row.status, row.exit_code, sizes) == ("failed", 3, [4, 2, 4, 2])
    assert row.error.startswith("out of memory")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": "./nowhere"}, "ModelNotFoundError", "no file or folder"),
        ({"engine": {"workers": 2}}, "SweepError", "engine ray"),
        ({"engine": {"address": "h:1"}}, "SweepError", "address belongs to Ray"),
        ({"run": [{"command": "eval", "task": "perplexty"}]}, "UnknownNameError", "perplexty"),
        ({"run": [{"command": "eval", "mask-layers": "3-19"}]}, "SiteError", r"outside 0\.\.9"),
        ({"run": [{"command": "locate", "text": "none.txt"}]}, "PromptError", "none.txt"),
    ],
)
def test_what_cannot_run_is_refused_before_any_cell(
    change, error, said, config, tmp_path, monkeypatch
):
    import melens
    from melens.errors import MelensError

    monkeypatch.setattr("melens.sweeping.work.run_cell", None)
    with pytest.raises(MelensError, match=said) as found:
        melens.sweep({**config, **change}, out=tmp_path, quiet=True)
    assert type(found.value).__name__ == error
    assert "\n" not in str(found.value)
    assert found.value.exit_code in (2, 3)


def test_a_mask_that_a_family_refuses_is_refused_before_any_cell(folders, tmp_path, monkeypatch):
    import melens
    from melens.errors import InterventionError
    from melens.models import families
    from melens.sweeping.preflight import _mask_refusal

    known = {**families.families(), "LlamaForCausalLM": {"mask": "block 0 has no norm 'ln1'."}}
    monkeypatch.setattr("melens.models.families.families", lambda: known)
    assert _mask_refusal({"architectures": ["LlamaForCausalLM"]}) == "block 0 has no norm 'ln1'."
    assert _mask_refusal({"architectures": ["Qwen3ForCausalLM"]}) == ""
    assert _mask_refusal({}) == ""
    monkeypatch.setattr("melens.sweeping.work.run_cell", None)
    config = {"model": str(folders["llama"]), "run": [{"command": "eval", "n": 2}]}
    with pytest.raises(InterventionError, match="takes no mask: block 0 has no norm"):
        melens.sweep(config, out=tmp_path, quiet=True)


@pytest.fixture(scope="module")
def gathered(folders, tmp_path_factory):
    """A finished sweep of twelve locates and two scans."""
    import melens

    out = tmp_path_factory.mktemp("sweep")
    config = {
        "model": [str(folder) for folder in folders.values()],
        "run": [
            {"command": "locate", "seed": list(range(6)), "n-seq": 2, "length": 16, "bos": True},
            {"command": "scan", "reach": False},
        ],
    }
    return melens.sweep(config, out=out, quiet=True), out


def test_tables_are_the_results_own(gathered):
    from melens.sweeping import gather, kinds_of, results_of

    _, out = gathered
    assert set(kinds_of(out)) == {"locate", "scan"}
    profile = gather(out, "locate", "profile")
    rows = [row for _, result in results_of(out, "locate") for row in result.table("profile")]
    assert profile["max"].tolist() == [row["max"] for row in rows]
    some = gather(out, "locate", where="seed in (1, 2)", columns=["seed", "me_layer"])
    assert some.values.tolist() == [[1, 3], [2, 3]] * 2
    assert gather(out, "sweep", where="command = 'scan'")["status"].tolist() == ["done"] * 2


def test_group_means_have_the_interval_over_rows(gathered):
    import torch

    from melens.intervals import mean_interval
    from melens.sweeping import gather

    _, out = gathered
    frame = gather(out, "locate", "profile", where="layer = 3", columns=["model", "seed", "max"])
    found = gather(out, "locate", "profile", where="layer = 3", columns=["max"], group_by=["model"])
    for _, row in found.iterrows():
        values = torch.tensor(frame[frame["model"] == row["model"]]["max"].tolist()).double()
        assert row["cells"] == len(values) == 6
        assert row["max"] == pytest.approx(float(values.mean()))
        if (interval := mean_interval(values)) is not None:
            assert (row["max_low"], row["max_high"]) == pytest.approx(interval)
        else:
            assert row[["max_low", "max_high"]].isna().all()
    everything = gather(out, "locate", group_by=["model"])
    assert "seed" not in everything.columns  # an axis is no measurement
    assert everything["me_layer"].tolist() == [3, 3]


def test_a_damaged_or_lost_table_is_made_again_of_the_json(gathered):
    from melens.sweeping import gather

    _, out = gathered
    before = summary(out, "locate")
    some = sorted(out.glob("rows/kind=locate/table=summary/*.parquet"))
    some[0].write_bytes(b"PAR1")
    assert gather(out, "locate").drop(columns=list(TIMED)).equals(before)
    some[1].unlink()
    assert gather(out, "locate").drop(columns=list(TIMED)).equals(before)


def test_the_interval_is_over_cells_and_not_over_their_rows(tmp_path):
    """By hand: six cells of three rows each, one cell without the number."""
    import pandas as pd
    import torch

    from melens.intervals import mean_interval
    from melens.sweeping.gathering import _grouped

    values = [[1.0, 2, 3], [4, 5, 6], [2, 2, 2], [9, 9, 0], [7, 1, 1], [float("nan")] * 3]
    rows = [{"cell": str(i), "model": "m", "x": x} for i, three in enumerate(values) for x in three]
    found = _grouped(pd.DataFrame(rows), ["model"], [], {"model"}).iloc[0]
    means = torch.tensor([sum(three) / 3 for three in values[:5]]).double()
    assert (found["cells"], found["x_cells"]) == (6, 5)
    assert found["x"] == pytest.approx(float(means.mean()))
    assert (found["x_low"], found["x_high"]) == pytest.approx(mean_interval(means))


def test_a_folder_whose_name_is_a_pattern(folders, tmp_path):
    import melens
    from melens.sweeping import gather

    config = {"model": str(folders["llama"]), "run": [{"command": "scan", "reach": False}]}
    out = tmp_path / "s[1]*"
    melens.sweep(config, out=out, quiet=True)
    assert gather(out, "scan")["me_layer"].tolist() == [3]


def test_a_record_that_leads_outside_is_refused(gathered, tmp_path):
    from melens.errors import ResultError
    from melens.sweeping import read_sweep

    made, _ = gathered
    for name, value in (("cell", "../../x"), ("result", "/etc/passwd"), ("result", "../a.json")):
        data = json.loads(made.to_json())
        data["cells"][0][name] = value
        (tmp_path / "sweep.json").write_text(json.dumps(data), "utf-8")
        with pytest.raises(ResultError, match=name):
            read_sweep(tmp_path)


def test_a_check_that_did_not_run_in_full_is_no_done_cell(config, tmp_path, monkeypatch):
    import melens

    monkeypatch.setattr("melens.cli.commands.check.EXIT_CODES", dict.fromkeys(CODES, 3))
    config["run"] = [{"command": "check", "budget": "quick", "n-seq": 2, "length": 16}]
    row = melens.sweep(config, out=tmp_path, quiet=True).cells[0]
    assert (row.status, row.exit_code, row.kind) == ("failed", 3, "check")
    assert row.error.startswith("not run in full: ")


CODES = ("pass", "findings", "incomplete")


def test_what_is_not_there_is_named(gathered, tmp_path):
    from melens.errors import ResultError, UnknownNameError
    from melens.sweeping import gather

    _, out = gathered
    with pytest.raises(ResultError, match="several kinds of results; name one: locate, scan"):
        gather(out)
    with pytest.raises(UnknownNameError, match=r"unknown kind 'lokate'. Did you mean 'locate'"):
        gather(out, "lokate")
    with pytest.raises(UnknownNameError, match=r"unknown table 'profil'. Did you mean 'profile'"):
        gather(out, "locate", "profil")
    with pytest.raises(UnknownNameError, match="unknown column 'me'"):
        gather(out, "locate", columns=["me"])
    with pytest.raises(ResultError, match=r"'sead = 1' cannot be used: .*sead"):
        gather(out, "locate", where="sead = 1")
    with pytest.raises(ResultError, match=r"not a sweep's folder: it has no sweep\.json"):
        gather(tmp_path, "locate")


def run(arguments, capsys):
    from melens.cli.app import _run

    code = _run(arguments, debug=False)
    out, err = capsys.readouterr()
    return code, out, err


def test_results_as_csv_latex_json_and_a_figure(gathered, tmp_path, capsys):
    made, out = gathered
    code, printed, _ = run(["results", str(out)], capsys)
    assert code == 0
    assert made.summary() in printed
    assert "locate" in printed
    columns = ["--columns", "seed,me_layer,verdict"]
    code, printed, _ = run(["results", str(out), "--kind", "locate", *columns, "--json"], capsys)
    assert json.loads(printed)[0] == {"seed": 0, "me_layer": 3, "verdict": "single"}
    code, printed, _ = run(
        ["results", str(out), "--kind", "locate", *columns, "--csv", "-"], capsys
    )
    assert printed.splitlines()[:2] == ["seed,me_layer,verdict", "0,3,single"]
    latex = tmp_path / "table.tex"
    run(["results", str(out), "--kind", "locate", *columns, "--latex", str(latex)], capsys)
    assert r"$0$ & $3$ & single \\" in latex.read_text("utf-8")
    figure = tmp_path / "figure.png"
    code, _, err = run(["results", str(out), "--kind", "locate", "--plot", str(figure)], capsys)
    assert code == 0, err
    assert figure.read_bytes().startswith(b"\x89PNG")
    code, _, err = run(["results", str(out), "--where", "seed > 1"], capsys)
    assert (code, "add --kind: locate, scan, sweep" in err) == (2, True)


def test_the_command_sweeps_plans_and_ends_with_3_where_a_cell_fails(folders, tmp_path, capsys):
    path, out = tmp_path / "sweep.toml", tmp_path / "out"
    path.write_text(
        f'model = "{folders["llama"]}"\nout = "{out}"\n'
        '[[run]]\ncommand = "locate"\nn-seq = 2\nlength = 16\n'
        '[[run]]\ncommand = "locate"\nprompt = "x"\nlength = 100000\n',
        "utf-8",
    )
    code, printed, _ = run(["sweep", str(path), "--dry-run"], capsys)
    assert (code, "2 cells on 1 model, 0 of them done; about" in printed) == (0, True)
    assert not out.exists()
    code, printed, err = run(["sweep", str(path)], capsys)
    assert code == 3
    assert "1 of 2 cells are done; 1 failed (first: locate " in printed
    assert "2 of 2 cells: locate" in err
    code, printed, _ = run(["sweep", str(path), "--dry-run", "--json"], capsys)
    plan = json.loads(printed)
    assert [cell["minutes"] == 0 for cell in plan["cells"]] == [True, False]
    code, printed, err = run(["sweep", str(path), "-q"], capsys)
    assert (code, err) == (3, "")
    assert len(printed.splitlines()) == 1


def test_a_cells_files_are_its_command_s_own(gathered):
    made, out = gathered
    row = made.cells[0]
    home = Path(out) / "cells" / row.cell
    assert {path.name for path in home.iterdir()} == {".lock", "cell.json", "log.txt", "out"}
    assert [path.name for path in (home / "out").iterdir()] == ["locate.json"]  # no figures
    assert (home / "log.txt").read_text("utf-8").startswith(f"$ melens {' '.join(row.argv)}")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # trl's own, of transformers
def test_every_command_that_measures_a_model_is_a_cell(folders, tmp_path):
    """Two of them refuse this model and these texts by themselves."""
    import melens
    from melens.cli.app import group
    from melens.sweeping.cells import NO_RESULT

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w1 w2", "completion": "w4 w5 w6"}\n' * 4, "utf-8")
    own = {
        "metric": {"name": "effective_rank"},
        "patch": {"clean": "w1 w2 w3", "corrupted": "w1 w5 w3", "metric": "loss"},
        "eval": {"n": 2},
        "tune": {"n": 40},
        "long-context": {"lengths": "32", "depths": "0.5", "seeds": 1},
        "check": {"budget": "quick"},
        "quantise": {"scheme": "w8a8-token", "control-seeds": "none"},
        "reach": {"token": [1]},
        "finetune": {"data": str(rows), "steps": 1, "chat": False},
    }
    names = [name for name in group().commands if name not in NO_RESULT]
    config = {
        "model": str(folders["llama"]),
        "n-seq": 2,
        "length": 16,
        "bos": True,
        "run": [{"command": name, **own.get(name, {})} for name in names],
    }
    made = melens.sweep(config, out=tmp_path / "out", quiet=True)
    failed = {row.command: row.error for row in made.cells if row.status != "done"}
    assert set(failed) == {"long-context", "tune"}, failed
    assert "cannot write the number" in failed["long-context"]
    kinds = [row.kind for row in made.cells if row.status == "done"]
    assert len(kinds) == len(set(kinds)) == len(names) - 2


def test_the_live_table_counts_by_model(tmp_path, config, folders):
    import io

    from rich.console import Console

    from melens.sweeping.cells import cells_of
    from melens.sweeping.config import read_config
    from melens.sweeping.watching import Board, table_of_board
    from melens.sweeping.work import CELLS, _write_state

    config["model"] = [str(folder) for folder in folders.values()]
    cells = cells_of(read_config(config))
    board = Board(tmp_path, cells, "now")
    _write_state(tmp_path / CELLS / cells[0].id, {"status": "running", "session": "now"})
    _write_state(tmp_path / CELLS / cells[1].id, {"status": "running", "session": "earlier"})
    _write_state(tmp_path / CELLS / cells[2].id, {"status": "failed", "session": "now"})
    _write_state(tmp_path / CELLS / cells[3].id, {"status": "done", "session": "earlier"})
    board.update()
    text = io.StringIO()
    Console(file=text, width=200).print(table_of_board(board))
    lines = text.getvalue().splitlines()
    assert lines[0].split() == ["model", "done", "running", "failed", "waiting"]
    assert [line.split()[1:] for line in lines[1:4]] == [list("0111"), list("1002"), list("1113")]
    assert lines[4].startswith("about ")
