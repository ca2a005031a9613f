"""Python's collector is put back as it was found."""

from __future__ import annotations

import gc

import pytest

from melens.collector import RARELY, rarely_collected


@pytest.fixture(autouse=True)
def found():
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_inside_it_is_rare_and_afterwards_as_found(found):
    with rarely_collected(), rarely_collected():
        assert gc.get_threshold() == (RARELY, *found[1:])
    assert gc.get_threshold() == found
    with pytest.raises(KeyError), rarely_collected():
        raise KeyError
    assert gc.get_threshold() == found


def test_calls_that_overlap_put_back_what_the_first_found(found):
    one, other = rarely_collected(), rarely_collected()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_threshold()[0] == RARELY
    other.__exit__(None, None, None)
    assert gc.get_threshold() == found


@pytest.mark.parametrize("own", [0, RARELY * 4])
def test_whoever_wants_it_off_or_rarer_still_has_that(own):
    gc.set_threshold(own)
    with rarely_collected():
        assert gc.get_threshold()[0] == own
    assert gc.get_threshold()[0] == own
