"""Frozen results: plain numbers that know how they were made and can be drawn again."""

from melens.results.attention import AttentionMaps, HeadMap, TokenNorms
from melens.results.base import Result, load_result
from melens.results.check import (
    CacheNorms,
    CheckReport,
    Finding,
    PolicyUsed,
    Recommendation,
    RuleOutcome,
    StageRecord,
    load_located,
)
from melens.results.collapse import Collapse, CollapseRow
from melens.results.describe import TokenPortrait
from melens.results.diff import Difference
from melens.results.edit import Edit, EditFile
from melens.results.evaluation import Evaluation
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
from melens.results.patch import Axis, PatchGrid
from melens.results.reach import Reach
from melens.results.scan import Candidate, LayerCeiling, WeightScan
from melens.results.sinks import Sinks
from melens.results.super_weights import SuperWeight, SuperWeights
from melens.results.tune import Tuning

__all__ = [
    "AttentionMaps",
    "Axis",
    "CacheNorms",
    "Candidate",
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
