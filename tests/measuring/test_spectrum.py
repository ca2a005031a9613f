"""Spectral definitions: closed forms, an independent implementation, invariances, streaming."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from melens.batches import Batch
from melens.errors import CaptureError, MetricError, ModelError
from melens.measuring.rank_collapse import VARIANTS, EigenQueue, Spectra
from melens.metrics import METRICS, SPECTRAL
from melens.models.attention import HeadView

NAMES = list(SPECTRAL)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(values, rows=12, columns=9, seed=0):
    """A matrix with chosen singular values."""
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator(seed)).double()).Q
    right = torch.linalg.qr(
        torch.randn(columns, len(values), generator=generator(seed + 1)).double()
    )
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.Q.T


@pytest.mark.parametrize(
    ("name", "identity", "rank_one", "two_one_one"),
    [
        ("effective_rank", 5.0, 1.0, 2**1.5),  # p = 1/2, 1/4, 1/4: H = 1.5 ln 2
        ("participation_ratio", 5.0, 1.0, 36 / 18),  # (4 + 1 + 1)^2 / (16 + 1 + 1)
        ("stable_rank", 5.0, 1.0, 6 / 4),
        ("matrix_entropy", math.log(5), 0.0, math.log(6) - 4 / 6 * math.log(4)),
        ("top1_share", 1 / 5, 1.0, 4 / 6),
    ],
)
def test_closed_forms(name, identity, rank_one, two_one_one):
    measure = METRICS[name].fn
    assert measure(torch.eye(5)).item() == pytest.approx(identity, abs=1e-6)
    assert measure(torch.outer(torch.arange(1.0, 8), torch.arange(1.0, 5))).item() == pytest.approx(
        rank_one, abs=1e-6
    )
    assert measure(torch.diag(torch.tensor([2.0, 1, 1]))).item() == pytest.approx(two_one_one)
    assert measure(planted([2.0, 1.0, 1.0])).item() == pytest.approx(two_one_one, rel=1e-9)


def independent(name, x):
    """numpy, from the formulas of docs/definitions.md."""
    if name.endswith("_centred"):
        x, name = x - x.mean(axis=0), name.removesuffix("_centred")
    s = np.linalg.svd(x, compute_uv=False)
    s = s[s > 1e-12 * s[0]]
    p, q = s / s.sum(), s**2 / (s**2).sum()
    return {
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
        "stable_rank": np.linalg.norm(x) ** 2 / np.linalg.norm(x, 2) ** 2,
        "matrix_entropy": -(q * np.log(q)).sum(),
        "top1_share": s[0] ** 2 / (s**2).sum(),
    }[name]


@pytest.mark.parametrize("name", [name + end for name in NAMES for end in ("", "_centred")])
def test_an_independent_implementation_agrees(name):
    x = torch.randn(23, 11, generator=generator(3)).double() * torch.logspace(0, 2, 11) + 3
    assert METRICS[name].fn(x).item() == pytest.approx(independent(name, x.numpy()), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_rotations_change_nothing_and_centring_drops_a_shift(name):
    x = torch.randn(20, 7, generator=generator(4)).double()
    turn = torch.linalg.qr(torch.randn(7, 7, generator=generator(5)).double()).Q
    for ending in ("", "_centred"):
        measure = METRICS[name + ending].fn
        torch.testing.assert_close(measure(x @ turn), measure(x))
    shifted = x + torch.arange(7.0)
    centred = METRICS[f"{name}_centred"].fn
    torch.testing.assert_close(centred(shifted), centred(x))
    assert METRICS[name].fn(shifted).item() != pytest.approx(METRICS[name].fn(x).item(), rel=1e-3)


def test_one_row_can_fake_a_collapse():
    x = torch.randn(40, 16, generator=generator(6)).double()
    assert METRICS["effective_rank"].fn(x).item() > 13
    x[0] = 0
    x[0, 3] = 1e5
    assert METRICS["effective_rank"].fn(x).item() < 1.1
    assert METRICS["effective_rank"].fn(x[1:]).item() > 13


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_said_about_nothing(name):
    with pytest.raises(MetricError, match="all rows are zero"):
        METRICS[name].fn(torch.zeros(4, 3))
    with pytest.raises(MetricError, match="equal, where centred"):
        METRICS[f"{name}_centred"].fn(torch.ones(4, 3))


# --- the reducer -----------------------------------------------------------------------------


def stream_in(x, mask, heavy, view, sizes):
    """Feed ``x`` to a reducer in batches of the given sizes."""
    reducer = Spectra(view, list(heavy.split(sizes)))
    for part, keep in zip(x.split(sizes), mask.split(sizes), strict=True):
        reducer.update(part, Batch.of(torch.ones(keep.shape, dtype=torch.long), keep))
    return reducer.result()


def all_at_once(x, mask, heavy, view):
    """Every metric on the stored rows, sequence by sequence."""
    heads = view.by_head(x).double()
    found = torch.zeros(len(VARIANTS), len(NAMES), heads.shape[1], dtype=torch.float64)
    for v, variant in enumerate(VARIANTS):
        keep = mask & ~heavy if variant.startswith("without") else mask
        ending = "_centred" if variant.endswith("centred") else ""
        for d, name in enumerate(NAMES):
            for h in range(heads.shape[1]):
                values = [
                    METRICS[name + ending].fn(heads[i, h][keep[i]]) for i in range(len(heads))
                ]
                found[v, d, h] = torch.stack(values).mean()
    return found


LAYOUTS = {
    "tokens first, short": (HeadView("q", 0, "", "batch pos head d", 3), (6, 9, 3, 16)),
    "tokens first, long": (HeadView("q", 0, "", "batch pos head d", 3), (6, 21, 3, 8)),
    "heads first": (HeadView("q_norm", 0, "", "batch head pos d", 2), (6, 2, 13, 8)),
    "heads in one axis": (HeadView("k_norm", 0, "", "batch pos (head d)", 2), (6, 11, 16)),
    "no heads": (HeadView("ln1", 0, "", "batch pos d", None), (6, 14, 10)),
}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_streaming_equals_all_at_once(layout, side):
    view, shape = LAYOUTS[layout]
    x = torch.randn(shape, generator=generator(7)) + 0.5
    n = shape[2] if "heads first" in layout else shape[1]
    mask = torch.ones(6, n, dtype=torch.bool)
    if side != "none":
        for i in range(6):
            mask[i, slice(0, i) if side == "left" else slice(n - i, n)] = False
    heavy = torch.zeros_like(mask)
    heavy[::2, 6] = True
    heavy &= mask
    big = view.by_head(x)
    big[:, :, 6] *= 300  # a view of x: one row far larger than the others
    expected = all_at_once(x, mask, heavy, view)
    for sizes in ([6], [1, 2, 3]):
        found = stream_in(x, mask, heavy, view, sizes)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_rows_that_are_equal_have_no_centred_spectrum():
    view = HeadView("ln1", 0, "", "batch pos d", None)
    x = torch.randn(1, 1, 6, generator=generator(8)).expand(2, 9, 6)
    x = x + 1e-9 * torch.randn(2, 9, 6, generator=generator(9)).double()  # rounding, not rows
    mask = torch.ones(2, 9, dtype=torch.bool)
    found = stream_in(x, mask, ~mask, view, [2])
    kept = dict(zip(VARIANTS, found, strict=True))
    assert kept["with_centred"].isnan().all()
    assert kept["with"][NAMES.index("effective_rank")].item() == pytest.approx(1, abs=1e-6)


def test_activations_that_are_not_finite_are_refused_but_padding_may_be():
    view = HeadView("ln1", 0, "blocks.0.ln1.hook_out", "batch pos d", None)
    x = torch.randn(1, 5, 6, generator=generator(8))
    x[0, 4] = torch.nan
    mask = torch.tensor([[True, True, True, True, False]])
    found = stream_in(x, mask, ~mask & mask, view, [1])
    assert found.isfinite().all()
    with pytest.raises(ModelError, match=r"blocks\.0\.ln1\.hook_out holds NaN or Inf"):
        stream_in(x, torch.ones_like(mask), ~mask & mask, view, [1])


def test_memory_does_not_grow_with_sequences():
    view = HeadView("q", 0, "", "batch pos head d", 3)
    x = torch.randn(2, 9, 3, 4, generator=generator(9))
    batch = Batch.of(torch.ones(2, 9, dtype=torch.long))
    reducer = Spectra(view, [torch.zeros(2, 9, dtype=torch.bool)] * 50)
    for _ in range(50):
        reducer.update(x, batch)
    reducer.result()
    assert not reducer.queue.waiting
    held = [value for value in vars(reducer).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in held) == 2 * len(VARIANTS) * len(NAMES) * 3
    assert int(reducer.counts.max()) == 100


def test_a_reducer_without_a_batch_has_no_answer():
    with pytest.raises(CaptureError, match="saw no batch"):
        Spectra(HeadView("ln1", 0, "", "batch pos d", None), []).result()


def test_a_full_queue_is_solved_at_once_and_threads_are_put_back(monkeypatch):
    monkeypatch.setattr("melens.measuring.rank_collapse.FLUSH_BYTES", 8 * 9 * 5)
    before, threads, queue, seen = torch.get_num_threads(), 2, EigenQueue(), []
    torch.set_num_threads(threads)
    x = torch.randn(4, 3, 3, generator=generator(10)).double()
    x = x + x.mT
    queue.submit([x[:1]], seen.append)
    assert not seen
    queue.submit([torch.eye(2).double()[None], x], seen.append)
    assert len(seen) == 1  # what waited was solved before more was taken in
    queue.flush()
    assert [[tuple(part.shape) for part in values] for values in seen] == [
        [(1, 3)],
        [(1, 2), (4, 3)],
    ]
    torch.testing.assert_close(seen[1][1], torch.linalg.eigvalsh(x))
    assert seen[1][0].tolist() == [[1, 1]]
    assert torch.get_num_threads() == threads
    queue.submit([torch.full((1, 9, 9), torch.nan).double()], seen.append)
    with pytest.raises(RuntimeError):
        queue.flush()
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
