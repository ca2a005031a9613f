"""The rules, in the order in which a report lists them; the modules register them."""

from melens.checking.findings import numbers, first_tokens, causes, structure, quantised  # noqa: I001 (their order)
from melens.checking.findings.core import (
    RULES,
    RuleCard,
    Judgement,
    Rule,
    Unmeasured,
    Measured,
    rule,
)

MODULES = (numbers, first_tokens, causes, structure, quantised)
"""Imported for what they register."""

__all__ = ["MODULES", "RULES", "Judgement", "Measured", "Rule", "RuleCard", "Unmeasured", "rule"]
