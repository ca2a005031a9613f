"""What did the user name? Every way of opening a model gives the same answer, before any work."""

from __future__ import annotations

import pytest

from melens import load
from melens.comparing.sides import read_side
from melens.errors import MelensError
from melens.models import NAMED
from melens.models.opening import open_checkpoint
from melens.models.resolve import asked
from melens.streaming.streamed import load_streamed

WAYS = [load, load_streamed, open_checkpoint]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.bin").write_bytes(b"x")
    (tmp_path / "whole.GGUF").write_bytes(b"GGUF")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "shown"),
    [
        (next(iter(NAMED)), "named", next(iter(NAMED))),
        ("{}/folder/../folder/", "folder", "folder"),
        ("{}/whole.GGUF", "gguf", "whole.GGUF"),
        ("some/model", "hub", "some/model"),
        ("gpt2", "hub", "gpt2"),
    ],
)
def test_what_a_name_is(name, kind, shown, place):
    found = asked(name.format(place))
    assert (found.kind, found.shown, found.is_local) == (kind, shown, kind != "hub")


@pytest.mark.parametrize(
    "name", [" ", "{}/none", "{}/none.gguf", "{}/other.bin", next(iter(NAMED))[:-1]]
)
def test_every_way_refuses_it_alike(name, place):
    name = name.format(place)
    said = set()
    for way in (asked, *WAYS, read_side):
        with pytest.raises(MelensError) as found:
            way(name)
        said.add((type(found.value), str(found.value)))
    assert len(said) == 1


@pytest.mark.parametrize("name", [next(iter(NAMED)), "{}/folder", "{}/whole.GGUF"])
def test_a_revision_of_a_local_model_is_refused_before_it_is_opened(name, place):
    for way in WAYS:
        with pytest.raises(MelensError, match="revision belongs to a hub id"):
            way(name.format(place), revision="main")
