"""Results compared with published numbers; the numbers and their sources ship with melens."""

from melens.published.holding import LEAST_TEXTS, known, known_by
from melens.published.record import (
    ALIASES,
    PublishedProfile,
    PublishedRow,
    known_models,
    profiles,
    published_profile,
    published_rows,
    record,
    same_name,
)
from melens.published.weights import (
    check_known,
    hold_sinks,
    hold_super_weights,
    known_scan,
    with_known,
)

__all__ = [
    "ALIASES",
    "LEAST_TEXTS",
    "PublishedProfile",
    "PublishedRow",
    "check_known",
    "hold_sinks",
    "hold_super_weights",
    "known",
    "known_by",
    "known_models",
    "known_scan",
    "profiles",
    "published_profile",
    "published_rows",
    "record",
    "same_name",
    "with_known",
]
