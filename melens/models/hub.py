"""What the hub is asked, and what its clients raise, said one way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from melens.errors import FetchError, MelensError, ModelNotFoundError
from melens.models.complaints import first_line
from melens.models.named import NAMED

OFFLINE = "offline was asked for"


@contextmanager
def asking_the_hub(name: str) -> Iterator[None]:
    """Around whatever asks the hub about a model.

    Raises:  ModelNotFoundError: a name that the hub cannot have. FetchError: anything else that
             its clients raise; melens' own errors stay what they are.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (MelensError, MemoryError):
        raise
    except Exception as error:  # each HTTP client has errors of its own
        said = first_line(error)
        if isinstance(error, HFValidationError) or "valid model identifier" in said:
            raise ModelNotFoundError(f"{NAMED.unknown(name)} The hub knows none either.") from None
        why = _meant(error) or f"the hub could not be read: {said.rstrip('.')}; see: melens models"
        raise FetchError(f"{name} is no named model and no folder here, and {why}") from None


def _meant(error: Exception) -> str:
    """What the hub's common answers mean; its own words quote addresses that are cut short."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "on the hub its terms must be accepted first; do so there, then: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has none of that name, or a private one (then: hf auth login)."
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has that model, but not this revision."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the hub has no config.json of it; give a causal LM's id."
    return ""


def ask_once(name: str, revision: str | None) -> None:
    """Whether the hub can be asked for a model's config. Its clients would ask again and again,
    for half a minute, and say so each time.

    Raises:  as :func:`asking_the_hub`.
    """  # noqa: D205
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with asking_the_hub(name):
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub id means now; one, whatever is pushed meanwhile.

    Raises:  as :func:`asking_the_hub`.
    """
    from huggingface_hub import model_info

    with asking_the_hub(name):
        return model_info(name, revision=revision).sha
