"""The contract of every registered edit, present and future, and each edit's own formula."""

from __future__ import annotations

import pytest
import torch
from planted import SECOND_ID, batch, plant
from tiny import TINY

from melens.batches import Batch
from melens.errors import EditWarning, InterventionError, MelensError, SiteError
from melens.interventions import (
    INTERVENTIONS,
    drop_key,
    ffn_ablate_neurons,
    ffn_cap,
    ffn_pull_back,
    ffn_rms_normalise,
    ffn_scale,
    ffn_zero_weights,
    norm_flatten,
    norm_scale_dims,
    norm_shuffle,
    qk_orthogonalise,
    residual_set,
    write_block,
)
from melens.interventions.context import PassTokens, pass_of, watching
from melens.interventions.ffn import transplant
from melens.interventions.target import choice_of, meant
from melens.locating import locate
from melens.models import load
from melens.models.anatomy import norm_gain, resid_post
from melens.models.ffn import ffn_input, ffn_of

EACH = pytest.mark.parametrize("name", list(INTERVENTIONS))
LAYER = 1
CAUSAL_CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""float32; cached and uncached attention sum in another order."""


def run(model, ids, **options):
    with torch.no_grad():
        return model(ids, return_type="logits", **options)


def _run_and_fail(model, ids):
    run(model, ids)
    raise ZeroDivisionError


def make(model, name, settings, **options):
    return INTERVENTIONS[name].make(model, LAYER, **settings, **options)


def no_hooks(model):
    return all(not point.fwd_hooks for point in model.hook_dict.values())


@EACH
def test_it_changes_something_and_leaves_no_trace(name, tiny, ids):
    clean = run(tiny, ids)
    with make(tiny, name, INTERVENTIONS[name].strong):
        assert not torch.equal(run(tiny, ids), clean)
    assert torch.equal(run(tiny, ids), clean)
    with pytest.raises(ZeroDivisionError), make(tiny, name, INTERVENTIONS[name].strong):
        _run_and_fail(tiny, ids)
    assert torch.equal(run(tiny, ids), clean)
    assert no_hooks(tiny)
    assert not tiny.original_model._forward_pre_hooks


@EACH
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_its_neutral_setting_changes_no_bit(name, family, bridged, ids):
    model = bridged(family)
    clean = run(model, ids)
    with make(model, name, INTERVENTIONS[name].neutral, tokens="first") as record:
        assert torch.equal(run(model, ids), clean)
    edited = getattr(record, "edited", record)
    assert edited.tokens == len(ids)
    assert not edited.changed
    assert "nothing changed" in edited.summary()


def test_whether_anything_changed_is_known_at_once_and_after_an_error(tiny, ids):
    with pytest.raises(ZeroDivisionError), qk_orthogonalise(tiny, 1, tokens="first") as edited:
        _run_and_fail(tiny, ids)
    assert edited.changed
    with drop_key(tiny, layers=[1], start=ids.shape[1]) as edited:  # no query so late
        run(tiny, ids)
    assert edited.tokens == len(ids)
    assert not edited.changed
    with drop_key(tiny, layers=[1], tokens=ids.shape[1] - 1) as edited:  # nothing comes later
        run(tiny, ids)
    assert not edited.changed


@EACH
def test_its_neutral_setting_changes_no_bit_in_bfloat16(name, bridged, ids):
    model = bridged("llama", dtype=torch.bfloat16)
    clean = run(model, ids)
    with make(model, name, INTERVENTIONS[name].neutral):
        assert torch.equal(run(model, ids), clean)


@EACH
def test_it_acts_downstream_only(name, tiny, ids):
    """Layers before keep every bit; so do tokens before the edited one, in every layer."""
    position = 5

    def residuals():
        sites = [resid_post(layer) for layer in range(tiny.cfg.n_layers)]
        with torch.no_grad():
            _, cache = tiny.run_with_cache(ids, names_filter=sites)
        return [cache[site].clone() for site in sites]

    clean = residuals()
    with make(tiny, name, INTERVENTIONS[name].strong, tokens=position) as record:
        edited = residuals()
    said = getattr(record, "edited", record)
    assert said.changed
    assert "nothing changed" not in said.summary()
    assert torch.equal(edited[0], clean[0])
    assert not torch.equal(edited[-1], clean[-1])
    if name != "qk_orthogonalise":  # which edits a whole sequence, by one token's direction
        for before, after in zip(clean, edited, strict=True):
            assert torch.equal(before[:, :position], after[:, :position])


@EACH
def test_it_is_right_under_a_kv_cache(name, tiny, ids):
    """Prefill and decoding chunk by chunk give the logits of the whole, position by position."""
    settings = dict(INTERVENTIONS[name].strong)
    with make(tiny, name, settings):
        whole = run(tiny, ids)
        prefill, past = tiny(ids[:, :7], return_type="logits_and_cache")
        rest = []
        for chunk in (ids[:, 7:8], ids[:, 8:11], ids[:, 11:]):
            logits, past = tiny(chunk, past_key_values=past, return_type="logits_and_cache")
            rest.append(logits)
    torch.testing.assert_close(torch.cat([prefill, *rest], dim=1), whole, **CAUSAL_CLOSE)


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_company_change_nothing(name, side, tiny, ids):
    rows = [ids[0].tolist(), ids[1, :8].tolist(), ids[2, :5].tolist()]
    batch = Batch.pad(rows, side=side)
    settings = INTERVENTIONS[name].strong
    with make(tiny, name, settings):
        together = run(tiny, batch.ids, attention_mask=batch.mask.long())
        for i, row in enumerate(rows):
            alone = run(tiny, torch.tensor([row]))[0]
            torch.testing.assert_close(together[i][batch.mask[i]], alone, **CAUSAL_CLOSE)


@EACH
def test_it_nests_and_the_outer_one_survives_the_inner(name, tiny, ids):
    settings = INTERVENTIONS[name].strong
    with ffn_scale(tiny, 2, factor=3.0):
        outer = run(tiny, ids)
        with make(tiny, name, settings):
            assert not torch.equal(run(tiny, ids), outer)
        assert torch.equal(run(tiny, ids), outer)


@EACH
def test_it_refuses_what_it_cannot_do(name, tiny, ids):
    settings = INTERVENTIONS[name].strong
    with pytest.raises(SiteError, match=r"layer 9 is outside 0\.\.2"):
        INTERVENTIONS[name].make(tiny, 9, **settings).__enter__()
    with pytest.raises(InterventionError, match="tokens must be"):
        make(tiny, name, settings, tokens="last").__enter__()
    with (
        pytest.raises(InterventionError, match="no forward pass reached it"),
        make(tiny, name, settings),
    ):
        pass
    with pytest.raises(InterventionError), make(tiny, name, settings, tokens=50):
        run(tiny, ids)
    with pytest.raises(InterventionError, match=r"needs a (hooked model|TransformerBridge)"):
        INTERVENTIONS[name].make(torch.nn.Linear(2, 2), 1, **settings).__enter__()
    assert no_hooks(tiny)


def test_a_block_called_by_itself_is_refused(tiny):
    x = torch.randn(1, 4, 32)
    with pytest.raises(InterventionError, match="called by itself"), ffn_scale(tiny, 1):
        tiny.blocks[1].mlp(x)


def test_settings_are_refused_before_any_pass(tiny):
    cases = [
        (ffn_ablate_neurons(tiny, 1, neurons=[64]), "neurons 0 to 63|1's neurons 0 to 63"),
        (ffn_ablate_neurons(tiny, 1, neurons=[]), "at least one"),
        (norm_scale_dims(tiny, 1, dims=[-1]), "dimensions 0 to 31"),
        (ffn_cap(tiny, 1, factor=-1.0), "at least 0"),
        (ffn_zero_weights(tiny, 1, weights=[]), "pairs"),
        (residual_set(tiny, 1), "dims: name them"),
        (residual_set(tiny, 1, dims=[1, 2], values=[1.0]), "1 were given for 2"),
        (write_block(tiny, 1, part="norm"), "attention or ffn"),
        (transplant(tiny, 1, donor=None), "donor must be"),
        (qk_orthogonalise(tiny, 1, of=("v",)), "shows no v"),
        (norm_flatten(tiny, 1, alpha=float("nan")), "must be a number"),
        (norm_flatten(tiny, 1, alpha=-(10**400)), "must be a number"),
        (norm_flatten(tiny, 1, norm="ln2_post"), "no norm 'ln2_post'"),
    ]
    for context, text in cases:
        with pytest.raises(MelensError, match=text):
            context.__enter__()


@pytest.mark.parametrize("make_edit", [ffn_pull_back, ffn_cap])
def test_a_reference_needs_other_tokens(make_edit, tiny, ids):
    with pytest.raises(InterventionError, match="pass reference="), make_edit(tiny, 1):
        run(tiny, ids[:, :1])


@pytest.mark.parametrize("family", [f for f in TINY if f not in ("mixtral", "qwen3-moe")])
def test_the_ffn_formula_is_the_models_own(family, bridged, ids):
    """product_of and written against what the model's hooks show."""
    model = bridged(family)
    if family == "qwen3-next":
        with pytest.raises(SiteError, match="no FFN with neurons of its own"):
            ffn_of(model, 1)
        return
    ffn = ffn_of(model, 1)
    sites = [ffn_input(model, 1), ffn.product, ffn.output]
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=sites)
    product = ffn.product_of(cache[sites[0]])
    torch.testing.assert_close(product, cache[ffn.product], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ffn.written(product), cache[ffn.output], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "qwen3-next"])
def test_experts_have_no_neurons_but_their_write_can_be_dropped(family, bridged, ids):
    model = bridged(family)
    with pytest.raises(SiteError, match="write_block"):
        ffn_ablate_neurons(model, 1, neurons=[0]).__enter__()
    clean = run(model, ids)
    with write_block(model, 1, part="ffn", tokens="all"):
        assert not torch.equal(run(model, ids), clean)


def site_of(model, ids, site, edit=None):
    with torch.no_grad():
        if edit is None:
            return model.run_with_cache(ids, names_filter=[site])[1][site]
        with edit:
            return model.run_with_cache(ids, names_filter=[site])[1][site]


@pytest.mark.parametrize(
    ("family", "norm"), [("llama", "ln2"), ("gemma2", "ln2_post"), ("gpt2", "ln2")]
)
def test_a_flat_norm_multiplies_by_the_mean_gain(family, norm, bridged, ids):
    model = bridged(family)
    gain = norm_gain(model, 1, norm)
    bias = getattr(model.blocks[1].ln2, "bias", None)
    bias = bias.detach() if isinstance(bias, torch.Tensor) and norm == "ln2" else 0.0
    normalized = site_of(model, ids, f"blocks.1.{norm}.hook_normalized")
    site = f"blocks.1.{norm}.hook_out"
    edited = site_of(model, ids, site, norm_flatten(model, 1, tokens="all", norm=norm, alpha=0.25))
    expected = normalized * (gain.mean() + 0.25 * (gain - gain.mean())) + bias
    torch.testing.assert_close(edited, expected, rtol=1e-5, atol=1e-5)
    shuffled = site_of(model, ids, site, norm_shuffle(model, 1, tokens="all", norm=norm, seed=3))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(shuffled, normalized * gain[order] + bias, rtol=1e-5, atol=1e-5)


def test_the_product_edits_follow_their_formulas(tiny, ids):
    site = "blocks.1.mlp.hook_post"
    product = site_of(tiny, ids, site)
    rms = product.square().mean(-1).sqrt()
    normal = site_of(tiny, ids, site, ffn_rms_normalise(tiny, 1, tokens="all"))
    torch.testing.assert_close(normal.square().mean(-1).sqrt(), torch.ones_like(rms))
    pulled = site_of(tiny, ids, site, ffn_pull_back(tiny, 1, tokens=[0, 4]))
    others = torch.tensor([i for i in range(12) if i not in (0, 4)])
    reference = rms[:, others].median(dim=1).values
    for t in (0, 4):
        factor = (reference / rms[:, t]).clamp(max=1)
        torch.testing.assert_close(pulled[:, t], product[:, t] * factor[:, None])
    assert torch.equal(pulled[:, others], product[:, others])


def test_a_cap_holds_the_written_norm(tiny, ids):
    site = "blocks.1.hook_mlp_out"
    capped = site_of(tiny, ids, site, ffn_cap(tiny, 1, tokens="all", reference=0.01, factor=2.0))
    assert capped.norm(dim=-1).max() <= 0.02 * (1 + 1e-5)
    clean = site_of(tiny, ids, site)
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(capped, clean, dim=-1), torch.ones(3, 12)
    )


def test_zeroed_weights_equal_a_model_without_them(make_tiny, ids):
    hf = make_tiny("llama")
    model = load(hf)
    pairs = [(3, 10), (7, 10), (3, 11)]
    with ffn_zero_weights(model, 1, weights=pairs, tokens="all"):
        edited = run(model, ids)
    down = hf.model.layers[1].mlp.down_proj.weight
    before = down.detach().clone()
    with torch.no_grad():
        for row, column in pairs:
            down[row, column] = 0
    torch.testing.assert_close(edited, run(model, ids), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        down.copy_(before)


def test_ablated_neurons_equal_zeroed_columns(tiny, ids):
    with ffn_ablate_neurons(tiny, 1, neurons=[10, 20], tokens="all"):
        one = run(tiny, ids)
    weights = [(row, column) for row in range(32) for column in (10, 20)]
    with ffn_zero_weights(tiny, 1, weights=weights, tokens="all"):
        other = run(tiny, ids)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_transplant_from_itself_changes_nothing_and_from_a_donor_everything(bridged, ids):
    model, donor = bridged("llama"), bridged("llama", seed=1)
    clean = run(model, ids)
    with transplant(model, 1, donor=1, tokens="all"):
        torch.testing.assert_close(run(model, ids), clean, rtol=1e-5, atol=1e-6)
    site = "blocks.1.hook_mlp_out"
    normalized = site_of(model, ids, "blocks.1.ln2.hook_normalized")
    moved = site_of(model, ids, site, transplant(model, 1, donor=donor, tokens="all"))
    theirs = donor.blocks[1].mlp.original_component(normalized * norm_gain(donor, 1, "ln2"))
    torch.testing.assert_close(moved, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["BloomForCausalLM", "MptForCausalLM", "BitNetForCausalLM", "MiniCPM3ForCausalLM"]
)
def test_a_transplant_is_refused_where_the_ffn_writes_more_than_its_formula(name):
    """Two hold the residual in what they write, one a norm inside, one a factor behind."""
    from families import tiny as tiny_family

    from melens.models import load

    model = load(tiny_family(name))
    ids = torch.arange(12).reshape(2, 6) + 3
    before = run(model, ids)
    with (
        pytest.raises(InterventionError, match="writes something else than its formula"),
        transplant(model, 1, donor=0, tokens="all"),
    ):
        run(model, ids)
    assert torch.equal(run(model, ids), before)


def test_residual_set_sets_the_stream_itself(tiny, ids):
    seen = site_of(
        tiny, ids, "blocks.2.hook_resid_pre", residual_set(tiny, 1, dims=[4, 9], values=[2.0, -1.0])
    )
    assert torch.equal(seen[:, 0, [4, 9]], torch.tensor([[2.0, -1.0]]).expand(3, 2))
    tenth = site_of(
        tiny, ids, "blocks.2.hook_resid_pre", residual_set(tiny, 1, dims=[4], strength=0.9)
    )
    clean = site_of(tiny, ids, "blocks.2.hook_resid_pre")
    torch.testing.assert_close(tenth[:, 0, 4], clean[:, 0, 4] * 0.1)


@pytest.mark.parametrize("part", ["attention", "ffn"])
@pytest.mark.parametrize("family", ["llama", "neox", "gemma2", "qwen3-next"])
def test_a_dropped_write_is_missing_from_the_sum(part, family, bridged, ids):
    model = bridged(family)
    from melens.models.anatomy import anatomy

    block = anatomy(model).blocks[1]
    site = block.ffn_write if part == "ffn" else block.mixer_writes[0]
    before, kept = site_of(model, ids, resid_post(1)), site_of(model, ids, site)
    after = site_of(model, ids, resid_post(1), write_block(model, 1, part=part, tokens="all"))
    if part == "ffn" or family == "neox":  # else the FFN reads another residual
        torch.testing.assert_close(after, before - kept, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.equal(after, before)


@pytest.mark.parametrize("itself", [True, False])
def test_orthogonal_queries_have_nothing_left_along_the_token(itself, tiny, ids):
    clean = site_of(tiny, ids, "blocks.1.attn.hook_q")
    edited = site_of(
        tiny, ids, "blocks.1.attn.hook_q", qk_orthogonalise(tiny, 1, itself=itself, of=("q",))
    )
    direction = clean[:, :1] / clean[:, :1].norm(dim=-1, keepdim=True)
    left = (edited * direction).sum(-1)
    assert left[:, 1:].abs().max() < 1e-6
    assert torch.equal(edited[:, 0], clean[:, 0]) != itself


def test_generate_sees_absolute_positions(bridged, tokenizer, ids):
    """Cached generation equals decoding without a cache, and a static cache's positions are right.

    (Its logits are not compared: TransformerLens 4.3's bridge itself is off by 1e-2 under one.)
    """
    model = bridged("llama", tokenizer=tokenizer)
    hf, seen = model.original_model, []
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 64}
    with ffn_scale(model, 1, factor=30.0):
        grown = hf.generate(ids, **greedy)
        plain = ids
        for _ in range(6):
            plain = torch.cat([plain, run(model, plain)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(grown, plain)
    note = [("blocks.0.hook_resid_pre", lambda x, hook: seen.append(pass_of(model).positions))]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = (mask.cumsum(-1) - 1).masked_fill(mask == 0, -1)
    for cache in ({}, {"cache_implementation": "static"}):
        seen.clear()
        with watching(model), model.hooks(fwd_hooks=note):
            hf.generate(ids, attention_mask=mask, **greedy, **cache)
        assert torch.equal(seen[0], expected)
        after = torch.cat(seen[1:], dim=1)
        assert torch.equal(after, expected[:, -1:] + torch.arange(1, 6))


def test_before_the_me_layer_only_first_tokens_are_told_and_the_rest_is_said():
    """Two massive tokens, one of them later: an edit at the ME Layer knows the first alone."""
    planted = plant("llama", "several-tokens", 1)
    model = load(planted.model)
    texts = batch(planted, n=2, length=20)
    me = locate(model, [Batch.of(texts)])
    now = PassTokens(texts, torch.arange(20).expand(2, 20))
    both = (texts == SECOND_ID) | (now.positions == 0)
    assert torch.equal(choice_of(me)(now), now.positions == 0)
    assert torch.equal(choice_of(meant(me, "ids"))(now), both)
    other = me.massive[-1].model_copy(update={"dim": 0, "token_id": int(texts[0, 5])})
    wider = me.model_copy(update={"massive": (*me.massive, other)})
    assert torch.equal(choice_of(meant(wider, "ids"))(now), both)
    later = PassTokens(texts[:, 7:9], now.positions[:, 7:9])
    assert torch.equal(choice_of(meant(me, "ids"))(later), both[:, 7:9])
    missed = int(both.sum()) - len(texts)
    warned = pytest.warns(EditWarning, match=f"{missed} massive tokens were not edited")
    with warned, write_block(model, me, part="attention", factor=0.9) as edited:
        run(model, texts)
    assert (edited.tokens, edited.rows, edited.missed) == (2, 2, missed)
    none = me.model_copy(update={"massive": ()})
    with pytest.raises(InterventionError, match="no massive token"):
        choice_of(none)
    with pytest.raises(InterventionError, match="located ME Layer"):
        meant(3, "ids")
    with pytest.raises(InterventionError, match="told by their ids"), ffn_scale(model, me):
        model.original_model(inputs_embeds=torch.randn(1, 4, 64))


@pytest.mark.parametrize(
    "pair",
    [
        lambda m: (ffn_scale(m, 1, factor=2.0), ffn_scale(m, 1, factor=0.5)),
        lambda m: (
            norm_scale_dims(m, 1, dims=[1, 4], factor=2.0),
            norm_scale_dims(m, 1, dims=[1, 4], factor=0.5),
        ),
        lambda m: (
            ffn_ablate_neurons(m, 1, neurons=[3], factor=4.0),
            ffn_ablate_neurons(m, 1, neurons=[3], factor=0.25),
        ),
        lambda m: (
            write_block(m, 1, part="attention", factor=2.0),
            write_block(m, 1, part="attention", factor=0.5),
        ),
    ],
)
def test_an_edit_and_its_inverse_are_nothing(pair, tiny, ids):
    clean = run(tiny, ids)
    outer, inner = pair(tiny)
    with outer, inner:
        torch.testing.assert_close(run(tiny, ids), clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gpt2", "neox"])
def test_removed_weights_compose_with_every_other_edit_of_the_ffn(family, make_tiny, ids):
    """Against a model whose weights are really zero, whatever is entered first."""
    hf = make_tiny(family)
    model = load(hf)
    pairs = [(3, 10), (3, 11), (7, 10)]

    def others():
        return ffn_scale(model, 1, factor=3.0), ffn_ablate_neurons(model, 1, neurons=[10, 20])

    def weights(some):
        return ffn_zero_weights(model, 1, weights=some)

    found = []
    scale, ablate = others()
    with scale, weights(pairs[:1]), ablate, weights(pairs[1:]):
        found.append(run(model, ids))
    scale, ablate = others()
    with weights(pairs), ablate, scale:
        found.append(run(model, ids))
    scale, ablate = others()
    with ablate, scale, weights(pairs[::-1]):
        found.append(run(model, ids))
    projection = ffn_of(model, 1).projection.weight
    across = family == "gpt2"  # Conv1D keeps (in, out)
    with torch.no_grad():
        kept = projection.clone()
        for row, column in pairs:
            projection[(column, row) if across else (row, column)] = 0
    # The zeros are for all tokens, our edits for the first: its own logits depend on it alone.
    scale, ablate = others()
    with scale, ablate:
        expected = run(model, ids)
    with torch.no_grad():
        projection.copy_(kept)
    for made in found:
        torch.testing.assert_close(made[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made, found[0], rtol=1e-5, atol=1e-6)


def test_a_flat_norm_and_a_scaled_one_compose(tiny, ids):
    gain = norm_gain(tiny, 1, "ln2")
    normalized = site_of(tiny, ids, "blocks.1.ln2.hook_normalized")
    site = "blocks.1.ln2.hook_out"
    with norm_flatten(tiny, 1, tokens="all"):
        made = site_of(
            tiny, ids, site, norm_scale_dims(tiny, 1, dims=[2], tokens="all", factor=3.0)
        )
    flat = gain.mean().expand(32).clone()
    flat[2] *= 3
    torch.testing.assert_close(made, normalized * flat, rtol=1e-5, atol=1e-5)


def test_a_new_prefill_forgets_the_direction_of_the_last_one(tiny, ids):
    with qk_orthogonalise(tiny, 1, tokens=5):
        run(tiny, ids)
        with pytest.raises(InterventionError, match="does not hold the chosen token"):
            run(tiny, ids[:, :4])


def test_a_resumed_run_takes_whole_sequences_while_an_edit_reads_them(tiny, ids):
    from melens.resume import Resumable

    assert Resumable(tiny, Batch.of(ids)).suffixes
    with ffn_cap(tiny, 1, factor=0.5):
        resumed = Resumable(tiny, Batch.of(ids))
        assert not resumed.suffixes
    with ffn_cap(tiny, 1, factor=0.5, reference=0.01):
        assert Resumable(tiny, Batch.of(ids)).suffixes


def test_odd_values_are_refused_in_one_line(tiny):
    cases = [
        (ffn_cap(tiny, 1, reference=0.0), "above 0"),
        (transplant(tiny, 1, donor=(tiny, "2")), "layer must be a number"),
    ]
    for context, text in cases:
        with pytest.raises(MelensError, match=text):
            context.__enter__()
