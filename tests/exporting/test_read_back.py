"""What was kept is read back only where it is what it says, whole, and of these weights."""

from __future__ import annotations

import json
import shutil

import planted_report
import pytest
import torch

from melens.checking.keeping import Keeper
from melens.errors import ResultError
from melens.locating import locate
from melens.models import load


@pytest.fixture
def kept(tmp_path):
    """A keeper with two finished stages, and their results."""
    report = planted_report.report("smollm2")
    keeper = Keeper(tmp_path, "0123")
    results = {name: report.result(name) for name in ("locate", "describe")}
    for name, result in results.items():
        keeper.write(name, result, 1.5)
    assert {name: keeper.read(name) for name in results} == {
        name: (result, 1.5) for name, result in results.items()
    }
    return keeper, tmp_path / "stages"


def test_a_stage_of_another_kind_is_measured_again(kept):
    keeper, folder = kept
    for ending in ("json", "key"):  # both files of a whole stage, under another's name
        shutil.copy(folder / f"describe.{ending}", folder / f"locate.{ending}")
    assert keeper.read("locate") is None
    assert keeper.read("describe") is not None
    shutil.copy(folder / "locate.json", folder / "describe.json")
    (folder / "describe.json").write_text((folder / "describe.json").read_text() + " ")
    assert keeper.read("describe") is None


def test_a_stage_that_was_changed_by_hand_is_measured_again(kept):
    keeper, folder = kept
    path = folder / "locate.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "me_layer": 3}))
    assert keeper.read("locate") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        "\x00",
        '{"key": "0123"}',
        '{"key": "0123", "seconds": 1.5, "schema": "melens/check-stage/1"}',
    ],
)
def test_a_damaged_key_is_measured_again(kept, text):
    keeper, folder = kept
    (folder / "locate.key").write_text(text)
    assert keeper.read("locate") is None


@pytest.mark.parametrize(
    "seconds",
    ["1", -1, float("nan"), float("inf"), 10**400, None, [1], {}],
    ids=lambda x: str(x)[:5],
)
def test_a_key_whose_seconds_are_none_is_measured_again(kept, seconds):
    keeper, folder = kept
    head = json.loads((folder / "locate.key").read_text())
    (folder / "locate.key").write_text(json.dumps({**head, "seconds": seconds}))
    assert keeper.read("locate") is None


def test_bytes_that_are_no_text_are_measured_again(kept):
    keeper, folder = kept
    (folder / "locate.key").write_bytes(b"\xff\xfe{")
    assert keeper.read("locate") is None
    (folder / "describe.json").write_bytes(b"\xff\xfe{")
    assert keeper.read("describe") is None


def test_a_me_layer_of_other_weights_is_refused_by_lm_eval(make_tiny, tokenizer, tmp_path):
    """`located=` names a file: it must be of the very weights that are edited."""
    pytest.importorskip("lm_eval", reason="runs where the extra 'eval' is installed")
    from planted import batch, plant

    from melens.evaluating.harness.model import MelensLM

    planted = plant("llama", "single", 1)
    planted.model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    from melens.batches import Batch

    me = locate(load(tmp_path / "a", device="cpu"), [Batch.of(batch(planted))])
    (tmp_path / "me.json").write_text(me.to_json(), "utf-8")
    other = plant("llama", "single", 2)
    other.model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    located = {"device": "cpu", "located": str(tmp_path / "me.json")}
    for edit in ({"edit": "zero"}, {"edit": "wemask", "mask_rate": 0.5}):
        with pytest.raises(ResultError, match="the model at hand has weights"):
            MelensLM(str(tmp_path / "b"), **located, **edit)


def test_an_edit_refuses_a_me_layer_of_another_model(make_tiny, tiny, tokenizer):
    from melens.interventions import drop_key, residual_set, wemask
    from melens.results import MELayer

    ids = torch.arange(5, 29).view(2, 12)
    other = load(make_tiny("llama", seed=1), tokenizer=tokenizer)
    me, theirs = locate(tiny, ids), locate(other, ids)
    saved = MELayer.from_json(theirs.to_json())
    for edit in (
        lambda me: wemask(tiny, me, layers=(1,), rate=0.5, tokens="first"),
        lambda me: drop_key(tiny, me, layers=(1,), tokens="first"),
        lambda me: residual_set(tiny, 1, tokens=me, dims=[0]),
    ):
        both = f"weights {theirs.run.weights}.* has weights {me.run.weights} "
        with pytest.raises(ResultError, match=both) as said, edit(saved):
            pass
        assert "\n" not in str(said.value)
    with torch.no_grad(), wemask(tiny, me, layers=(1,), rate=0.5, tokens="first"):
        tiny(ids)
    deeper = saved.model_copy(update={"n_layers": me.n_layers + 1})
    plain = make_tiny("llama")
    with pytest.raises(ResultError, match=r"was located on .* the LlamaForCausalLM at hand"):  # noqa: SIM117
        with wemask(plain, deeper, layers=(1,), rate=0.5, tokens="first"):
            pass
