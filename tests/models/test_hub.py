"""A hub that is out of reach is asked once; its cache here is used; its answers are one line."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import errors

from melens.errors import FetchError, MelensError, ModelNotFoundError
from melens.models import loading
from melens.models.hub import asking_the_hub
from melens.streaming.streamed import load_streamed


@pytest.fixture
def asked(monkeypatch):
    """What the hub was asked, which nobody can reach."""
    found = []

    def unreachable(url, **_):
        found.append(url)
        raise ConnectionError("no route")

    for name in ("HF_HUB_OFFLINE", "MELENS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    return found


@pytest.mark.parametrize("name", ["nosuch", "nosuch/model"])
@pytest.mark.parametrize("ask", [loading.load, loading.load_plain, load_streamed])
def test_a_hub_out_of_reach_is_asked_once(ask, name, asked):
    with pytest.raises(FetchError, match=r"the hub could not be read: no route") as caught:
        ask(name)
    assert str(caught.value).startswith(f"{name} is no named model and no folder here")
    assert [url.partition(f"/{name}/")[2] for url in asked] == ["resolve/main/config.json"]


def test_out_of_reach_the_cache_here_is_used(asked, make_tiny, tokenizer, tmp_path, monkeypatch):
    snapshot = tmp_path / "c0ffee"
    make_tiny("llama").save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    monkeypatch.setattr(loading, "kept_copy", lambda *_: snapshot)
    _, _, origin = loading.load_plain("some/model")
    assert (origin.name, origin.revision) == ("some/model", "c0ffee")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (errors.RepositoryNotFoundError, "the hub has no model of that name"),
        (errors.GatedRepoError, "accept its terms on the hub"),
        (errors.RevisionNotFoundError, "not this revision"),
        (errors.RemoteEntryNotFoundError, "no config.json"),
    ],
)
def test_the_hubs_answers_are_said_without_addresses(kind, says):
    with pytest.raises(MelensError, match=says) as caught, asking_the_hub("a/b"):
        raise kind.__new__(kind, "404 Client Error for url: https://huggingface.co/a/b/resolve")
    assert "http" not in str(caught.value)
    unknown = kind is errors.RepositoryNotFoundError
    assert isinstance(caught.value, ModelNotFoundError if unknown else FetchError)


@pytest.mark.parametrize("kind", [errors.RepositoryNotFoundError, errors.HfHubHTTPError])
def test_a_hub_that_answers_is_asked_on_and_no_cache_is_taken(kind, monkeypatch, asked):
    """A busy one too: its client tries again."""

    def answer(url, **_):
        asked.append(url)
        raise kind.__new__(kind, "503")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    monkeypatch.setattr(loading, "kept_copy", lambda *_: pytest.fail("the cache was looked at"))
    went_on = []
    monkeypatch.setattr(loading, "_check_hub", lambda name, **_: went_on.append(name))
    how = {"revision": "abc", "trust_remote_code": False}
    assert loading.source_of(loading.asked("some/model"), **how) == "some/model"
    assert went_on == ["some/model"]
    assert asked[0].endswith("/some/model/resolve/abc/config.json")
