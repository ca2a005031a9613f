"""Ceilings: no input on the norm's sphere exceeds them, and gradient ascent comes within 1 %."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from melens.metrics.ceilings import (
    FLOORS,
    alone_after_norm,
    best_input,
    gated_reach,
    on_mean_zero,
    plain_reach,
    row_moments,
    squared_reach,
    whole_after_norm,
    with_constant,
)

D, NEURONS, INPUTS = 24, 16, 20_000


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def on_sphere(*, mean_zero=False, n=INPUTS, seed=5):
    """What a norm with no gain and no epsilon puts out."""
    x = draw(n, D, seed=seed)
    if mean_zero:
        x = x - x.mean(-1, keepdim=True)
    return x * D**0.5 / x.norm(dim=-1, keepdim=True)


def ascend(value, *, mean_zero=False, start=None, steps=400):
    """Largest ``value(z)`` of each neuron that gradient ascent on the sphere finds."""
    z = on_sphere(mean_zero=mean_zero, n=NEURONS, seed=9) if start is None else start.clone()
    z = z.requires_grad_()
    made = torch.optim.Adam([z], lr=0.05)
    best = torch.full((NEURONS,), -torch.inf, dtype=torch.float64)
    for _ in range(steps):
        x = z - z.mean(-1, keepdim=True) if mean_zero else z
        x = x * D**0.5 / x.norm(dim=-1, keepdim=True)
        found = value(x)
        best = torch.maximum(best, found.detach())
        made.zero_grad()
        (-found.sum()).backward()
        made.step()
    return best


def rows(seed=0, size=3.0):
    """Gate and up rows with a gain; every fourth pair nearly parallel, or nearly opposed."""
    w, u = size * draw(NEURONS, D, seed=seed), size * draw(NEURONS, D, seed=seed + 1)
    u[::4] = w[::4] + 0.2 * u[::4]
    u[1::4] = -w[1::4] + 0.2 * u[1::4]
    return w, u, draw(D, seed=seed + 2)


def test_moments_are_those_of_scaled_rows():
    w, u, gain = rows()
    found = row_moments(w, u, gain)
    torch.testing.assert_close(found.first, ((w * gain) ** 2).sum(-1))
    torch.testing.assert_close(found.second, ((u * gain) ** 2).sum(-1))
    torch.testing.assert_close(found.cross, ((w * gain) * (u * gain)).sum(-1))
    assert row_moments(None, u, gain).first.equal(found.second)


def test_the_bilinear_range_is_that_of_its_matrix():
    """The extreme eigenvalues of (w u^T + u w^T) / 2, by a solver."""
    w, u, gain = rows()
    found = gated_reach(row_moments(w, u, gain), D)
    for n in range(NEURONS):
        outer = torch.outer(w[n] * gain, u[n] * gain)
        values = torch.linalg.eigvalsh((outer + outer.T) / 2) * D
        assert found.positive[n] == pytest.approx(values[-1].item())
        assert found.negative[n] == pytest.approx(-values[0].item())
    cosine = torch.cosine_similarity(w * gain, u * gain, dim=-1)
    sizes = (w * gain).norm(dim=-1) * (u * gain).norm(dim=-1)
    torch.testing.assert_close(found.largest, D * sizes * (1 + cosine.abs()) / 2)


ACTS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "gelu_pytorch_tanh": lambda t: nn.functional.gelu(t, approximate="tanh"),
    "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("size", [0.05, 3.0])
def test_no_input_exceeds_the_gated_range(act, size):
    w, u, gain = rows(size=size)
    reach = gated_reach(row_moments(w, u, gain), D)
    z = on_sphere()
    made = ACTS[act](z @ (w * gain).T) * (z @ (u * gain).T)
    assert (made.amax(0) <= reach.positive).all()
    assert (-made.amin(0) <= reach.negative).all()


@pytest.mark.parametrize("mean_zero", [False, True])
def test_ascent_comes_within_a_percent_of_both_ends_of_the_gated_range(mean_zero):
    w, u, gain = rows(size=16.0)
    moments = row_moments(w, u, gain)
    if mean_zero:
        moments = on_mean_zero(moments, ((w * gain).sum(-1), (u * gain).sum(-1)), D)
    reach = gated_reach(moments, D)

    def activation(z):
        return nn.functional.silu((z * w * gain).sum(-1)) * (z * u * gain).sum(-1)

    for sign, bound in ((1, reach.positive), (-1, reach.negative)):
        found = torch.stack(
            [
                ascend(
                    lambda z, sign=sign: sign * activation(z),
                    mean_zero=mean_zero,
                    start=open_gates(w * gain, seed),
                    steps=800,
                )
                for seed in range(40, 44)
            ]
        ).amax(0)
        assert (found <= bound * (1 + 1e-9)).all()
        # the low end of nearly parallel rows is a ridge too narrow for ascent; the solver has it
        wide = bound > 0.05 * reach.largest
        assert wide.sum() >= 12
        assert (found >= 0.99 * bound)[wide].all()


def open_gates(gates, seed):
    """Random points of the sphere, on the side where each neuron's gate is open: SiLU is flat on
    the other."""
    z = on_sphere(n=NEURONS, seed=seed)
    return torch.where((z * gates).sum(-1, keepdim=True) > 0, z, -z)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_input_is_the_one_that_ascent_finds(sign):
    w, u, gain = rows(size=8.0)
    u = sign * torch.where((torch.cosine_similarity(w * gain, u * gain) >= 0)[:, None], u, -u)
    reach = gated_reach(row_moments(w, u, gain), D)
    for n in range(NEURONS):
        z = D**0.5 * best_input(w[n] * gain, u[n] * gain, mean_zero=False)
        assert z.norm() == pytest.approx(D**0.5)
        product = (z @ (w[n] * gain)) * (z @ (u[n] * gain))
        assert sign * product.item() == pytest.approx(reach.largest[n].item())
    flat = best_input(w[0], None, mean_zero=True)
    assert flat.sum().item() == pytest.approx(0, abs=1e-12)
    other = w[0] - w[0].mean()
    torch.testing.assert_close(flat, other / other.norm())


def test_layer_norm_outputs_are_bounded_with_gain_and_bias():
    """A real LayerNorm in front, its epsilon and bias and all."""
    w, u, gain = rows()
    shift, bias_w, bias_u = 0.5 * draw(D, seed=11), draw(NEURONS, seed=12), draw(NEURONS, seed=13)
    norm = nn.LayerNorm(D, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(gain)
        norm.bias.copy_(shift)
        x = norm(draw(INPUTS, D, seed=14) * torch.rand(INPUTS, 1, generator=rng(15)) * 50 + 7)
    sums = ((w * gain).sum(-1), (u * gain).sum(-1))
    moments = on_mean_zero(row_moments(w, u, gain), sums, D)
    offsets = (w @ shift + bias_w, u @ shift + bias_u)
    reach = gated_reach(with_constant(moments, offsets), D + 1)
    made = nn.functional.silu(x @ w.T + bias_w) * (x @ u.T + bias_u)
    assert (made.amax(0) <= reach.positive).all()
    assert (-made.amin(0) <= reach.negative).all()
    plain = plain_reach(moments.second, offsets[1], D, FLOORS["gelu"])
    single = nn.functional.gelu(x @ u.T + bias_u)
    assert (single.amax(0) <= plain.positive).all()
    assert (-single.amin(0) <= plain.negative).all()


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_ascent_reaches_the_plain_range(act):
    _, u, gain = rows(size=8.0)
    offset = draw(NEURONS, seed=3)
    reach = plain_reach(((u * gain) ** 2).sum(-1), offset, D, FLOORS[act])
    start = D**0.5 * nn.functional.normalize(u * gain + 0.2 * draw(NEURONS, D), dim=-1)
    found = ascend(lambda z: ACTS[act]((z * u * gain).sum(-1) + offset), start=start)
    assert (found <= reach.positive * (1 + 1e-9)).all()
    assert (found >= 0.99 * reach.positive).all()


def test_the_squared_relu_is_reached():
    """The ends of its argument are those of ReLU's, reached there; below zero it writes nothing."""
    _, u, gain = rows(size=8.0)
    offset, squared = draw(NEURONS, seed=3), ((u * gain) ** 2).sum(-1)
    reach = squared_reach(squared, offset, D)
    z = D**0.5 * nn.functional.normalize(u * gain, dim=-1)
    made = nn.functional.relu((z * u * gain).sum(-1) + offset).square()
    torch.testing.assert_close(made, reach.positive)
    anything = D**0.5 * nn.functional.normalize(draw(INPUTS, D, seed=21), dim=-1)
    tried = nn.functional.relu(anything @ (u * gain).T + offset).square()
    assert (tried.amax(0) <= reach.positive * (1 + 1e-9)).all()
    assert not reach.negative.any()


@pytest.mark.parametrize("act", ACTS)
def test_floors_are_the_depth_of_the_dip(act):
    t = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    depth = -ACTS[act](t).min().item()
    assert depth <= FLOORS[act] <= depth + 2e-5
    share = ACTS[act](t)[t != 0] / t[t != 0]
    assert share.min() >= 0
    assert share.max() <= 1


def test_a_norm_behind_the_ffn_bounds_the_whole_and_one_neuron_reaches_its_own():
    down, gain = draw(D, NEURONS, seed=1), draw(D, seed=2)
    whole = whole_after_norm(gain)
    alone = alone_after_norm((down * gain[:, None]).abs().amax(0), (down**2).sum(0), D)

    def normed(y):
        return gain * y * D**0.5 / y.norm(dim=-1, keepdim=True)

    for n in range(NEURONS):
        assert normed(37.0 * down[:, n]).abs().max().item() == pytest.approx(alone[n].item())
    together = normed(draw(INPUTS, NEURONS, seed=4) @ down.T).abs().amax(0)
    assert (together <= whole).all()
    # neurons together pass what any of them reaches alone: that is why both numbers are given
    k = int(gain.abs().argmin())
    aim = torch.linalg.lstsq(down, torch.eye(D, dtype=torch.float64)[:, k, None]).solution[:, 0]
    reached = normed(aim @ down.T)[k].abs()
    singles = D**0.5 * gain[k].abs() * down[k].abs() / down.norm(dim=0)
    assert reached > singles.max()
    assert reached <= whole[k] * (1 + 1e-9)
    dead = alone_after_norm(torch.zeros(1), torch.zeros(1), D)
    assert dead.item() == 0.0
