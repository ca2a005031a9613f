"""SmolLM2-135M under the mask: what it costs, and why the rule by gain passes the token by."""

from __future__ import annotations

import pytest
import torch

from melens.batches import prompts
from melens.evaluating.edits import BASE, EditCondition
from melens.evaluating.forced import Forced, Runner
from melens.interventions import wemask
from melens.locating import locate
from melens.models.decoder import decoder_of
from melens.results.edit import Edit

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def rows(smol):
    return prompts(n=3, length=48, bos=True).token_rows(smol.tokenizer)


@pytest.fixture(scope="module")
def me(smol):
    return locate(smol, prompts(n=3, length=48, bos=True))


def changes(smol, me, rows, *edits):
    """Mean loss change of each edit, nats a token."""
    items = [
        Forced(str(i), tuple(r), (False, *[True] * (len(r) - 1)), {}) for i, r in enumerate(rows)
    ]
    tried = [EditCondition("base", "base", BASE)] + [
        EditCondition(e.label, "dose", e) for e in edits
    ]
    sums = dict.fromkeys([c.name for c in tried], 0.0)
    for outcome in Runner(smol, tried, me).run(items):
        for name, found in outcome.found.items():
            sums[name] += sum(f.loss.mean().item() for f in found) / len(rows)
    return [sums[e.label] - sums["base"] for e in edits]


def test_by_activation_it_costs_and_by_gain_it_hardly_does(smol, me, rows):
    """Reference on WikiText: +0.24 and +0.004 nats; the smallest activations do no harm."""
    activation, gamma, after_next, bottom = changes(
        smol,
        me,
        rows,
        Edit(select="activation", rate=0.1),
        Edit(select="gamma", rate=0.5),
        Edit(select="activation", rate=0.1, layers="next"),
        Edit(select="bottom", rate=0.9),
    )
    assert 0.15 < activation < 0.8
    assert abs(gamma) < 0.06
    assert -0.02 < after_next < 0.12
    assert bottom < 0.03


def test_the_runner_equals_torch_hooks_of_ones_own(smol, me, rows):
    """The same mask, written down apart from melens, over whole forward passes."""
    ids = torch.tensor([row[:48] for row in rows[:2]])

    def loss():
        with torch.no_grad():
            logits = smol.original_model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:]).item()

    def zero(module, args, kwargs):
        x = kwargs["hidden_states"].clone()
        x[:, 0, x[:, 0].abs().mean(0).topk(57).indices] = 0
        return args, {**kwargs, "hidden_states": x}

    clean = loss()
    handles = [
        smol.blocks[layer].attn.register_forward_pre_hook(zero, with_kwargs=True)
        for layer in range(12, 30)
    ]
    expected = loss() - clean
    for handle in handles:
        handle.remove()
    found = changes(smol, me, [row[:48] for row in rows[:2]], Edit(select="activation", rate=0.1))
    assert found[0] == pytest.approx(expected, abs=1e-4)


def test_the_massive_dimension_has_next_to_no_gain_in_later_layers(smol, me, rows):
    """Why the largest gains are not where the token is: what the mask by gain holds of it."""
    decoder, dim = decoder_of(smol), me.massive[0].dim
    ranks = [int((decoder.gain(n).abs() < decoder.gain(n)[dim].abs()).sum()) for n in range(14, 30)]
    assert max(ranks) < 0.2 * decoder.d_model
    energy = {}
    for select in ("gamma", "activation", "bottom-gamma"):
        with torch.no_grad(), wemask(smol, me, rate=0.5, select=select) as record:
            smol(torch.tensor(rows[:1]), return_type="logits")
        energy[select] = record.mean_energy
    assert energy["gamma"] < 0.2 < 0.8 < energy["bottom-gamma"]
    assert energy["activation"] > 0.99
