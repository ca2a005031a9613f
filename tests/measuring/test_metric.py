"""Any registered metric of the residual, against transformers' own hidden states."""

from __future__ import annotations

import json

import pytest
import torch

from melens.batches import Batch
from melens.cli.app import main
from melens.errors import UnknownNameError
from melens.measuring import metric_by_layer
from melens.metrics import METRICS
from melens.models import load
from melens.results import load_result


@pytest.mark.parametrize("name", ["effective_rank", "max_magnitude"])
def test_every_layer_is_the_metric_of_its_hidden_states(make_tiny, tokenizer, tmp_path, name):
    plain = make_tiny("llama")
    texts = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
    with torch.no_grad():
        states = [
            plain(torch.tensor([row]), output_hidden_states=True).hidden_states for row in texts
        ]
    found = metric_by_layer(load(plain, tokenizer=tokenizer), name, texts)
    for row in found.profile[:-1]:  # the last hidden state there has the final norm on it
        wanted = [METRICS[name].fn(each[row.layer + 1][0]).item() for each in states]
        assert row.values == pytest.approx(wanted, rel=1e-4)
        assert row.mean == pytest.approx(sum(wanted) / 2, rel=1e-4)
    path = tmp_path / "metric.json"
    path.write_text(found.to_json(), "utf-8")
    again = load_result(path)
    assert again == found
    assert again.plot().axes[0].get_ylabel() == f"{name} ({METRICS[name].unit})"
    assert "counted from 0" in again.summary()


def test_an_unknown_metric_is_refused_before_the_model_loads(capsys):
    with pytest.raises(UnknownNameError, match="effective_rank"):
        metric_by_layer("no/such-model", "efective_rank")
    with pytest.raises(SystemExit) as ended:
        main(["metric", "no/such-model", "efective_rank"])
    assert ended.value.code == 2
    assert "Did you mean 'effective_rank'?" in capsys.readouterr().err


def test_a_profile_that_no_run_made_is_refused(tiny):
    made = json.loads(metric_by_layer(tiny, "max_magnitude", [[5, 6, 7, 8]]).to_json())
    made["profile"][0]["values"] = [1.0, 2.0]
    with pytest.raises(ValueError, match="one value a sequence"):
        type(metric_by_layer(tiny, "max_magnitude", [[5, 6, 7, 8]])).model_validate(made)


def test_padding_side_and_batch_size_change_no_value(tiny):
    texts = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
    alone = metric_by_layer(tiny, "effective_rank", texts, batch_size=1)
    for side in ("left", "right"):
        padded = metric_by_layer(tiny, "effective_rank", [Batch.pad(texts, side=side)])
        for row, one in zip(padded.profile, alone.profile, strict=True):
            assert row.values == pytest.approx(one.values, rel=2e-4)
