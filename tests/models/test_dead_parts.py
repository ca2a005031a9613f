"""Parts that write exactly nothing give zeros; entries beyond float32's squares are said."""

from __future__ import annotations

import pytest
import torch
from planted import batch, plant
from planted_causes import plant_cause

from melens.batches import Batch
from melens.errors import ContractError
from melens.isolating import isolate
from melens.locating import locate
from melens.models import load

TEXTS = [Batch.of(batch(plant("llama", "single", 0), n=3, length=14, seed=0))]


@pytest.mark.parametrize("part", ["down_proj", "up_proj"])
def test_a_layer_whose_ffn_writes_nothing_has_no_share(part):
    made = plant_cause("neuron", 0).model
    getattr(made.model.layers[0].mlp, part).weight.data.zero_()
    model = load(made)
    found = isolate(model, locate(model, TEXTS), TEXTS, layer=0)
    assert found.layer == 0
    rows = [row for row in found.neurons if row.layer == 0]
    assert rows
    assert {(row.share, row.left) for row in rows} == {(0.0, 1.0)}
    direction = found.direction
    assert direction.explained == direction.predicted == direction.eigenvalue == 0.0
    assert direction.massive == direction.concentration == 0.0
    assert set(found.gains.left) == {0.0}


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e30), (torch.float32, 1e25)])
def test_entries_whose_squares_do_not_fit_are_named(make_tiny, tokenizer, dtype, scale):
    model = make_tiny("llama", dtype=dtype)
    model.model.embed_tokens.weight.data.mul_(scale)
    with pytest.raises(ContractError, match=r"block 0 leaves entries of .*do not fit into float32"):
        load(model, tokenizer=tokenizer)
