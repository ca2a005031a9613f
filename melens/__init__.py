"""melens: where massive activations come from, and what they do. Layers count from 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melens.batches import Batch, prompts
    from melens.capture import stream
    from melens.emergence import locate
    from melens.isolation import isolate, super_weights
    from melens.knowledge import known
    from melens.measure import attention, collapse, describe, sinks
    from melens.models import load
    from melens.patching import patch
    from melens.results import load_result

__version__ = "0.1.0"

_HOMES = {
    "Batch": "melens.batches",
    "attention": "melens.measure",
    "collapse": "melens.measure",
    "describe": "melens.measure",
    "isolate": "melens.isolation",
    "known": "melens.knowledge",
    "load": "melens.models",
    "load_result": "melens.results",
    "locate": "melens.emergence",
    "patch": "melens.patching",
    "prompts": "melens.batches",
    "sinks": "melens.measure",
    "stream": "melens.capture",
    "super_weights": "melens.isolation",
}
__all__ = [
    "Batch",
    "attention",
    "collapse",
    "describe",
    "isolate",
    "known",
    "load",
    "load_result",
    "locate",
    "patch",
    "prompts",
    "sinks",
    "stream",
    "super_weights",
]


def __getattr__(name: str) -> Any:
    """Load public names on first use, so that ``import melens`` never imports torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'melens' has no attribute {name!r}; it has {__all__}.")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
