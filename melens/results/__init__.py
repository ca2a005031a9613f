"""Frozen results: plain numbers that know how they were made and can be drawn again."""

from melens.results.base import Result, load_result
from melens.results.known import Comparison, KnownCheck
from melens.results.locate import (
    Criteria,
    Cumulative,
    FinalGrowth,
    FirstToken,
    LayerRow,
    MassiveToken,
    MELayer,
    Stability,
    Stage,
    Writer,
)

__all__ = [
    "Comparison",
    "Criteria",
    "Cumulative",
    "FinalGrowth",
    "FirstToken",
    "KnownCheck",
    "LayerRow",
    "MELayer",
    "MassiveToken",
    "Result",
    "Stability",
    "Stage",
    "Writer",
    "load_result",
]
