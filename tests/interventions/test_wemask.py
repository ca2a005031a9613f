"""WeMask and drop_key, on bridges and on plain models: exact however the model is run."""

from __future__ import annotations

import copy
import gc
import sys
from contextlib import ExitStack

import pytest
import torch
from tiny import TINY

from melens.batches import Batch
from melens.errors import InterventionError, SiteError
from melens.interventions import MaskRecord, drop_key, ffn_cap, norm_flatten, wemask
from melens.interventions.wemask import SELECTS
from melens.locating import locate
from melens.models import load
from melens.models.decoder import decoder_of

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""float32; cached and padded attention sum in another order."""
FAMILY = pytest.mark.parametrize("family", list(TINY))
RECURRENT = "qwen3-next"
"""Its linear attention keeps a state that left padding enters, edited or not."""
PLAIN = [family for family in TINY if family != RECURRENT]
EDITS = {select: {"select": select, "rate": 0.25} for select in SELECTS}


def select_for(family):
    """OLMo-2 has no norm before attention, so no gain to select by."""
    return "activation" if family == "olmo2" else "gamma"


def edit(model, name, **settings):
    if name == "drop_key":
        return drop_key(model, 0, **settings)
    return wemask(model, 0, **EDITS[name], **settings)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def released_rule(x, rate):
    """The released code's mask, written down from its description: the largest mean |activation|
    over the batch at index 0 of the chunk; those dimensions of index 0 are set to zero."""
    count = int(rate * x.shape[-1])
    top = x[:, 0].abs().mean(dim=0).topk(count).indices
    x = x.clone()
    x[:, 0, top] = 0.0
    return x


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_activation_equals_the_released_rule(family, rate, make_tiny, ids):
    """Hooks on the norms, as the released fork edits after input_layernorm; one first token."""
    hf = make_tiny(family)
    ids = ids.clone()
    ids[:, 0] = 5
    with ExitStack() as stack:
        for layer in (1, 2):
            norm = hf.model.layers[layer].input_layernorm
            handle = norm.register_forward_hook(lambda m, a, out: released_rule(out, rate))
            stack.callback(handle.remove)
        expected = logits(hf, ids, use_cache=False)
    with wemask(hf, 0, select="activation", rate=rate):
        assert torch.equal(logits(hf, ids, use_cache=False), expected)
    assert not torch.equal(logits(hf, ids, use_cache=False), expected)


@FAMILY
def test_a_plain_model_and_its_bridge_agree(family, make_tiny, ids):
    hf = make_tiny(family)
    bridge = load(copy.deepcopy(hf))
    select = select_for(family)
    with torch.no_grad(), wemask(bridge, 0, rate=0.5, select=select) as record:
        bridged = bridge(ids, return_type="logits")
    clean = logits(hf, ids)
    with wemask(hf, 0, rate=0.5, select=select) as other:
        plain = logits(hf, ids)
    torch.testing.assert_close(plain, bridged, **CLOSE)
    assert (plain - clean).abs().max() > 1e-4
    assert record.dims == other.dims
    assert torch.equal(logits(hf, ids), clean)
    assert not any(module._forward_pre_hooks for module in hf.modules())


@FAMILY
def test_dropped_keys_agree_on_a_plain_model_and_its_bridge(family, make_tiny, ids):
    hf = make_tiny(family)
    bridge = load(copy.deepcopy(hf))
    with torch.no_grad(), drop_key(bridge, 0):
        bridged = bridge(ids, return_type="logits")
    with drop_key(hf, 0):
        plain = logits(hf, ids)
    torch.testing.assert_close(plain, bridged, **CLOSE)
    assert (plain - logits(hf, ids)).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "neox", "phi3"])
def test_a_dropped_key_gets_no_attention_but_its_own(family, bridged, ids):
    bridge = bridged(family)
    sites = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1, 2)]
    with torch.no_grad(), drop_key(bridge, 0):
        _, cache = bridge.run_with_cache(ids, names_filter=sites)
    for layer in (1, 2):
        pattern = cache[sites[layer]]
        assert pattern[:, :, 1:, 0].max() == 0
        torch.testing.assert_close(pattern[:, :, 0, 0], torch.ones_like(pattern[:, :, 0, 0]))
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
    assert cache[sites[0]][:, :, 1:, 0].min() > 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_key_dropped_from_a_position_on_is_one_that_a_cache_evicted(family, make_tiny, ids):
    """Against a cache that truly loses its first entry half-way, in every layer."""
    hf, half = make_tiny(family), ids.shape[1] // 2
    layers = range(hf.config.num_hidden_layers)
    with drop_key(hf, layers=layers, start=half):
        dropped = logits(hf, ids)
    with torch.no_grad():
        first = hf(input_ids=ids[:, :half], use_cache=True)
        for layer in first.past_key_values.layers:
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
        late = torch.arange(half, ids.shape[1])[None].expand(len(ids), -1)
        evicted = hf(
            input_ids=ids[:, half:], past_key_values=first.past_key_values, position_ids=late
        ).logits
    torch.testing.assert_close(dropped[:, half:], evicted, **CLOSE)
    assert torch.equal(dropped[:, :half], logits(hf, ids)[:, :half])
    with drop_key(hf, layers=layers):
        always = logits(hf, ids)
    assert (always - dropped)[:, half:].abs().max() > 1e-5
    refused = pytest.raises(InterventionError, match="start must be a position")
    with refused, drop_key(hf, 0, start=-1):
        pass


def test_a_weakened_key_gets_its_share_of_the_odds(bridged, ids):
    """softmax over s_k + ln(1 - strength): the odds against any other key fall by that factor."""
    bridge, site = bridged("llama"), "blocks.1.attn.hook_pattern"
    with torch.no_grad():
        clean = bridge.run_with_cache(ids, names_filter=[site])[1][site]
        with drop_key(bridge, layers=[1], strength=0.75):
            edited = bridge.run_with_cache(ids, names_filter=[site])[1][site]
    torch.testing.assert_close(
        edited[..., 1:, 0] / edited[..., 1:, 1], 0.25 * clean[..., 1:, 0] / clean[..., 1:, 1]
    )


def test_a_rule_by_gain_needs_a_norm_before_attention(make_tiny):
    hf = make_tiny("olmo2")
    for name in ("gamma", "product", "bottom-gamma"):
        with pytest.raises(SiteError, match=r"select='activation'|no norm 'ln1'"):
            edit(hf, name).__enter__()


# Every family under one rule by activation, one by gain and drop_key; every rule in the families
# whose norms differ (gain of its own, 1 + gain, with bias). The rest of the product adds nothing.
WHOLE = [
    (name, family)
    for family in PLAIN
    for name in (*EDITS, "drop_key")
    if name in ("activation", "drop_key", select_for(family))
    or family in ("llama", "gemma2", "gpt2")
]


@pytest.mark.parametrize(("name", "family"), WHOLE)
def test_cached_chunked_padded_and_batched_equal_the_whole(name, family, make_tiny, ids):
    hf = make_tiny(family)
    rows = [ids[0].tolist(), ids[1, :8].tolist(), ids[2, :5].tolist()]
    with edit(hf, name):
        alone = [logits(hf, torch.tensor([row]), use_cache=False)[0] for row in rows]
        for side in ("left", "right"):
            batch = Batch.pad(rows, side=side)
            positions = batch.positions.clamp_min(0)
            made = logits(hf, batch.ids, attention_mask=batch.mask.long(), position_ids=positions)
            for i, expected in enumerate(alone):
                torch.testing.assert_close(made[i][batch.mask[i]], expected, **CLOSE)
        out = hf(input_ids=ids[:1, :5], use_cache=True)
        found = [out.logits]
        for chunk in (ids[:1, 5:9], ids[:1, 9:10], ids[:1, 10:]):
            out = hf(input_ids=chunk, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, dim=1)[0], alone[0], **CLOSE)


def greedy_without_cache(hf, row, steps):
    for _ in range(steps):
        row = torch.cat([row, logits(hf, row, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    return row


WAYS = ("dynamic", "static", "prompt lookup", "beams", "chunked")
GENERATING = ("llama", "gemma3", "gpt2", "mistral", "qwen3")
MASKS = ("activation", "gamma", "drop_key")
PAIRS = [
    (MASKS[(i + j) % 3], family, how)
    for i, family in enumerate(GENERATING)
    for j, how in enumerate(WAYS)
]
"""Each family in each way, each mask with each family and each way: pairwise."""


@pytest.mark.parametrize(("name", "family", "how"), PAIRS)
def test_generate_sees_the_same_mask(name, family, how, make_tiny, ids):
    """Greedy decoding without a cache is the truth; a left-padded batch of unequal prompts."""
    hf = make_tiny(family)
    hf.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False}
    options |= {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "beams": {"num_beams": 3},
        "chunked": {"prefill_chunk_size": 4},
    }[how]
    rows = (
        [ids[0].tolist()]
        if how in ("prompt lookup", "chunked")
        else [ids[0].tolist(), ids[1, :7].tolist()]
    )
    batch = Batch.pad(rows, side="left")
    mask = batch.mask.long()
    with edit(hf, name), torch.no_grad():
        if how == "beams":
            together = hf.generate(batch.ids, attention_mask=mask, **options)
            for i, row in enumerate(rows):
                alone = hf.generate(torch.tensor([row]), **options)
                assert torch.equal(together[i, -6:], alone[0, -6:])
            return
        grown = hf.generate(batch.ids, attention_mask=mask, **options)
        for i, row in enumerate(rows):
            expected = greedy_without_cache(hf, torch.tensor([row]), 6)[0, -6:]
            assert torch.equal(grown[i, -6:], expected)


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 0.5, "strength": 0.0}])
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_0_and_strength_0_change_no_bit(settings, select, dtype, make_tiny, ids):
    hf = make_tiny("llama", dtype=dtype)
    clean = logits(hf, ids)
    with wemask(hf, 0, select=select, **settings):
        assert torch.equal(logits(hf, ids), clean)


def test_selections_are_what_they_say(make_tiny, ids):
    hf = make_tiny("gemma2")  # its gain is 1 + weight
    gain = decoder_of(hf).gain(1).abs()
    torch.testing.assert_close(gain, (1 + hf.model.layers[1].input_layernorm.weight).abs())
    seen = {}
    with hf.model.layers[1].input_layernorm.register_forward_hook(
        lambda m, a, out: seen.update(x=out.detach()[0, 0].abs())
    ):
        logits(hf, ids[:1])
    expected = {
        "gamma": gain.topk(8).indices,
        "bottom-gamma": gain.topk(8, largest=False).indices,
        "bottom": seen["x"].topk(8, largest=False).indices,
        "activation": seen["x"].topk(8).indices,
        "product": (seen["x"] * gain).topk(8).indices,
    }
    for select, dims in expected.items():
        with wemask(hf, layers=[1], rate=0.25, select=select) as record:
            logits(hf, ids[:1])
        assert set(record.dims[1]) == set(dims.tolist()), select
        share = (seen["x"][dims] ** 2).sum() / (seen["x"] ** 2).sum()
        assert record.energy[1] == pytest.approx(share.item(), rel=1e-5)
    drawn = []
    for layers, seed in (([1], 3), ([1, 2], 3), ([1], 4)):
        with wemask(hf, layers=layers, rate=0.25, select="random", seed=seed) as record:
            logits(hf, ids[:1])
        drawn.append(record.dims[1])
    assert drawn[0] == drawn[1] != drawn[2]


def test_strength_scales_the_token_and_nothing_else(bridged, ids):
    bridge = bridged("llama")
    site = "blocks.1.attn.hook_in"
    with torch.no_grad():
        clean = bridge.run_with_cache(ids, names_filter=[site])[1][site]
        with wemask(bridge, layers=[1], rate=0.25, strength=0.4, tokens=[0, 3]) as record:
            edited = bridge.run_with_cache(ids, names_filter=[site])[1][site]
    factor = torch.ones(32)
    factor[list(record.dims[1])] = 0.6
    torch.testing.assert_close(edited[:, [0, 3]], clean[:, [0, 3]] * factor)
    others = [i for i in range(12) if i not in (0, 3)]
    assert torch.equal(edited[:, others], clean[:, others])


def test_layers_are_counted_from_the_me_layer(make_tiny):
    decoder = make_tiny("qwen3-next")  # attention in layers 1 and 3 only
    for where, expected in (
        ((0, "after"), (1, 3)),
        ((0, "next"), (1,)),
        ((1, "next"), (3,)),
        ((-1, "after"), (1, 3)),
        ((None, [3, 1]), (1, 3)),
    ):
        with (
            pytest.raises(InterventionError, match="no forward pass"),
            wemask(decoder, where[0], layers=where[1], rate=0.5, select="random") as record,
        ):
            assert record.layers == expected


def test_packed_texts_each_have_a_first_token(make_tiny, ids):
    """Texts packed into one row, told apart by their position ids."""
    hf = make_tiny("llama")
    bridge = load(hf)
    site, positions = "blocks.1.attn.hook_in", torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        clean, edited = {}, {}
        for kept, context in ((clean, ExitStack()), (edited, wemask(bridge, 0, rate=1.0))):
            note = [(site, lambda x, hook, kept=kept: kept.update(x=x.clone()))]
            with context, bridge.hooks(fwd_hooks=note):
                bridge.original_model(input_ids=ids[:1], position_ids=positions)
    changed = (clean["x"] != edited["x"]).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [0, 5]


def test_what_cannot_be_meant_is_refused(make_tiny, tiny):
    hf = make_tiny("llama")
    cases = [
        ({"layer": 0, "rate": 1.5}, "rate must be from 0 to 1"),
        ({"layer": 0, "rate": float("nan")}, "rate must be a number"),
        ({"layer": 0, "rate": 0.01}, "of 32 dimensions is none"),
        ({"layer": 0, "rate": 0.5, "strength": -1.0}, "strength must be"),
        ({"layer": 0, "rate": 0.5, "select": "top"}, "select must be one of gamma"),
        ({"rate": 0.5}, "counted from the ME Layer"),
        ({"layer": 2, "rate": 0.5}, "no layer with attention comes after layer 2"),
        ({"layer": 0, "rate": 0.5, "layers": "all"}, "layers must be 'after', 'next'"),
        ({"layers": [5], "rate": 0.5}, r"layer 5 is outside 0\.\.2"),
        ({"layers": [1], "rate": 0.5, "tokens": "last"}, "tokens must be"),
    ]
    for settings, message in cases:
        with pytest.raises((InterventionError, SiteError), match=message):
            wemask(hf, **settings).__enter__()
    with pytest.raises(InterventionError, match=r"layer 0 of .* has no attention"):
        wemask(make_tiny("qwen3-next"), layers=[0], rate=0.5).__enter__()


def test_flash_attention_is_refused_where_a_key_is_dropped(tiny, ids):
    def flat_mask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": torch.ones(ids.shape)}

    handle = tiny.blocks[1].attn.register_forward_pre_hook(flat_mask, with_kwargs=True)
    try:
        with pytest.raises(InterventionError, match="eager or sdpa"), drop_key(tiny, 0):
            tiny(ids, return_type="logits")
    finally:
        handle.remove()


def test_an_exit_stack_attaches_it_and_takes_it_off_in_any_order(make_tiny, ids):
    hf = make_tiny("llama")
    clean = logits(hf, ids)
    first, second = ExitStack(), ExitStack()
    first.enter_context(wemask(hf, layers=[1], rate=0.5))
    one = logits(hf, ids)
    second.enter_context(drop_key(hf, layers=[2]))
    both = logits(hf, ids)
    first.close()
    assert not torch.equal(both, one)
    with drop_key(hf, layers=[2]):
        twice = logits(hf, ids)
    torch.testing.assert_close(logits(hf, ids), twice)
    second.close()
    assert torch.equal(logits(hf, ids), clean)


def test_gradients_pass_through_the_mask(make_tiny, ids):
    """As in fine-tuning: parameters behind the mask learn, the masked dimensions teach nothing."""
    hf = make_tiny("llama").train()
    with wemask(hf, layers=[0], rate=1.0, tokens="all"):
        hf(input_ids=ids, labels=ids).loss.backward()
    assert hf.model.layers[0].input_layernorm.weight.grad.abs().max() == 0
    assert hf.model.layers[1].input_layernorm.weight.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_models_and_edits_of_the_norm_nest(make_tiny, ids):
    peft = pytest.importorskip("peft", reason="un-skip: install melens[eval]")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    hf = make_tiny("llama")
    with wemask(hf, 0, rate=0.5):
        expected = logits(hf, ids)
    model = peft.get_peft_model(hf, config)
    with wemask(model, 0, rate=0.5):
        torch.testing.assert_close(logits(model, ids), expected)
    bridge = load(make_tiny("llama"))
    with torch.no_grad(), norm_flatten(bridge, 1), wemask(bridge, 0, rate=0.5):
        both = bridge(ids, return_type="logits")
        with norm_flatten(bridge, 1, alpha=1.0):
            assert torch.equal(bridge(ids, return_type="logits"), both)


def test_a_prompt_whose_start_was_not_seen_is_refused(make_tiny, ids):
    hf = make_tiny("llama")
    past = hf(input_ids=ids[:, :5], use_cache=True).past_key_values
    with (
        pytest.raises(InterventionError, match="not seen while drop_key was open"),
        drop_key(hf, 0),
    ):
        hf(input_ids=ids[:, 5:], past_key_values=past)


@pytest.mark.weights
@pytest.mark.parametrize("name", ["activation", "gamma", "drop_key"])
def test_smollm2_cached_padded_and_batched_equal_the_whole(name, smol, smol_me):
    hf, tokenizer = smol.original_model, smol.tokenizer
    texts = ["The capital of France is Paris, and", "In 1969 people"]
    rows = [[1, *tokenizer(text)["input_ids"]] for text in texts]
    batch = Batch.pad(rows, side="left")

    def entered():
        if name == "drop_key":
            return drop_key(smol, smol_me)
        return wemask(smol, smol_me, select=name, rate=0.5)

    with entered():
        alone = [logits(hf, torch.tensor([row]), use_cache=False)[0] for row in rows]
        out = hf(input_ids=torch.tensor([rows[0][:-2]]), use_cache=True)
        last = hf(input_ids=torch.tensor([rows[0][-2:]]), past_key_values=out.past_key_values)
        padded = logits(
            hf,
            batch.ids,
            attention_mask=batch.mask.long(),
            position_ids=batch.positions.clamp_min(0),
        )
    scale = {"rtol": 1e-4, "atol": 1e-4 * alone[0].abs().max().item()}
    torch.testing.assert_close(last.logits[0], alone[0][-2:], **scale)
    for i, expected in enumerate(alone):
        torch.testing.assert_close(padded[i][batch.mask[i]], expected, **scale)


@pytest.fixture(scope="module")
def smol_me(smol):
    from melens.batches import prompts

    return locate(smol, prompts(n=2, length=32, bos=True))


# --- Kept open, and on error.


def deep_size(thing):
    """Bytes of a record and of all that it holds; it is a tree."""
    held = vars(thing) if hasattr(thing, "__dict__") else thing
    parts = []
    if isinstance(held, dict):
        parts = [*held.keys(), *held.values()]
    elif isinstance(held, (list, tuple, set)):
        parts = list(held)
    return sys.getsizeof(thing) + sys.getsizeof(held) + sum(map(deep_size, parts))


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_mask_kept_open_over_500_passes_does_not_grow(make_tiny, monkeypatch):
    """What it says at the end is what the list of all passes says."""
    hf, listed = make_tiny("llama"), {1: [], 2: []}
    note = MaskRecord.note

    def keeping(self, layer, rows, chosen):
        size = rows.square()
        listed[layer].append(float(((size * chosen).sum(-1) / size.sum(-1)).mean()))
        note(self, layer, rows, chosen)

    monkeypatch.setattr(MaskRecord, "note", keeping)
    ids = torch.randint(3, 64, (500, 1, 4), generator=torch.Generator().manual_seed(3))
    sizes = []
    with wemask(hf, 0, rate=0.25, select="activation") as record:
        for number, row in enumerate(ids):
            logits(hf, row, use_cache=False)
            if number in (99, 499):
                sizes.append((deep_size(record), tensors_alive()))
    assert sizes[0] == sizes[1]
    assert (record.edited.tokens, record.edited.rows) == (500, 500)
    assert len(set(listed[1])) > 10
    assert record.energy == {at: sum(values) / 500 for at, values in listed.items()}
    spans = {at: (seen.least, seen.most) for at, seen in record._shares.items()}
    assert spans == {at: (min(values), max(values)) for at, values in listed.items()}


@pytest.mark.parametrize("bridged", [False, True])
def test_an_error_names_the_layer_that_it_is_about(make_tiny, ids, bridged):
    """Not the first of the edit's layers: the one that was given something else."""
    hf = make_tiny("llama")
    model = load(hf) if bridged else hf

    def shorter(module, args, kwargs):
        name = "hidden_states"
        return args, {**kwargs, name: kwargs[name][:, :5]}

    def flattened(module, args, kwargs):
        return args, {**kwargs, "attention_mask": torch.zeros(3, 12)}

    for hook, made, says in (
        (shorter, wemask(model, layers=(1, 2), rate=0.5), r"^layer 2: \(3, 5\) tokens are held"),
        (flattened, drop_key(model, layers=(1, 2)), r"^layer 2: drop_key needs eager or sdpa"),
    ):
        handle = decoder_of(model).attentions[2].register_forward_pre_hook(hook, with_kwargs=True)
        with pytest.raises(InterventionError, match=says), made:
            model(ids)
        handle.remove()


def test_every_error_of_a_hook_names_its_layer(tiny, ids):
    """Rules of one's own, references that are missing, several nested edits."""
    with (
        pytest.raises(InterventionError, match=r"^layer 2: a rule for tokens must give a mask"),
        wemask(tiny, layers=(2, 1), rate=0.5, tokens="first"),
        ffn_cap(tiny, 2, tokens=lambda now: now.positions[:, :1]),
    ):
        tiny(ids)
    with (
        pytest.raises(InterventionError, match=r"^layer 1: this edit takes its reference from"),
        ffn_cap(tiny, 0, reference=1.0),
        ffn_cap(tiny, 1),
    ):
        tiny(ids[:, :1])
    with (
        pytest.raises(SiteError, match=r"layer 7"),
        wemask(tiny, layers=(1, 7), rate=0.5),
    ):
        tiny(ids)


@pytest.mark.parametrize("size", [1, 7, 64, 576, 999, 1000, 16384])
def test_the_least_rate_that_is_named_is_one_dimension(size):
    from melens.interventions.wemask import least_rate

    assert int(least_rate(size) * size) >= 1
    assert least_rate(size) <= 1.1 / size
    assert int(float(f"{least_rate(size):g}") * size) >= 1
