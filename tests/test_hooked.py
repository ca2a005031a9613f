"""HookedTransformer of TransformerLens 3.9, in an environment of its own: make test-hooked."""

from __future__ import annotations

import pytest
import torch

from melens.batches import Batch
from melens.capture import ChannelMax, stream

pytestmark = pytest.mark.hooked
SITE = "blocks.1.hook_resid_post"
KINDS = {
    "layer norm": {"normalization_type": "LN", "act_fn": "gelu"},
    "gated, rms, rotary": {
        "normalization_type": "RMS",
        "act_fn": "silu",
        "gated_mlp": True,
        "final_rms": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
    },
    "parallel": {"normalization_type": "LN", "act_fn": "gelu", "parallel_attn_mlp": True},
}


@pytest.fixture(params=list(KINDS))
def hooked(request):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=8,
        d_model=32,
        n_ctx=64,
        d_head=8,
        n_heads=4,
        d_mlp=64,
        d_vocab=64,
        seed=0,
        device="cpu",
        **KINDS[request.param],
    )
    return HookedTransformer(config)


@pytest.fixture
def ids():
    drawn = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(7))
    drawn[:, 0] = 1
    return drawn


def _plant(model, layer, dim, token):
    """One neuron that only ``token`` fires: it alone has the marker coordinate 3."""
    with torch.no_grad():
        model.embed.W_E[:, 3] = 0.0
        model.embed.W_E[token, 3] = 8.0
        for block in model.blocks:
            block.attn.W_O[..., 3] = 0.0
            block.mlp.W_out[:, 3] = 0.0
        mlp = model.blocks[layer].mlp
        for name in ("W_in", "W_gate"):
            if (weight := getattr(mlp, name, None)) is not None:
                weight[:, 0] = 0.0
                weight[3, 0] = 10.0
        if hasattr(mlp, "b_in"):
            mlp.b_in[0] = 0.0 if hasattr(mlp, "W_gate") else -10.0
        mlp.W_out[0] = 0.0
        mlp.W_out[0, dim] = 200.0


def test_streaming_equals_the_cache(hooked, ids):
    seen = ChannelMax()
    stream(hooked, [Batch.of(ids[:1]), Batch.of(ids[1:])], {SITE: seen})
    _, cache = hooked.run_with_cache(ids)
    torch.testing.assert_close(seen.result(), cache[SITE].abs().amax((0, 1)), rtol=1e-5, atol=1e-6)


def test_locating_finds_nothing_in_a_random_model_and_the_planted_layer_in_another(hooked, ids):
    from melens.locating import locate

    assert locate(hooked, [Batch.of(ids)]).verdict == "none"
    _plant(hooked, layer=4, dim=7, token=1)
    found = locate(hooked, [Batch.of(ids)])
    assert (found.verdict, found.me_layer) == ("single", 4)
    assert (found.massive[0].token_id, found.massive[0].dim) == (1, 7)
    _, cache = hooked.run_with_cache(ids)
    assert found.profile[4].max == pytest.approx(
        cache["blocks.4.hook_resid_post"].abs().max().item(), rel=1e-5
    )


def test_padding_on_either_side_gives_the_same(hooked, ids):
    from melens.locating import locate

    rows = [ids[0].tolist(), ids[1, :13].tolist()]
    left, right = (locate(hooked, [Batch.pad(rows, side=side)]) for side in ("left", "right"))
    assert [row.max for row in left.profile] == pytest.approx(
        [row.max for row in right.profile], rel=1e-5
    )


def test_folded_gains_are_refused(hooked):
    from melens.errors import FoldedWeightsError
    from melens.models import gains
    from melens.models.anatomy import is_folded

    assert gains(hooked, 0)["ln1"].shape == (32,)
    assert not is_folded(hooked)
    hooked.cfg.normalization_type += "Pre"
    assert is_folded(hooked)
    with pytest.raises(FoldedWeightsError, match="from_pretrained_no_processing"):
        gains(hooked, 0)


def test_the_token_and_what_it_does_are_measured(hooked, ids):
    """It shows no norm outputs, which the results say; all else is there."""
    from melens.locating import locate
    from melens.measuring import attention, measure_all
    from melens.metrics import METRICS

    _plant(hooked, layer=4, dim=7, token=1)
    batch = Batch.of(ids)
    located = locate(hooked, [batch])
    made = measure_all(hooked, located, [batch])
    assert made.describe.energy["1"] > 0.9
    assert made.describe.coordinates[0].dim == 7
    assert made.describe.norms == ()
    assert "no such hook" in made.describe.missing[0]
    assert [line.split(":")[0] for line in made.collapse.missing] == ["ln1"]
    names = ["blocks.5.attn.hook_q", "blocks.5.attn.hook_pattern"]
    _, cache = hooked.run_with_cache(ids, names_filter=names)
    rank = METRICS["effective_rank"].fn
    ranks = [[rank(row[:, head]).item() for head in range(4)] for row in cache[names[0]]]
    kept, _ = made.collapse.curve("q")
    assert kept[5] == pytest.approx(sum(map(sum, ranks)) / 12, rel=1e-5)
    assert made.sinks.attention_to_token[5] == pytest.approx(
        cache[names[1]][..., 0].mean().item(), rel=1e-5
    )
    shown = attention(hooked, located, [batch], layers=[5], heads=[2])
    assert shown.heads[0].rows[3][0] == pytest.approx(cache[names[1]][0, 2, 3, 0].item(), abs=1e-4)
    assert shown.massive_positions == (0,)
