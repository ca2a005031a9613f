"""Loading, named models, hook-site names, and what a block is made of."""

from importlib import import_module
from typing import TYPE_CHECKING

from melens.models.anatomy import anatomy, gains

if TYPE_CHECKING:
    from melens.models.contract import check_contract
    from melens.models.loading import load, load_plain
    from melens.models.named import (
        NAMED,
        NamedModel,
        accept_licence,
        fetch,
        forget,
        on_this_machine,
    )
    from melens.models.origin import Origin, fingerprint, origin_of

_HOMES = {
    "NAMED": "named",
    "NamedModel": "named",
    "Origin": "origin",
    "accept_licence": "named",
    "check_contract": "contract",
    "fetch": "named",
    "fingerprint": "origin",
    "forget": "named",
    "load": "loading",
    "load_plain": "loading",
    "on_this_machine": "named",
    "origin_of": "origin",
}
__all__ = [
    "NAMED",
    "NamedModel",
    "Origin",
    "accept_licence",
    "anatomy",
    "check_contract",
    "fetch",
    "fingerprint",
    "forget",
    "gains",
    "load",
    "load_plain",
    "on_this_machine",
    "origin_of",
]


def __getattr__(name: str) -> object:
    """Load on first use: a model's name is looked up without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'melens.models' has no attribute {name!r}.")
    return getattr(import_module(f"melens.models.{_HOMES[name]}"), name)
