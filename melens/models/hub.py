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
        raise FetchError(
            f"{name} is no named model and no folder here, and the hub could not be read: {said}"
        ) from None


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub id means now; one, whatever is pushed meanwhile.

    Raises:  as :func:`asking_the_hub`.
    """
    from huggingface_hub import model_info

    with asking_the_hub(name):
        return model_info(name, revision=revision).sha
