from __future__ import annotations

import pytest
import torch

from melens.batches import Batch, prompts
from melens.capture import ChannelMax, Reducer, stream
from melens.errors import CaptureError, PromptError, SiteError

SITE = "blocks.1.hook_resid_post"


def test_reducers_are_reducers():
    assert isinstance(ChannelMax(), Reducer)
    with pytest.raises(CaptureError, match="saw no batch"):
        ChannelMax().result()


def test_streaming_equals_all_at_once_and_the_cache(tiny, ids):
    whole, split = ChannelMax(), ChannelMax()
    stream(tiny, [Batch.of(ids)], {SITE: whole})
    assert stream(tiny, [Batch.of(ids[:1]), Batch.of(ids[1:])], {SITE: split}) == 2
    torch.testing.assert_close(whole.result(), split.result())
    _, cache = tiny.run_with_cache(ids)
    torch.testing.assert_close(whole.result(), cache[SITE].abs().amax((0, 1)))


def test_padding_is_not_seen(tiny, ids):
    padded, plain = ChannelMax(), ChannelMax()
    for side in ("right", "left"):
        rows = [ids[0].tolist(), ids[1, :5].tolist()]
        stream(tiny, [Batch.pad(rows, side=side)], {SITE: padded})
    stream(tiny, [Batch.of(ids[:1]), Batch.of(ids[1:2, :5])], {SITE: plain})
    torch.testing.assert_close(padded.result(), plain.result(), rtol=1e-5, atol=1e-6)


def test_early_stop_gives_the_same_and_leaves_the_model_as_it_was(tiny, ids):
    clean = tiny(ids)
    early, late = ChannelMax(), ChannelMax()
    ran = []
    with tiny.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: ran.append(1))]):
        stream(tiny, [Batch.of(ids)], {SITE: early})
        assert not ran
        stream(tiny, [Batch.of(ids)], {SITE: late}, stop_early=False)
        assert ran
    assert torch.equal(early.result(), late.result())
    assert torch.equal(tiny(ids), clean)


def test_unknown_and_silent_sites_are_refused(tiny, ids):
    with pytest.raises(SiteError, match=r"no hook blocks\.9\.hook_resid_post.*0 to 2"):
        stream(tiny, [Batch.of(ids)], {"blocks.9.hook_resid_post": ChannelMax()})
    silent = "blocks.1.attn.hook_hidden_states"  # listed by TransformerLens, never fired on Llama
    with pytest.raises(CaptureError, match=r"hook_hidden_states fired \[0\] times over 1 batches"):
        stream(tiny, [Batch.of(ids)], {silent: ChannelMax(), SITE: ChannelMax()})
    with pytest.raises(CaptureError, match="got no batch"):
        stream(tiny, [], {SITE: ChannelMax()})


def test_what_a_user_would_hand_over_works(tiny, ids):
    texts = prompts("w5 w6 w7 w8")
    by_texts, by_batch = ChannelMax(), ChannelMax()
    stream(tiny, texts, {SITE: by_texts})
    stream(tiny, texts.pack(tiny.tokenizer)[0], {SITE: by_batch})
    assert torch.equal(by_texts.result(), by_batch.result())
    with pytest.raises(CaptureError, match=r"needs a hooked model, got str; melens\.load it"):
        stream("smollm2-135m", [Batch.of(ids)], {SITE: ChannelMax()})
    for wrong in (torch.tensor([[5, 64]]), torch.tensor([[-1, 5]])):
        with pytest.raises(PromptError, match=r"token ids run from .*the vocabulary is 0 to 63"):
            stream(tiny, [Batch.of(wrong)], {SITE: ChannelMax()})


def test_hooks_and_modes_come_back_even_after_an_interrupt(tiny, ids):
    tiny.train()

    class Interrupted:
        def update(self, x, batch):
            assert not tiny.training
            raise KeyboardInterrupt

        def result(self):
            return None

    with pytest.raises(KeyboardInterrupt):
        stream(tiny, [Batch.of(ids)], {SITE: Interrupted()})
    assert tiny.training
    assert all(module.training for module in tiny.blocks[1].modules())
    assert all(not point.fwd_hooks for point in tiny.hook_dict.values())


def test_a_capture_sees_the_edits_entered_before_it(tiny, ids):
    seen = ChannelMax()
    with tiny.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x * 0 + 3)]):
        stream(tiny, [Batch.of(ids)], {SITE: seen})
    assert set(seen.result().tolist()) == {3.0}
