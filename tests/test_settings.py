"""Items, Compare and Run: what cannot be meant is one line, before any model is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from melens.errors import InterventionError
from melens.settings import Compare, Items, Run, setting_of


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Items(bos="yes"), "bos must be True, False or None, got 'yes'"),
        (lambda: Items(n="2"), "n must be a whole number, at least 1, got '2'"),
        (lambda: Items(n=True), "n must be a whole number"),
        (lambda: Items(data=3), "data must be a path, got 3"),
        (lambda: Compare(rates=0.5), r"rates must be a list, \(\) for none, got 0.5"),
        (lambda: Compare(rivals="zero"), "rivals must be a list"),
        (lambda: Compare(rates=(float("nan"),)), "a dose must be from 0 to 1, got nan"),
        (lambda: Compare(rates=("0.5",)), "a dose must be from 0 to 1, got '0.5'"),
        (lambda: Compare(seeds=(-1,)), "a seed must be a whole number, at least 0, got -1"),
        (lambda: Run(keep=3), "keep must be a path, got 3"),
        (lambda: Run(seed="a"), "seed must be a whole number, at least 0, got 'a'"),
        (lambda: Run(max_new_tokens=0), "max_new_tokens must be a whole number, at least 1"),
        (lambda: setting_of({"n": 2}, Items, "items"), "items must be a melens.evaluating.Items"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, said):
    with pytest.raises(InterventionError, match=said):
        make()


def test_lists_and_names_of_files_are_taken():
    assert Compare(rates=[0.1], seeds=range(2)).seeds == (0, 1)
    assert Run(keep="rows.jsonl").keep == Path("rows.jsonl")
    assert setting_of(None, Items, "items") == Items()


def test_an_order_is_a_permutation_that_the_seed_alone_decides():
    from melens.intervals import random_order

    one, again, other = (random_order(50, seed=seed).tolist() for seed in (1, 1, 2))
    assert sorted(one) == list(range(50))
    assert one == again != other
