"""melens: where massive activations come from, and what they do. Layers count from 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melens.batches import prompts
    from melens.checking import check
    from melens.evaluating import evaluate
    from melens.exporting import export, load
    from melens.finetuning import EmergenceCallback, finetune
    from melens.interventions import wemask
    from melens.isolating import isolate, super_weights
    from melens.locating import locate
    from melens.measuring import collapse, describe, sinks
    from melens.patching import patch
    from melens.scanning import scan
    from melens.sweeping import sweep
    from melens.tuning import tune

__version__ = "0.1.0"

_HOMES = {
    "EmergenceCallback": "melens.finetuning",
    "check": "melens.checking",
    "collapse": "melens.measuring",
    "describe": "melens.measuring",
    "evaluate": "melens.evaluating",
    "export": "melens.exporting",
    "finetune": "melens.finetuning",
    "isolate": "melens.isolating",
    "load": "melens.exporting",
    "locate": "melens.locating",
    "patch": "melens.patching",
    "prompts": "melens.batches",
    "scan": "melens.scanning",
    "sinks": "melens.measuring",
    "super_weights": "melens.isolating",
    "sweep": "melens.sweeping",
    "tune": "melens.tuning",
    "wemask": "melens.interventions",
}
__all__ = [
    "EmergenceCallback",
    "check",
    "collapse",
    "describe",
    "evaluate",
    "export",
    "finetune",
    "isolate",
    "load",
    "locate",
    "patch",
    "prompts",
    "scan",
    "sinks",
    "super_weights",
    "sweep",
    "tune",
    "wemask",
]


def __getattr__(name: str) -> Any:
    """Load public names and modules on first use, so that ``import melens`` imports no torch."""
    import importlib
    import importlib.util

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"melens.{name}") is not None:
        return importlib.import_module(f"melens.{name}")
    raise AttributeError(f"module 'melens' has no attribute {name!r}; it has {__all__}.")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
