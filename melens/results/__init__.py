"""Frozen results: plain numbers that know how they were made and can be drawn again."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from melens.results.base import Result

if TYPE_CHECKING:
    from melens.results.attention import AttentionMaps, HeadMap, TokenNorms
    from melens.results.census import Census, CensusRow
    from melens.results.check import (
        CacheNorms,
        CheckReport,
        Finding,
        PolicyUsed,
        Recommendation,
        RuleOutcome,
        StageRecord,
    )
    from melens.results.collapse import Collapse, CollapseRow
    from melens.results.describe import TokenPortrait
    from melens.results.diff import Difference
    from melens.results.edit import Edit, EditFile
    from melens.results.evaluation import Evaluation
    from melens.results.finetune import FineTuning
    from melens.results.isolate import Isolation
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
    from melens.results.long_context import LongContext
    from melens.results.metric import MetricProfile
    from melens.results.mixers import Mixers
    from melens.results.patch import Axis, PatchGrid
    from melens.results.reach import Reach
    from melens.results.reading import load_located, load_result
    from melens.results.scan import Candidate, LayerCeiling, WeightScan
    from melens.results.sinks import Sinks
    from melens.results.super_weights import SuperWeight, SuperWeights
    from melens.results.tune import Tuning

_HOMES = {
    "AttentionMaps": "attention",
    "Axis": "patch",
    "CacheNorms": "check",
    "Candidate": "scan",
    "Census": "census",
    "CensusRow": "census",
    "CheckReport": "check",
    "Collapse": "collapse",
    "CollapseRow": "collapse",
    "Comparison": "known",
    "Criteria": "locate",
    "Cumulative": "locate",
    "Difference": "diff",
    "Edit": "edit",
    "EditFile": "edit",
    "Evaluation": "evaluation",
    "FinalGrowth": "locate",
    "FineTuning": "finetune",
    "Finding": "check",
    "FirstToken": "locate",
    "HeadMap": "attention",
    "Isolation": "isolate",
    "KnownCheck": "known",
    "LayerCeiling": "scan",
    "LayerRow": "locate",
    "LongContext": "long_context",
    "MELayer": "locate",
    "MassiveToken": "locate",
    "MetricProfile": "metric",
    "Mixers": "mixers",
    "PatchGrid": "patch",
    "PolicyUsed": "check",
    "Reach": "reach",
    "Recommendation": "check",
    "RuleOutcome": "check",
    "Sinks": "sinks",
    "Stability": "locate",
    "Stage": "locate",
    "StageRecord": "check",
    "SuperWeight": "super_weights",
    "SuperWeights": "super_weights",
    "TokenNorms": "attention",
    "TokenPortrait": "describe",
    "Tuning": "tune",
    "WeightScan": "scan",
    "Writer": "locate",
    "load_located": "reading",
    "load_result": "reading",
}

__all__ = [
    "AttentionMaps",
    "Axis",
    "CacheNorms",
    "Candidate",
    "Census",
    "CensusRow",
    "CheckReport",
    "Collapse",
    "CollapseRow",
    "Comparison",
    "Criteria",
    "Cumulative",
    "Difference",
    "Edit",
    "EditFile",
    "Evaluation",
    "FinalGrowth",
    "Finding",
    "FineTuning",
    "FirstToken",
    "HeadMap",
    "Isolation",
    "KnownCheck",
    "LayerCeiling",
    "LayerRow",
    "LongContext",
    "MELayer",
    "MassiveToken",
    "MetricProfile",
    "Mixers",
    "PatchGrid",
    "PolicyUsed",
    "Reach",
    "Recommendation",
    "Result",
    "RuleOutcome",
    "Sinks",
    "Stability",
    "Stage",
    "StageRecord",
    "SuperWeight",
    "SuperWeights",
    "TokenNorms",
    "TokenPortrait",
    "Tuning",
    "WeightScan",
    "Writer",
    "load_located",
    "load_result",
]


def __getattr__(name: str) -> object:
    """Load a kind of result on first use: preparing all of them takes longer than a plot."""
    if name not in _HOMES:
        raise AttributeError(f"module 'melens.results' has no attribute {name!r}.")
    return getattr(import_module(f"melens.results.{_HOMES[name]}"), name)
