"""Activation patching and ablation sweeps, resumed at the patch and run many at a time."""

from melens.patching.choices import MODES, Sweep
from melens.patching.metrics import (
    KL,
    METRICS_OF_PATCH,
    LogitDifference,
    Loss,
    MassiveCoordinate,
    PatchMetric,
    SinkRate,
)
from melens.patching.sites import SITES
from melens.patching.sweep import patch

__all__ = [
    "KL",
    "METRICS_OF_PATCH",
    "MODES",
    "SITES",
    "LogitDifference",
    "Loss",
    "MassiveCoordinate",
    "PatchMetric",
    "SinkRate",
    "Sweep",
    "patch",
]
