"""Resuming in the middle gives what the full run gives, for every family and padding."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY

from melens.batches import Batch
from melens.errors import ContractError, PromptError, SiteError
from melens.interventions.context import pass_of
from melens.models import load
from melens.resume import Resumable

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(5))
ROWS = [IDS[0].tolist(), IDS[1, :7].tolist(), IDS[2, :10].tolist()]
BATCHES = {
    "one": Batch.of(IDS[:1]),
    "several": Batch.of(IDS),
    "right": Batch.pad(ROWS),
    "left": Batch.pad(ROWS, side="left"),
}
LINEAR = {"qwen3-next"}  # mixes tokens without keys and values in half its layers


def _logits(model, batch, hooks=()):
    mask = batch.mask.long() if batch.padded else None
    with torch.no_grad():
        return model.run_with_hooks(
            batch.ids, fwd_hooks=list(hooks), attention_mask=mask, use_cache=False
        )


def _add(start, value):
    def edit(x, hook):
        x = x.clone()
        x[:, start:] += value
        return x

    return edit


@pytest.mark.parametrize("family", list(TINY))
def test_resumed_runs_equal_full_runs_with_a_hook(family, bridged, tokenizer):
    model = bridged(family, tokenizer=tokenizer)
    for batch in BATCHES.values():
        _check_family(family, model, batch)


def _check_family(family, model, batch):
    run = Resumable(model, batch)
    assert run.suffixes == (family not in LINEAR)
    real, rows = batch.mask, len(batch)
    as_it_is = _logits(model, batch)
    for layer in (0, 1, 2):
        for start in (0, 5) if run.suffixes else (0,):
            clean = run.resid_pre(layer)[:, start:]
            both = run.logits(run.run(layer, torch.cat([clean, clean + 0.3]), start=start))
            site = f"blocks.{layer}.hook_resid_pre"
            for variant, value in zip(both.split(rows), (0.0, 0.3), strict=True):
                whole = _logits(model, batch, [(site, _add(start, value))]) if value else as_it_is
                expected = whole[:, start:]
                torch.testing.assert_close(
                    variant[real[:, start:]], expected[real[:, start:]], rtol=1e-5, atol=1e-6
                )


def test_gemma2_caps_its_logits(make_tiny, tokenizer):
    hf = make_tiny("gemma2")
    torch.nn.init.normal_(hf.lm_head.weight, 0, 5.0)  # far enough for the cap to bend them
    model = load(hf, tokenizer=tokenizer)
    run = Resumable(model, BATCHES["several"])
    assert run.model.cfg.output_logits_soft_cap > 0
    made = run.logits(run.resid_pre(run.n_layers))
    torch.testing.assert_close(made, _logits(model, BATCHES["several"]), rtol=1e-5, atol=1e-5)
    assert made.abs().max() > 0.5 * model.cfg.output_logits_soft_cap


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_bf16_models_resume(family, bridged, tokenizer):
    model = bridged(family, dtype=torch.bfloat16, tokenizer=tokenizer)
    run = Resumable(model, BATCHES["right"])
    assert run.suffixes
    assert run.resid_pre(1).dtype == torch.bfloat16


def test_a_sliding_window_that_crops_still_resumes(bridged, tokenizer):
    ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    model, batch = bridged("gemma3", tokenizer=tokenizer), Batch.of(ids)
    run = Resumable(model, batch)  # its window is 16
    made = run.logits(run.run(1, run.resid_pre(1)[:, 30:], start=30))
    assert run.suffixes
    torch.testing.assert_close(made, _logits(model, batch)[:, 30:], rtol=1e-5, atol=1e-6)


def test_hooks_fire_and_leave_and_blocks_stop_where_asked(tiny):
    run = Resumable(tiny, BATCHES["several"])
    seen = []
    hooks = [
        (f"blocks.{i}.hook_resid_post", lambda x, hook: seen.append(tuple(x.shape))) for i in (0, 1)
    ]
    out = run.run(1, run.resid_pre(1)[:, 4:], start=4, upto=2, hooks=hooks)
    assert seen == [(3, 8, 32)]  # block 0 is not run
    torch.testing.assert_close(out, run.resid_pre(2)[:, 4:], rtol=1e-5, atol=1e-6)
    assert all(not point.fwd_hooks for point in tiny.hook_dict.values())
    assert all(not block._forward_pre_hooks for block in tiny.blocks)


def test_edits_know_ids_and_absolute_positions_of_what_is_resumed(tiny):
    batch = BATCHES["left"]
    run = Resumable(tiny, batch)
    seen = []
    hooks = [("blocks.2.hook_resid_post", lambda x, hook: seen.append(pass_of(tiny)))]
    resid = run.resid_pre(2)[:, 6:].repeat(2, 1, 1)
    run.run(2, resid, start=6, hooks=hooks)
    assert torch.equal(seen[0].ids, batch.ids[:, 6:].repeat(2, 1))
    assert torch.equal(seen[0].positions, batch.positions[:, 6:].repeat(2, 1))
    assert seen[0].positions[1, 0] == 1  # five of its twelve columns are padding


def test_a_family_that_cannot_be_resumed_is_refused_by_name(tiny):
    with (
        tiny.hooks(fwd_hooks=[("ln_final.hook_out", lambda x, hook: x + torch.randn_like(x))]),
        pytest.raises(ContractError, match=r"cannot be resumed from the middle: its logits miss"),
    ):
        Resumable(tiny, BATCHES["one"])


def test_a_suffix_that_disagrees_falls_back_to_whole_sequences(tiny):
    def absolute(x, hook):  # a user's hook that takes column 0 for the first token
        x = x.clone()
        x[:, 0] += 1.0
        return x

    with tiny.hooks(fwd_hooks=[("blocks.2.hook_mlp_out", absolute)]):
        run = Resumable(tiny, BATCHES["several"])
        assert not run.suffixes
        with pytest.raises(SiteError, match="whole sequences only; start at 0, not 3"):
            run.run(1, run.resid_pre(1)[:, 3:], start=3)


def test_what_does_not_fit_is_refused(tiny):
    run = Resumable(tiny, BATCHES["several"])
    with pytest.raises(SiteError, match=r"layer 4 is outside 0\.\.3"):
        run.resid_pre(4)
    with pytest.raises(SiteError, match=r"must be \[P \* 3, 12, d_model\], got \(2, 12, 32\)"):
        run.run(1, run.resid_pre(1)[:2])
    with pytest.raises(PromptError, match="vocabulary is 0 to 63"):
        Resumable(tiny, Batch.of(torch.full((1, 5), 64)))


def test_memory_that_runs_out_is_no_fault_of_the_family(bridged, tokenizer):
    model = bridged("llama", tokenizer=tokenizer)
    calls = []

    def full(module, args):
        calls.append(1)
        if len(calls) > 1:  # the full run has passed
            raise torch.OutOfMemoryError("out of memory")

    handle = model.blocks[0].register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        Resumable(model, BATCHES["one"])
    handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_whole_runs_give_what_resumed_blocks_give(bridged, side):
    """For models whose blocks or head do not run by themselves; here both ways are there."""
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    run = Resumable(bridged("llama"), Batch.pad(rows, side=side))
    real = run.batch.mask.repeat(2, 1)
    for layer in (0, 1, 2):
        clean = run.resid_pre(layer)
        both = torch.cat([clean, clean * 1.5])
        for stop in (layer + 1, 3):
            run.whole_blocks = run.whole_head = False
            expected = run.run(layer, both, upto=stop)
            logits = run.logits(expected)
            run.whole_blocks = run.whole_head = True
            found = run.run(layer, both, upto=stop)
            torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(run.logits(expected), logits, rtol=1e-4, atol=1e-5)
