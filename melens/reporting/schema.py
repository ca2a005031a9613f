"""json_schema(): the shape of report.json, embedded results included."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from melens.reporting.sections import SECTIONS
from melens.results.base import Result
from melens.results.check import CheckReport

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a saved check; docs/report.schema.json is this.

    An embedded result is held to the schema of its kind where the page has a section for it.
    """
    kinds: list[type[Result]] = [part.kind for part in SECTIONS.values()]
    made, shared = models_json_schema(
        [(kind, "serialization") for kind in (CheckReport, *kinds)], ref_template="#/$defs/{model}"
    )
    definitions = shared["$defs"]
    top = definitions.pop(made[CheckReport, "serialization"]["$ref"].rsplit("/", 1)[1])
    names = [kind.schema_id for kind in kinds]
    unlisted = {
        "type": "object",
        "properties": {"schema": {"type": "string", "not": {"enum": names}}},
        "required": ["schema"],
    }
    held = [made[kind, "serialization"] for kind in kinds]
    top["properties"]["results"]["additionalProperties"] = {"oneOf": [*held, unlisted]}
    return {"$schema": DIALECT, **top, "title": "melens check report", "$defs": definitions}
