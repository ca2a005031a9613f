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
        raise _said_of(error, name) from None


def _said_of(error: Exception, name: str) -> FetchError | ModelNotFoundError:
    """What the hub's common answers mean; its own words quote addresses that are cut short."""
    from huggingface_hub import errors

    here = f"{name} is no named model and no folder here, and"
    if isinstance(error, errors.GatedRepoError):
        return FetchError(f"{name} is gated: accept its terms on the hub, then run: hf auth login")
    if isinstance(error, errors.RepositoryNotFoundError):
        way_out = "if it is private, run: hf auth login"
        return ModelNotFoundError(f"{here} the hub has no model of that name; {way_out}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FetchError(f"the hub has {name}, but not this revision of it.")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return FetchError(f"{name} has no config.json on the hub; give a causal LM's id.")
    why = first_line(error).rstrip(".")
    return FetchError(f"{here} the hub could not be read: {why}; see: melens models")


def reach_hub(name: str, revision: str | None) -> None:
    """Ask the hub once for a model's config: where it is out of reach its clients would go on for
    half a minute, and say so each time. Whatever it answers is for whoever asks next.

    Raises:  FetchError: it does not answer.
    """  # noqa: D205
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError):
        return
    except Exception as error:  # each HTTP client has errors of its own
        raise _said_of(error, name) from None


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub id means now; one, whatever is pushed meanwhile.

    Raises:  as :func:`asking_the_hub`.
    """
    from huggingface_hub import model_info

    with asking_the_hub(name):
        return model_info(name, revision=revision).sha
