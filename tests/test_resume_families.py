"""Families whose masks, positions or biases are built again for every batch: resumed and edited."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MptConfig, XGLMConfig

from melens.batches import Batch
from melens.errors import InterventionError
from melens.interventions import drop_key
from melens.models import load
from melens.patching import patch
from melens.resume import Resumable

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 64}
CONFIGS = {
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=3, n_head=4, **ENDS),
    "xglm": lambda: XGLMConfig(
        d_model=32, ffn_dim=64, num_layers=3, attention_heads=4, max_position_embeddings=64, **ENDS
    ),
    "mpt": lambda: MptConfig(d_model=32, n_layers=3, n_heads=4, max_seq_len=64, **ENDS),
    "falcon": lambda: FalconConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **ENDS
    ),
}
IDS = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(3))


def plain(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


@pytest.mark.parametrize(
    "rows", [1, 2, 4]
)  # 4 rows are as many as heads: no shape tells them apart
@pytest.mark.parametrize("family", CONFIGS)
def test_three_variants_resume_as_three_full_runs(family, rows, tokenizer):
    model = load(plain(family), tokenizer=tokenizer)
    mask = torch.ones(rows, 10, dtype=torch.bool)
    mask[0, 7:] = False
    run = Resumable(model, Batch.of(IDS[:rows], mask))
    variants = [run.resid_pre(1) * scale for scale in (1.0, 0.5, -1.0)]
    found = run.run(1, torch.cat(variants)).chunk(3)
    for variant, resumed in zip(variants, found, strict=True):
        seen = []
        hooks = [
            ("blocks.1.hook_resid_pre", lambda x, hook, variant=variant: variant),
            ("blocks.2.hook_resid_post", lambda x, hook, seen=seen: seen.append(x)),
        ]
        with model.hooks(fwd_hooks=hooks):
            model(IDS[:rows], attention_mask=mask.long(), use_cache=False)
        torch.testing.assert_close(resumed[mask], seen[0][mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_patching_equals_a_hooked_sweep(family, tokenizer):
    model = load(plain(family), tokenizer=tokenizer)
    clean, corrupted = IDS[:1], IDS[1:2]
    found = patch(model, Batch.of(clean), Batch.of(corrupted), sites=("resid_post",), metric="loss")
    _, cache = model.run_with_cache(clean)
    values = torch.tensor(found.values["resid_post"]).squeeze()
    for layer in range(3):
        for column in (0, 4, 9):
            source = cache[f"blocks.{layer}.hook_resid_post"][:, column]

            def edit(x, hook, column=column, source=source):
                x = x.clone()
                x[:, column] = source
                return x

            with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", edit)]):
                logits = model(corrupted)
            expected = torch.nn.functional.cross_entropy(logits[0, :-1], corrupted[0, 1:])
            assert values[layer, column] == pytest.approx(expected.item(), rel=1e-4), (
                layer,
                column,
            )


@pytest.mark.parametrize("bridged", [True, False])
@pytest.mark.parametrize("family", ["mpt", "bloom"])
def test_a_dropped_key_is_one_that_nobody_sees(family, bridged, tokenizer):
    """Attention weights of the key are 0 for later tokens, 1 for itself; the rest sum to 1."""
    model = load(plain(family), tokenizer=tokenizer)
    rows = {}
    hooks = [
        (f"blocks.{n}.attn.hook_pattern", lambda x, hook: rows.update({hook.name: x}))
        for n in (1, 2)
    ]
    with drop_key(model, 0), model.hooks(fwd_hooks=hooks):
        edited = model(IDS)
    for pattern in rows.values():
        torch.testing.assert_close(pattern.sum(-1), torch.ones(4, 4, 10))
        assert (pattern[:, :, 1:, 0] == 0).all()
        assert (pattern[:, :, 0, 0] == 1).all()
    used = model if bridged else plain(family)
    with torch.no_grad(), drop_key(used, 0):
        cache, parts = None, []
        for chunk in IDS.split([4, 1, 5], dim=1):
            out = used.original_model if bridged else used
            made = out(chunk, past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            parts.append(made.logits)
    torch.testing.assert_close(torch.cat(parts, 1), edited, rtol=1e-4, atol=1e-5)


def test_a_mask_of_yes_and_no_hides_no_key_in_part(tokenizer):
    model = load(plain("mpt"), tokenizer=tokenizer)
    with (
        pytest.raises(InterventionError, match="hidden in part; use strength=1"),
        drop_key(model, 0, strength=0.5),
    ):
        model(IDS)
    with torch.no_grad():
        before = model(IDS)
        with drop_key(model, 0, strength=0.0):
            assert torch.equal(model(IDS), before)
