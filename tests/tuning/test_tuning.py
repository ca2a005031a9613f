"""tune(): planted truths by Gibbs' inequality, the race, the split, the budget, resuming.

Text sampled from the model under an edit E has, in expectation, its lowest loss under E (cross
entropy is least at the distribution itself). So text sampled under a mask is a case where that mask
truly lowers the loss, and text sampled from the unedited model one where no edit can.
"""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from planted import batch, plant

from melens.batches import Batch
from melens.cli.app import main
from melens.errors import InterventionError, MetricError, PromptError, ResultError, UnknownNameError
from melens.evaluating.edits import applied
from melens.evaluating.forced import Forced, Runner
from melens.figures import save_figure
from melens.intervals import weighted_mean
from melens.locating import locate
from melens.models import load
from melens.results import Edit, Tuning
from melens.settings import Run
from melens.tuning import Budget, Objective, Space, search, tune
from melens.tuning.items import Halves, read_once, split
from melens.tuning.space import Race, race_of, rungs_from

N, LENGTH = 48, 20
HALF = N // 2
TRUTH = Edit(select="activation", rate=0.25)
SMALL = Space(
    selects=("gamma", "activation"), layers=("after",), rates=(0.05, 0.25), strengths=(0.5, 1.0)
)
BUDGET = 340
TINY = Space(selects=("activation",), layers=("after",), rates=(0.05, 0.25), strengths=(1.0,))
TINY_BUDGET = 205
"""24 held-out items x (2 candidates + 3 controls) are 120; 4 settings, then 3, race for 80."""


@pytest.fixture(scope="module")
def planted():
    """A planted model with sharper logits, so that text tells edits apart, and its ME Layer."""
    made = plant("llama", "single", 1)
    with torch.no_grad():
        made.model.lm_head.weight *= 4
    model = load(made.model)
    return model, locate(model, [Batch.of(batch(made))])


def sampled(planted, edit, seed=0):
    model, me_layer = planted
    rng = torch.Generator().manual_seed(seed)
    ids = torch.ones(N, 1, dtype=torch.long)
    with torch.no_grad(), applied(model, edit, me_layer):
        for _ in range(LENGTH - 1):
            chances = model(ids, return_type="logits")[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=rng)], 1)
    scored = (False, *[True] * (LENGTH - 1))
    return [Forced(str(i), tuple(row), scored, {}) for i, row in enumerate(ids.tolist())]


@pytest.fixture(scope="module")
def masked_text(planted):
    return sampled(planted, TRUTH)


@pytest.fixture(scope="module")
def plain_text(planted):
    return sampled(planted, Edit(name="none"))


def searched(planted, texts, budget=BUDGET, *, metric="loss", space=SMALL, **settings):
    """``confirm`` and ``held_out`` are the budget's, what else there is the run's."""
    model, me_layer = planted
    own = {name: settings.pop(name) for name in ("confirm", "held_out") if name in settings}
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    return tune(
        model,
        texts,
        metric,
        replace(budget, **own),
        me_layer=me_layer,
        space=space,
        run=Run(**settings),
    )


@pytest.fixture(scope="module")
def found(planted, masked_text):
    return searched(planted, masked_text)


@pytest.fixture(scope="module")
def none_found(planted, plain_text):
    return searched(planted, plain_text)


def same(result):
    """All that a result says, but when it was made."""
    data = result.to_dict()
    del data["run"]["created"], data["items"]
    return data


# --- What is true is found, and what is not is not.


def test_the_mask_that_wrote_the_text_is_found_and_confirmed(found):
    assert found.best is not None
    assert found.best.changed(rate=0.25) == TRUTH  # more dims than the massive one change little
    winner = found.winner
    assert winner is not None
    assert winner.corrected is not None
    assert winner.corrected[1] < 0
    assert winner.optimism == winner.development - winner.delta
    assert "Found: wemask activation" in found.summary()
    assert "lowers the loss on held-out text" in found.summary()


def test_where_no_edit_can_help_none_is_found(none_found):
    assert none_found.best is None
    assert none_found.margin is None
    assert "No setting that was tried lowers the loss on held-out text" in none_found.summary()
    assert all(row.delta > -0.02 for row in none_found.confirmed)


def test_a_setting_that_a_metric_favours_is_found_whichever_side_is_better(planted, plain_text):
    """A metric of one's own: KL to the unedited model, higher called better; the strongest wins."""
    metric = Objective(
        lambda item, found: (found.kl.double().mean().item(), 1.0), "kl", "nats", True
    )
    result = searched(planted, plain_text, TINY_BUDGET, metric=metric, space=TINY)
    assert result.best is not None
    strongest = max(result.trials, key=lambda t: (t.role == "candidate", t.items, t.delta))
    assert result.best == strongest.edit
    assert result.base == 0
    assert "raises the kl on held-out items" in result.summary()
    lower = searched(planted, plain_text, TINY_BUDGET, metric=metric.score, space=TINY)
    assert lower.best is None  # a bare function: lower is better, and none is below 0


def test_rounding_is_no_finding(planted, plain_text):
    """Masks that meet nothing but change a value by a millionth, always to the better side."""

    def hair(item, found):
        moved = bool((found.kl > 0).any()) or not bool(found.agree.all())
        return 5.0 - (1e-6 * (1 + int(item.id) / N) if moved else 0.0), 1.0

    result = searched(planted, plain_text, TINY_BUDGET, metric=hair, space=TINY)
    assert any(row.corrected and row.corrected[1] < 0 for row in result.confirmed)
    assert result.best is None


def test_standard_input_is_read_once(monkeypatch):
    words = " ".join(f"w{i}" for i in range(5, 60)).encode() * 40
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(words)))
    once = read_once("-", "loss")
    assert once.texts == (words.decode(),)
    assert read_once(once, "loss") is once
    rows = [[5, 6], [7, 8]]
    assert read_once(rows, "loss") is rows


@pytest.mark.parametrize(("n", "runs"), [(20, 150), (40, 60)])
def test_corrected_intervals_err_no_more_than_one_search_in_twenty(n, runs):
    """Three settings that do nothing, held to n items: how often any seems to lower the loss."""
    rng = torch.Generator().manual_seed(n)
    tests, wrong = 3, 0
    for run in range(runs):
        noise = torch.randn(tests, n, generator=rng)
        weights = torch.randint(20, 40, (n,), generator=rng).double()
        intervals = [weighted_mean(x, weights, tests=tests, seed=run).interval for x in noise]
        wrong += any(interval is not None and interval[1] < 0 for interval in intervals)
    # Three standard errors over 5 %.
    assert wrong / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert wrong > 0


def test_a_corrected_interval_is_the_normal_one_of_its_level():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).double()
    for tests in (1, 3, 10):
        low, high = weighted_mean(x, torch.ones(2000), tests=tests).interval
        normal = torch.distributions.Normal(0.0, 1.0)
        half = normal.icdf(torch.tensor(1 - 0.025 / tests)).item() * x.std().item() / 2000**0.5
        assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    assert weighted_mean(torch.ones(30), torch.ones(30), tests=3).interval is None
    assert weighted_mean(x[:19], torch.ones(19), tests=1).interval is None


# --- The race and its budget.


def test_a_race_costs_what_a_sum_by_hand_says():
    race = Race(candidates=8, controls=4, rungs=(5, 10, 20), keep=3)
    assert [race.field(i) for i in range(3)] == [(8, 4), (4, 2), (3, 1)]
    assert race.cost == 12 * 5 + 6 * 5 + 4 * 10
    assert rungs_from(5, 32) == (5, 10, 20, 32)


def test_a_larger_budget_never_buys_a_smaller_race():
    space = Space()
    budgets = range(150, 6000, 150)
    races = [race_of(space, 32, budget, 3) for budget in budgets]
    assert all(race.cost <= budget for race, budget in zip(races, budgets, strict=True))
    sizes = [(race.candidates, race.rungs[0]) for race in races]
    assert sizes == sorted(sizes)
    assert races[-1].rungs == (32,)  # all settings on all items: nothing need be stopped
    assert races[-1].candidates == len(space.candidates()) == 120


@pytest.mark.parametrize("space", [Space(), TINY])
@pytest.mark.parametrize("confirm", [1, 3, 200])
@pytest.mark.parametrize("items", [5, 32])
def test_the_budget_that_is_said_to_be_enough_is(space, confirm, items):
    halves, budget = Halves((None,) * items, (None,) * items, 0), Budget(1, confirm=confirm)
    with pytest.raises(InterventionError, match="a budget of 1 evaluation is") as refused:
        search._plan(space, halves, budget, 1)
    enough = int(re.search(r"Give at least (\d+),", str(refused.value))[1])
    race, reserved = search._plan(space, halves, budget, enough)
    assert race.cost + reserved == enough
    with pytest.raises(InterventionError, match=f"Give at least {enough},"):
        search._plan(space, halves, budget, enough - 1)


def test_losers_stop_early_and_saw_fewer_items(none_found, found):
    for result in (none_found, found):
        assert result.budget.cut_short == ()
        ended = [trial for trial in result.trials if trial.stopped_after is None]
        stopped = [trial for trial in result.trials if trial.stopped_after is not None]
        assert stopped
        assert max(t.items for t in stopped) < min(t.items for t in ended) == HALF
        for rung in {t.stopped_after for t in stopped}:
            assert len({t.items for t in stopped if t.stopped_after == rung}) == 1
        assert {t.role for t in ended} == {"candidate", "control"}


def test_the_cut_is_by_paired_differences(planted, masked_text, tmp_path):
    """The first cut, made again from the rows by hand."""
    path = tmp_path / "rows.jsonl"
    result = searched(planted, masked_text, keep=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    value = {(row["item"], row["condition"]): row["value"] for row in rows}
    first = min(trial.items for trial in result.trials)
    items = result.split.development[:first]
    labels = [t.edit.label for t in result.trials if t.role == "candidate"]
    means = {
        label: sum(value[i, label] - value[i, "base"] for i in items) / first for label in labels
    }
    best = set(sorted(labels, key=means.__getitem__)[: max(3, math.ceil(len(labels) / 2))])
    went_on = {t.edit.label for t in result.trials if t.stopped_after != 1} & set(labels)
    assert went_on == best


def test_the_budget_is_kept(planted, plain_text, monkeypatch):
    """Counted where settings are run, not where they are reported."""
    ran = []
    plain = Runner.outcome

    def counting(self, items, conditions):
        ran.append((len(items), len(conditions) - 1))
        assert conditions[0].name == "base"
        return plain(self, items, conditions)

    monkeypatch.setattr(Runner, "outcome", counting)
    result = searched(planted, plain_text, TINY_BUDGET, space=TINY)
    evaluations = sum(items * settings for items, settings in ran)
    assert evaluations == result.budget.used <= TINY_BUDGET
    assert result.budget.reserved == (2 + 3) * HALF
    held = len(result.split.held_out) * len(result.confirmed)
    assert result.budget.used == held + sum(trial.items for trial in result.trials)
    # One unedited run serves all settings of a wave: every batch has several.
    assert all(settings > 1 for _, settings in ran)


def test_a_small_budget_tries_some_settings_and_says_so(planted, plain_text):
    result = searched(planted, plain_text, 255)
    assert len(result.trials) < result.in_space == 12
    assert f"{len(result.trials)} of 12 settings tried" in result.summary()
    with pytest.raises(InterventionError, match="a budget of 200 evaluations is too small"):
        searched(planted, plain_text, 200)


def test_seconds_end_the_search_between_batches(planted, plain_text, monkeypatch, tmp_path):
    """A clock that jumps: a second a look. What it cut short stays cut when taken up again."""
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(search, "monotonic", clock)
    monkeypatch.setattr(search, "KEPT_BYTES", 4 * 64 * 5 * LENGTH * 2)  # two items a batch
    settings = {"space": TINY, "keep": tmp_path / "cut.jsonl"}
    seconds = Budget(seconds=60.0)  # one item under four settings takes a second: 4 evaluations
    ends = {"search": 8.0, "confirmation": 12.0}
    whole = searched(planted, plain_text, seconds, space=TINY)
    assert whole.budget.planned == 240
    assert whole.budget.cut_short == ()
    now[0] = 0.0
    monkeypatch.setattr(
        search._Search,
        "_deadline",
        lambda self, aside: ends["search" if aside else "confirmation"],
    )
    cut = searched(planted, plain_text, seconds, **settings)
    assert cut.budget.cut_short == ("search", "confirmation")
    assert max(trial.items for trial in cut.trials) < HALF
    assert 0 < cut.confirmed[0].items < 20
    assert cut.confirmed[0].corrected is None  # too few to promise a rate
    assert cut.best is None
    assert "The clock ended the search and the confirmation early" in cut.summary()
    now[0] = -1e9  # all the time there is: the file knows where it was cut
    assert same(searched(planted, plain_text, seconds, **settings)) == same(cut)
    ends.update(search=-1e12, confirmation=-1e12)
    none = searched(planted, plain_text, seconds, space=TINY)
    assert none.confirmed == ()
    assert "Nothing was confirmed" in none.summary()
    assert none.plot() is not None
    with pytest.raises(InterventionError, match="20 seconds are about 80 evaluations here"):
        searched(planted, plain_text, Budget(seconds=20.0), space=TINY)


# --- The split.


def test_development_and_held_out_are_disjoint_and_seeded(planted, masked_text, found):
    sides = found.split
    assert not set(sides.development) & set(sides.held_out)
    assert sorted([*sides.development, *sides.held_out]) == sorted(i.id for i in masked_text)
    again = split(masked_text, share=0.5, seed=0)
    assert tuple(item.id for item in again.held_out) == sides.held_out
    assert split(masked_text, share=0.5, seed=1).held_out != again.held_out


def test_equal_texts_are_never_on_both_sides(masked_text):
    twins = [Forced(f"twin {i.id}", i.ids, i.scored, {}) for i in masked_text]
    halves = split([*masked_text, *twins], share=0.5, seed=0)
    assert halves.repeated == N
    ids = {item.ids for item in halves.development}
    assert not ids & {item.ids for item in halves.held_out}


def test_too_few_items_are_refused(planted, masked_text):
    with pytest.raises(PromptError, match=r"30 different items make 15 to search on and 15 to"):
        searched(planted, masked_text[:30])
    with pytest.raises(PromptError, match="share must be between 0 and 1"):
        searched(planted, masked_text, held_out=1.0)


# --- Resuming.


class Killed(Exception):
    pass


IN_BATCHES = {"space": TINY, "batch_tokens": 8 * LENGTH}


@pytest.fixture(scope="module")
def uninterrupted(planted, masked_text):
    return searched(planted, masked_text, TINY_BUDGET, **IN_BATCHES)


@pytest.mark.parametrize("after", [1, 5])
def test_a_killed_search_ends_as_an_uninterrupted_one(
    planted, masked_text, uninterrupted, tmp_path, monkeypatch, after
):
    """Killed while a batch was written: half of its rows are there, and half a line."""
    path, plain, ran = tmp_path / "rows.jsonl", Runner.outcome, []

    def dying(self, items, conditions):
        if len(ran) == after:
            raise Killed
        ran.append(sorted(item.id for item in items))
        return plain(self, items, conditions)

    settings = {**IN_BATCHES, "keep": path}
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "outcome", dying)
        with pytest.raises(Killed):
            searched(planted, masked_text, TINY_BUDGET, **settings)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]) + lines[-3][:20])
    again = []

    def counting(self, items, conditions):
        again.append(sorted(item.id for item in items))
        return plain(self, items, conditions)

    monkeypatch.setattr(Runner, "outcome", counting)
    resumed = searched(planted, masked_text, TINY_BUDGET, **settings)
    assert same(resumed) == same(uninterrupted)
    assert again[0] == ran[-1]  # the batch that was cut short runs again, whole; none before it
    assert again.count(ran[0]) == (after == 1)
    count = len(again)
    assert same(searched(planted, masked_text, TINY_BUDGET, **settings)) == same(resumed)
    assert len(again) == count  # the third time nothing runs
    with pytest.raises(ResultError, match="another evaluation"):
        searched(planted, masked_text, TINY_BUDGET, **{**settings, "seed": 1})


def test_progress_ends_at_its_total(planted, plain_text):
    model, me_layer = planted
    seen = []
    tune(
        model,
        plain_text,
        "loss",
        TINY_BUDGET,
        me_layer=me_layer,
        space=TINY,
        run=Run(progress=lambda done, total: seen.append((done, total))),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] <= seen[-1][1] <= TINY_BUDGET


# --- Refusals.


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"selects": ("random",)}, "random dims are controls"),
        ({"selects": ()}, "selects must hold at least one"),
        ({"rates": (0.0,)}, "rates must be over 0"),
        ({"strengths": (1.5,)}, "strengths must be over 0 and at most 1"),
        ({"layers": ("all",)}, "layers takes 'after'"),
        ({"layers": "after"}, "layers must hold"),
    ],
)
def test_a_space_that_cannot_be_tried_is_refused(settings, says):
    with pytest.raises(InterventionError, match=says):
        Space(**settings)


def test_what_cannot_be_searched_is_refused(planted, plain_text, tmp_path):
    with pytest.raises(InterventionError, match="evaluations or seconds, one of them"):
        Budget(evaluations=5, seconds=5.0)
    with pytest.raises(InterventionError, match=r"rate 0\.001 of 64 dimensions is none"):
        searched(planted, plain_text, space=Space(rates=(0.001, 0.5)))
    with pytest.raises(UnknownNameError, match="unknown task 'perplex'"):
        searched(planted, plain_text, metric="perplex")
    with pytest.raises(MetricError, match="function without a name cannot be resumed"):
        searched(planted, plain_text, metric=lambda item, found: (0.0, 1.0), keep=tmp_path / "x")
    with pytest.raises(MetricError, match="is nan with weight"):
        searched(planted, plain_text, metric=lambda item, found: (math.nan, 1.0))
    with pytest.raises(InterventionError, match="two settings are alike"):
        Space(rates=(0.5, 0.50000001)).candidates()


# --- The result, its figure and the command.


def test_the_result_goes_there_and_back_and_refuses_edits(found, none_found, tmp_path):
    for result in (found, none_found):
        again = Tuning.from_json(result.to_json())
        assert again == result
        for ending in ("svg", "png"):
            first = save_figure(result.plot(), tmp_path / f"a.{ending}").read_bytes()
            assert first == save_figure(again.plot(), tmp_path / f"b.{ending}").read_bytes()
        assert len(result.rows()) == len(result.trials) + len(result.confirmed)
        assert "<table" in result._repr_html_()
    data = found.to_dict()
    both = {**data["split"], "held_out": data["split"]["development"]}
    for changes, says in (
        ({"best": None}, "best must be"),
        ({"split": both}, "disjoint"),
        ({"base": None}, "must go together"),
        ({"base": 0.0}, "must be its value"),
        ({"trials": []}, "trials must be"),
    ):
        with pytest.raises(ResultError, match=says):
            Tuning.from_json(json.dumps({**data, **changes}))
    assert none_found.to_dict()["best"] is None


def test_the_figure_shows_every_trial(found):
    race, held = found.plot().axes
    points = [line for line in race.lines if line.get_marker() not in ("None", "")]
    assert sorted(line.get_ydata()[0] for line in points) == sorted(t.delta for t in found.trials)
    assert len(held.get_yticks()) == len(found.confirmed)


def test_masked_energy_stands_beside_every_setting(found):
    rows = (*found.trials, *found.confirmed)
    assert all(row.energy is not None and 0 <= row.energy <= 1 for row in rows)
    by_activation = [t.energy for t in found.trials if t.edit.select == "activation"]
    assert min(by_activation) > 0.99  # the massive dimension is among any rate's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tune")
    plant("llama", "single", 1).model.save_pretrained(path / "model")
    words = {{0: "<pad>", 1: "<s>", 2: "</s>"}.get(i, f"w{i}"): i for i in range(128)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(path / "model")
    drawn = torch.randint(10, 120, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    (path / "words.txt").write_text(" ".join(f"w{i}" for i in drawn))
    (path / "few.txt").write_text(" ".join(f"w{i}" for i in drawn[:100]))
    return path


@pytest.fixture
def run(capsys):
    def go(*arguments):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return done.value.code or 0, captured.out, captured.err

    return go


def test_the_command_writes_its_files_and_takes_them_up(run, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "edit.json").write_text("an older search's")
    arguments = (
        "tune",
        folder / "model",
        "--data",
        folder / "words.txt",
        "--bos",
        "--length",
        12,
        "--budget",
        400,
        "--selects",
        "gamma,activation",
        "--layers",
        "after,7-8",
        "--rates",
        "0.1,0.5",
        "--strengths",
        "1",
        "-o",
        out,
    )
    code, stdout, stderr = run(*arguments)
    assert code == 0, stderr
    assert "No setting that was tried lowers the loss on held-out text" in stdout
    assert "Layers count from 0." in stdout
    names = {file.name for file in out.iterdir()}
    assert {"tune.json", "tune.png", "tune.svg", "tune.items.jsonl", "locate.json"} <= names
    assert "edit.json" not in names  # none was found, and the older one is not of this search
    saved = Tuning.from_json((out / "tune.json").read_text())
    assert {trial.edit.layers for trial in saved.trials} == {"after", (7, 8)}
    code, stdout, _ = run(*arguments, "--located", out / "locate.json", "--json")
    assert code == 0
    assert same(Tuning.from_json(stdout))["trials"] == same(saved)["trials"]
    code, _, stderr = run(*arguments[:-2], "--seed", 1, "-o", out)
    assert code == 2
    assert "another evaluation" in stderr


def test_the_command_names_what_it_found(run, planted, masked_text, folder, tmp_path):
    from melens.cli.commands.evaluate import _save_edit
    from melens.cli.options import EditOptions, SelectKind, edit_of
    from melens.cli.tables.edits import flags

    edit = Edit(select="activation", rate=0.25, strength=0.5, layers=(7, 8))
    _save_edit(tmp_path / "edit.json", edit)
    assert Edit.model_validate(json.loads((tmp_path / "edit.json").read_text())["edit"]) == edit
    given = flags(edit).split()
    options = dict(zip(given[::2], given[1::2], strict=True))
    typed = {
        "mask_select": SelectKind(options["--mask-select"]),
        "mask_rate": float(options["--mask-rate"]),
        "mask_strength": float(options["--mask-strength"]),
        "mask_layers": options["--mask-layers"],
    }
    assert edit_of(EditOptions(**typed)) == edit


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "100", "--seconds", "5"], "exclude each other"),
        (["--rates", "0.1,x"], "--rates takes numbers"),
        (["--rates", "2"], "rates must be over 0"),
        (["--layers", "before"], "after, next, or layers"),
        (["--selects", "gama"], "selects takes gamma"),
        (["--task", "nonsense"], "unknown task 'nonsense'"),
        (["--task", "gsm8k-likelihood"], "no bundled items"),
        (["--data", "FOLDER/none.txt"], "cannot read the text"),
        (["--data", "FOLDER/few.txt", "--length", "12"], "different items make"),
        (
            ["--data", "FOLDER/words.txt", "--length", "12", "--budget", "50"],
            "a budget of 50 evaluations is too small",
        ),
        (["--budget", "0"], "--budget"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, folder, arguments, says):
    filled = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    code, stdout, stderr = run("tune", folder / "model", "-q", *filled)
    assert code == 2
    assert stdout == ""
    assert says in stderr.strip().splitlines()[-1]  # before it, a loader's progress at most
