"""quantise(): loss under number formats, with what melens knows kept whole, and with controls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from melens.quantising.schemes import DEFAULT, SCHEMES

if TYPE_CHECKING:
    from melens.quantising.bench import Protect
    from melens.quantising.run import quantise

__all__ = ["DEFAULT", "SCHEMES", "Protect", "quantise"]


def __getattr__(name: str) -> Any:
    """What needs torch, on first use: a policy names schemes and runs none."""
    if name == "Protect":
        from melens.quantising.bench import Protect

        return Protect
    if name == "quantise":
        from melens.quantising.run import quantise

        return quantise
    raise AttributeError(f"module 'melens.quantising' has no attribute {name!r}.")
