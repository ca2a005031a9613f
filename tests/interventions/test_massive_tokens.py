"""Which tokens an edit touches: those that are massive in the pass, wherever their id stands."""

from __future__ import annotations

import pytest
import torch
from planted import (
    KINDS,
    NEWLINE_AT,
    NEWLINE_ID,
    batch,
    newline_batch,
    plant,
    plant_newline,
)
from planted_report import SAVED

from melens.errors import EditWarning
from melens.interventions.massive import MassiveRule
from melens.results.locate import FirstToken


def _bridged(planted, tokenizer):
    from melens.models import load

    return load(planted.model, tokenizer=tokenizer)


PLANTED = [
    *(("llama", kind) for kind in KINDS if kind not in ("none", "final-growth")),
    ("gemma2", "several-tokens"),
    ("gpt2", "several-tokens"),
]


@pytest.mark.parametrize(("family", "kind"), PLANTED)
def test_the_rule_finds_the_planted_tokens_and_no_other(family, kind, tokenizer):
    """Closed form: the planted ids, at the layer where they emerge, alone or in other company."""
    import melens
    from melens.batches import Batch
    from melens.interventions.massive import massive_tokens

    planted = plant(family, kind, 1)
    model = _bridged(planted, tokenizer)
    me = melens.locate(model, [Batch.of(batch(planted))])
    ids = batch(planted, seed=5)
    padded = Batch.pad([row[: 20 + 9 * i].tolist() for i, row in enumerate(ids)])
    for given in (Batch.of(ids), padded, Batch.of(ids[:1, :7])):
        ((marks, sizes),) = massive_tokens(model, me, [given])
        wanted = torch.isin(given.ids, torch.tensor(planted.truth.token_ids)) & given.mask
        assert torch.equal(marks, wanted), (me.me_layer, sizes[0])


@pytest.fixture(scope="module")
def newline():
    """Bridge, plain twin, texts, their massive tokens by construction, and the located layer."""
    import melens
    from melens.batches import Batch
    from melens.models import load

    ids = newline_batch()
    truth = torch.zeros_like(ids, dtype=torch.bool)
    truth[:, 0] = True
    truth[::2, NEWLINE_AT] = True
    model = load(plant_newline().model)
    return model, plant_newline().model, ids, truth, melens.locate(model, [Batch.of(ids)])


def test_a_newline_is_edited_where_it_is_massive_and_nowhere_else(newline):
    from melens.interventions import wemask
    from melens.interventions.target import these

    model, plain, ids, truth, me = newline
    assert {token.position for token in me.massive} == {0, NEWLINE_AT}
    settings = {"rate": 0.5, "select": "activation"}
    with torch.no_grad():
        with wemask(plain, me, **settings, tokens=these(truth)):
            wanted = plain(ids).logits
        for one in (plain, model):
            with wemask(one, me, **settings) as mask:
                found = one(ids) if one is model else one(ids).logits
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
            assert (mask.edited.tokens, mask.edited.rows) == (int(truth.sum()), len(ids))
            assert mask.edited.coordinate.least > 1000
            assert not mask.edited.warning()
        warned = pytest.warns(EditWarning, match="were not massive")
        with warned, wemask(plain, me, **settings, tokens="ids") as mask:
            by_id = plain(ids).logits
    every = int((ids == NEWLINE_ID).sum())
    assert mask.edited.ordinary == every - int(truth[:, 1:].sum()) > 20
    assert (by_id - wanted).abs().max() > 1


def test_massive_tokens_are_the_same_under_a_cache_padding_and_company(newline):
    from melens.interventions import drop_key, wemask

    _, plain, ids, truth, me = newline
    for edit in (
        lambda: wemask(plain, me, rate=0.9, select="activation"),
        lambda: drop_key(plain, me),
    ):
        with torch.no_grad(), edit() as record:
            whole = plain(ids).logits
        with torch.no_grad(), edit() as cut:
            first = plain(ids[:, :2], use_cache=True)
            logits, cache = [first.logits], first.past_key_values
            for piece in ids[:, 2:].split(1, dim=1):
                out = plain(piece, past_key_values=cache, use_cache=True)
                logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=2e-4)
        edited = getattr(record, "edited", record), getattr(cut, "edited", cut)
        assert edited[0].tokens == edited[1].tokens == int(truth.sum())
        pad = torch.zeros(len(ids), 5, dtype=torch.long)
        mask = torch.cat([pad, torch.ones_like(ids)], 1)
        with torch.no_grad(), edit():
            where = (mask.cumsum(-1) - 1).clamp_min(0)
            left = plain(torch.cat([pad, ids], 1), attention_mask=mask, position_ids=where).logits
            alone = plain(ids[2:3]).logits
        torch.testing.assert_close(left[:, 5:], whole, rtol=0, atol=2e-4)
        torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=2e-4)


def test_resumed_runs_edit_the_tokens_of_the_full_run(newline):
    """From before the ME Layer, from after it (as recorded), and joined by later rows."""
    from melens.batches import Batch
    from melens.interventions import wemask
    from melens.resume import Resumable

    model, _, ids, _, me = newline
    run = Resumable(model, Batch.of(ids))
    with torch.no_grad(), wemask(model, me, rate=0.9, select="activation"):
        wanted = model(ids)
        for layer in (0, me.me_layer + 1):
            final = run.run(layer, run.resid_pre(layer).repeat(2, 1, 1))
            torch.testing.assert_close(run.logits(final)[len(ids) :], wanted, rtol=0, atol=1e-4)
        resid, notes = run.resid_pre(0), {}
        for layer in range(model.cfg.n_layers):
            if layer == me.me_layer + 1:
                resid = torch.cat([resid, run.resid_pre(layer)])
            resid = run.block(layer, resid, notes=notes)
    for half in run.logits(resid).chunk(2):
        torch.testing.assert_close(half, wanted, rtol=0, atol=1e-4)


def test_evaluate_edits_and_counts_massive_tokens_only(newline):
    from melens.evaluating.edits import conditions
    from melens.evaluating.forced import Forced, Runner
    from melens.interventions import wemask
    from melens.results.edit import Edit
    from melens.settings import Compare

    model, plain, ids, truth, me = newline
    edit = Edit(select="activation", rate=0.9)
    tried = conditions(
        model, edit, me, Compare(rates=(), seeds=(0,), rivals=("norm-flatten", "zero"))
    )
    items = [
        Forced(str(i), tuple(row), (False, *[True] * (len(row) - 1)), {})
        for i, row in enumerate(ids.tolist())
    ]
    outcome = Runner(model, tried, me).outcome(items, tried)
    assert [found.tokens for found in outcome.massive] == truth.sum(1).tolist()
    with torch.no_grad(), wemask(plain, me, rate=0.9, select="activation"):
        losses = -plain(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    for i, found in enumerate(outcome.found["edited"]):
        torch.testing.assert_close(found.loss, losses[i], rtol=0, atol=1e-4)


def test_a_pass_and_its_tokens_are_counted_once_whatever_the_layers(newline):
    from melens.errors import NoTokenError
    from melens.interventions import wemask

    _, plain, ids, _, me = newline
    with pytest.raises(NoTokenError, match="active over 1 forward pass"):  # noqa: SIM117
        with wemask(plain, me, rate=0.5, tokens=[500]), torch.no_grad():
            plain(ids)


def test_an_edit_that_was_kept_open_warns_as_any_other_at_its_end():
    from planted import batch, plant

    from melens.batches import Batch
    from melens.exporting.reload import OpenEdit
    from melens.locating import locate
    from melens.models import load
    from melens.results import Edit

    planted = plant("llama", "several-tokens", 1)
    model, texts = load(planted.model), batch(planted, n=2, length=20)
    me = locate(model, [Batch.of(texts)])
    edit = Edit(name="wemask", select="activation", rate=0.5, layers=(0,))
    kept = OpenEdit(model, edit, me)
    with torch.no_grad():
        model(texts)
    with pytest.warns(EditWarning, match="massive tokens were not edited") as said:
        kept.close()
    assert len(said) == 1
    kept.close()  # once only
    assert OpenEdit(model, Edit(name="none"), None).record is None


def test_a_massive_token_passes_both_limits_and_one_is_not_enough():
    rule = MassiveRule(layer=0, dim=1, coordinate=10.0, norm=50.0, median_norm=10.0)
    x = torch.tensor([[[0.0, 20.0, 0.0], [60.0, 5.0, 0.0], [60.0, -20.0, 0.0], [0.0, 0.0, 0.0]]])
    assert rule.marks(x)[0].tolist() == [[False, False, True, False]]


def _first_rule(tokens):
    """The rule of an ME Layer with first token 7 located, and these others tried alone."""
    from melens.interventions.massive import FirstRule
    from melens.results import load_result

    me = load_result(SAVED / "smollm2-135m-bos.locate.json")
    one = me.massive[0].model_copy(update={"token_id": 7, "position": 0})
    tried = tuple(
        FirstToken(token_id=i, token="a", massive=massive, me_layer=None, value=1.0)
        for i, massive in tokens
    )
    support = me.stability.model_copy(update={"first_tokens": tried})
    return FirstRule.of(me.model_copy(update={"massive": (one,), "stability": support}))


def test_a_first_token_that_was_never_tried_counts_where_all_that_were_are_massive():
    """Before the ME Layer only first tokens are told; not by the located id alone."""
    from melens.interventions.context import PassTokens

    ids = torch.tensor([[7, 7], [8, 7], [9, 9]])
    now = PassTokens(ids, torch.arange(2).expand(3, 2))
    every = [[True, False]] * 3
    assert _first_rule([(8, True)])(now).tolist() == every
    some = _first_rule([(8, False)])(now)  # 8 is known not to be; of 9 nothing is known
    assert some.tolist() == [[True, False], [False, False], [False, False]]
    two = _first_rule([(8, True), (10, False)])(now)
    assert two.tolist() == [[True, False], [True, False], [False, False]]


def test_first_tokens_that_prompts_begin_with_are_tried():
    """Generate, lm-eval and exports ask of each first token whether it is massive."""
    from planted import batch, plant

    from melens.batches import Batch
    from melens.interventions.massive import FirstRule, with_firsts
    from melens.locating import locate
    from melens.models import load

    made = plant("llama", "single", 1)
    model = load(made.model)
    me = locate(model, [Batch.of(batch(made, n=2, length=20))])
    (massive,) = made.truth.token_ids
    ordinary = 40
    bare = me.model_copy(update={"stability": me.stability.model_copy(update={"first_tokens": ()})})
    known = dict(FirstRule.of(with_firsts(model, bare, [massive, ordinary])).known)
    assert known == {massive: True, ordinary: False}


def test_an_edit_that_met_no_token_says_which_option():
    from planted import batch, plant

    from melens.errors import NoTokenError
    from melens.interventions import wemask

    made = plant("llama", "single", 1)
    with pytest.raises(NoTokenError, match=r"look at tokens= and .*--bos, --chat"):  # noqa: SIM117
        with wemask(made.model, layers=[1], rate=0.5, tokens=[500]), torch.no_grad():
            made.model(batch(made, n=1, length=8))
