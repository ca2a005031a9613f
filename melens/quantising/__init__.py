"""quantise(): loss under number formats, with what melens knows kept whole, and with controls."""

from importlib import import_module
from typing import TYPE_CHECKING

from melens.quantising.recipe import recipes, write_recipes
from melens.quantising.schemes import DEFAULT, SCHEMES

if TYPE_CHECKING:
    from melens.quantising.bench import Protect
    from melens.quantising.run import quantise

__all__ = ["DEFAULT", "SCHEMES", "Protect", "quantise", "recipes", "write_recipes"]
_HOMES = {"Protect": "bench", "quantise": "run"}


def __getattr__(name: str) -> object:
    """Load on first use: schemes and recipes are read without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'melens.quantising' has no attribute {name!r}.")
    return getattr(import_module(f"melens.quantising.{_HOMES[name]}"), name)
