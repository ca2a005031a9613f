"""Frozen results: plain numbers that know how they were made and can be drawn again."""

from melens.results.attention import AttentionMaps, HeadMap, TokenNorms
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
    "AttentionMaps",
    "Comparison",
    "Criteria",
    "Cumulative",
    "FinalGrowth",
    "FirstToken",
    "HeadMap",
    "KnownCheck",
    "LayerRow",
    "MELayer",
    "MassiveToken",
    "Result",
    "Stability",
    "Stage",
    "Writer",
    "TokenNorms",
    "load_result",
]
