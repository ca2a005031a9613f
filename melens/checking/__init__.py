"""The pre-deployment check: stages, policy, findings, one verdict."""

from melens.checking.budgets import BUDGETS, STAGES
from melens.checking.findings import RULES
from melens.checking.junit import junit_xml
from melens.checking.policy import PRESETS, Policy, read_policy
from melens.checking.run import check

__all__ = [
    "BUDGETS",
    "PRESETS",
    "RULES",
    "STAGES",
    "Policy",
    "check",
    "junit_xml",
    "read_policy",
]
