from __future__ import annotations

import numpy as np
import pytest
import torch

from melens.errors import MetricError
from melens.metrics import METRICS, cosines, effective_number, write_shares

X = torch.tensor([[1.0, -2.0, 2.0], [0.0, 0.0, 30.0], [3.0, -4.0, 0.0]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_magnitude", 30.0),
        ("layer_median", 2.0),  # |x| sorted: 0 0 0 1 2 2 3 4 30
        ("massive_ratio", 15.0),
        ("heaviest_norm_ratio", 6.0),  # norms 3, 30, 5 -> 30 / 5
    ],
)
def test_closed_forms(name, value):
    assert METRICS[name].fn(X).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_ignores_row_order_and_knows_its_scale(name):
    metric = METRICS[name]
    x = torch.randn(41, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(metric.fn(x), metric.fn(x.flip(0)))
    scaled = metric.fn(100 * x)
    expected = metric.fn(x) if metric.scale_invariant else 100 * metric.fn(x)
    torch.testing.assert_close(scaled, expected)


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_refuses_what_it_is_undefined_on(name):
    bad = X.clone()
    bad[1, 1] = float("nan")
    with pytest.raises(MetricError, match=r"1 non-finite values in \(3, 3\)"):
        METRICS[name].fn(bad)
    with pytest.raises(MetricError, match="empty"):
        METRICS[name].fn(X[:0])


def test_medians_agree_with_numpy():
    x = torch.randn(33, 9, generator=torch.Generator().manual_seed(1))
    assert METRICS["layer_median"].fn(x).item() == pytest.approx(
        float(np.median(np.abs(x.numpy()))), rel=1e-6
    )


def test_write_shares_and_the_start_sum_to_one():
    start = torch.tensor([1.0, 0.0])
    writes = torch.tensor([[1.0, 5.0], [8.0, -5.0]])
    end = start + writes.sum(0)
    shares = write_shares(writes, end)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.8], dtype=torch.float64))
    assert shares.sum().item() + (start @ end / (end @ end)).item() == pytest.approx(1)
    with pytest.raises(MetricError, match="zero end vector"):
        write_shares(writes, torch.zeros(2))


@pytest.mark.parametrize(
    ("shares", "number"),
    [([1.0, 0, 0], 1.0), ([0.25] * 4, 4.0), ([0.5, 0.5, -3.0], 2.0), ([0.5, 0.25, 0.25], 2**1.5)],
)
def test_effective_number(shares, number):
    assert effective_number(torch.tensor(shares)) == pytest.approx(number)


def test_effective_number_of_nothing_is_refused():
    with pytest.raises(MetricError, match="no positive share"):
        effective_number(torch.tensor([-1.0, 0.0]))


def test_cosines():
    steps = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    found = cosines(steps, torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(found, torch.tensor([0, 0.5**0.5, -1], dtype=torch.float64))
