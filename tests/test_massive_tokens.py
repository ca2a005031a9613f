"""Which tokens an edit touches: those that are massive in the pass, wherever their id stands."""

from __future__ import annotations

import pytest
import torch
from planted import FAMILIES, KINDS, batch, plant


def _bridged(planted, tokenizer):
    from melens.models import load

    return load(planted.model, tokenizer=tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("none", "final-growth")])
def test_the_rule_finds_the_planted_tokens_and_no_other(family, kind, tokenizer):
    """Closed form: the planted ids, at the layer where they emerge, alone or in other company."""
    import melens
    from melens.batches import Batch
    from melens.interventions.massive import massive_tokens

    for seed in range(2):
        planted = plant(family, kind, seed)
        model = _bridged(planted, tokenizer)
        me = melens.locate(model, [Batch.of(batch(planted))])
        ids = batch(planted, seed=5)
        padded = Batch.pad([row[: 20 + 9 * i].tolist() for i, row in enumerate(ids)])
        for given in (Batch.of(ids), padded, Batch.of(ids[:1, :7])):
            ((marks, sizes),) = massive_tokens(model, me, [given])
            wanted = torch.isin(given.ids, torch.tensor(planted.truth.token_ids)) & given.mask
            assert torch.equal(marks, wanted), (seed, me.me_layer, sizes[0])
