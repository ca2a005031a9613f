"""The pre-deployment check: stages, policy, findings, one verdict."""

from melens.checking.policy import PRESETS, Policy, read_policy

__all__ = ["PRESETS", "Policy", "read_policy"]
