"""census(): every model of a machine scanned, located if asked, and held against the record."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from melens import __version__
from melens.comparing.found_models import FoundModel, find_models, require_here
from melens.errors import MelensError, ModelError, OutputError
from melens.formatting import brief, printable
from melens.protocols import JsonObject
from melens.provenance import ModelFacts, RunInfo
from melens.published import known, published_profile, published_rows
from melens.results.census import Census, CensusRow
from melens.results.known import KnownCheck
from melens.results.locate import MELayer
from melens.results.scan import WeightScan
from melens.results.sinks import Sinks
from melens.settings import require_path
from melens.store import Heading, KeptRows, Refusal, RowFormat, digest, hash_facts, write_atomically

if TYPE_CHECKING:
    from melens.batches import Prompts
    from melens.models.checkpoint import Checkpoint

KEPT = "census-rows.jsonl"
"""File in ``out`` that finished models are kept in; removed when all are there."""
SCHEMA = "melens/census-rows/1"
Progress = Callable[[int, int, str], None]
ROOM = 0.8
"""Of the machine's memory, what a model may fill."""
REFUSAL = Refusal(
    damaged="{path} is damaged at line {line}; remove it, or choose another --out.",
    foreign="{path} holds no rows of a census; choose another --out.",
    other="{path} holds rows of a census with other settings or another version of melens; remove "
    "it, or choose another --out.",
)
LONGEST_ERROR = 300
LONGEST_FOLDER = 100


@dataclass(frozen=True)
class Survey:
    """How every model is looked at."""

    locate: bool = False
    """Whether models are run, to locate the ME Layer and measure the sinks; else only scanned."""
    reach: bool | None = None
    """As for ``scan``: whether first tokens are run; None = where the files are safetensors of 8 GB
    at most."""
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 4
    seed: int = 0

    def facts(self, prompts: Prompts | None) -> JsonObject:
        """All that numbers depend on beside the weights."""
        texts = None if prompts is None or not self.locate else hash_facts(repr(prompts))
        return {"melens": __version__, "survey": vars(self), "texts": texts}


def census(
    models: Sequence[str | Path] = (),
    prompts: Prompts | None = None,
    *,
    survey: Survey | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Census:
    """Find the ME Layer of every model of a machine, and hold it against the published record.

    Each is scanned (``melens.scan``: weights alone, and a few first tokens), located if asked. A
    model that fails is a row with its error; the others go on.

    Args:    models: named models, hub ids, model folders, ``.gguf`` files and folders of those.
             () = what the hub's cache and melens' own hold.
             prompts: what ``melens.prompts`` makes; None = the bundled texts, 8 x 128 tokens.
             survey: what is run, and how; None = scans alone.
             out: folder that every model's scan.json and locate.json go to, and its row as soon
             as it is finished: an interrupted census goes on there. None = nothing is written.
             progress: called with (models done, models, the one that is next).
    Returns: a frozen :class:`Census`, one row a model.
    Raises:  ModelNotFoundError, ModelError: a place without a model, before any is read.
             ResultError: ``out`` holds rows of a census with other settings. OutputError: ``out``
             cannot be written.
    """
    survey = survey or Survey()
    if not isinstance(survey, Survey):
        raise ModelError(f"survey must be a Survey, got {brief(survey, 40)}.")
    folder = None if out is None else require_path("out", out)
    if not isinstance(models, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]  (a user gives anything)
        raise ModelError(f"models must be names and paths, got {brief(models, 40)}.")
    asked = [models] if isinstance(models, (str, Path)) else list(models)
    found = find_models(asked)
    require_here(found)
    facts = survey.facts(prompts)
    kept = _kept(folder, facts)
    rows = []
    for done, one in enumerate(found):
        if progress is not None:
            progress(done, len(found), one.name)
        rows.append(_row(one, survey, prompts, kept, folder))
    if progress is not None:
        progress(len(found), len(found), found[-1].name)
    settings = {"models": len(found), "located": survey.locate, "survey": hash_facts(facts)}
    told = ModelFacts(f"{len(found)} models", None, None, survey.dtype or "-", survey.device or "-")
    run = RunInfo.collect(told, seed=survey.seed, settings=settings)
    return Census(asked=tuple(map(str, asked)), models=tuple(rows), run=run)


def remove_kept(folder: Path) -> None:
    """The census is written: its rows are not needed any more."""
    from melens.store import remove_file

    remove_file(folder / KEPT)


def _kept(folder: Path | None, facts: JsonObject) -> KeptRows[str, CensusRow]:
    form: RowFormat[str, CensusRow] = RowFormat(
        name=lambda row: row.name,
        write=lambda row: json.dumps(row.model_dump(mode="json")),
        read=CensusRow.model_validate_json,
        refusal=REFUSAL,
    )
    path = None if folder is None else folder / KEPT
    return KeptRows(path, form, Heading(SCHEMA, hash_facts(facts), facts))


def _row(
    one: FoundModel,
    survey: Survey,
    prompts: Prompts | None,
    kept: KeptRows[str, CensusRow],
    folder: Path | None,
) -> CensusRow:
    """A model's row: kept, or made now. Failures are not kept, so that they are tried again."""
    from melens.models.opening import open_checkpoint

    row = CensusRow(name=one.name, kind=one.kind, files=None, error="not opened")
    try:
        files = open_checkpoint(one.model)
        try:
            row = _said_by(one, files)
        finally:
            files.close()
        before = kept.found.get(one.name)
        if before is not None and before.files == row.files:
            return before
        place = None if folder is None else folder / "models" / folder_of(one.name)
        made = _measured(one, row, survey, prompts, place)
    except OutputError:
        raise
    except Exception as error:  # a senseless config leads its readers to anything
        return row.model_copy(update={"error": _told(error), "how": None})
    finally:
        gc.collect()
    kept.add([made])
    return made


def _told(error: BaseException) -> str:
    """An error on one line; nobody asked for its traceback here."""
    said = " ".join(str(error).split())
    if not isinstance(error, MelensError):
        said = f"{type(error).__name__}: {said}"
    return printable(said)[:LONGEST_ERROR]


def _said_by(one: FoundModel, files: Checkpoint) -> CensusRow:
    """What the files say before any weight is read."""
    config = files.config
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else {}
    family = text.get("model_type") or config.get("model_type")
    return CensusRow(
        name=one.name,
        kind=one.kind,
        files=files.key(),
        family=family or config.get("general.architecture"),
        parameters=sum(math.prod(shape) for shape in files.shapes.values()),
        error="not measured",
    )


def folder_of(name: str) -> str:
    """A folder's name for a model: its own where that is one, else one that no other model has."""
    plain = "".join(c if c.isalnum() or c in "-._" else "_" for c in name).strip(".")[
        -LONGEST_FOLDER:
    ]
    return plain if plain == name else f"{plain}-{digest([name], length=8)}"


def _measured(
    one: FoundModel,
    row: CensusRow,
    survey: Survey,
    prompts: Prompts | None,
    place: Path | None,
) -> CensusRow:
    from melens.scanning import scan

    scanned = scan(one.model, device=survey.device, reach=survey.reach)
    _save(scanned, place, "scan")
    names = (one.name, *_given_names(one))
    made = row.model_copy(update={"error": None, **_of_scan(scanned), **_held(names, scanned)})
    if not survey.locate:
        return CensusRow.model_validate(made.model_dump())
    if (why := _too_large(row, survey)) is not None:
        return CensusRow.model_validate(made.model_copy(update={"note": why}).model_dump())
    try:
        located, sinks, note = _run(one, survey, prompts)
    except Exception as error:  # the scan stays
        note = f"not located: {_told(error)}"
        return CensusRow.model_validate(made.model_copy(update={"note": note}).model_dump())
    _save(located, place, "locate")
    if sinks is not None:
        _save(sinks, place, "sinks")
    update = {**_of_located(located, scanned), **_held(names, located, scanned.d_model)}
    update |= {"sink_rate": None if sinks is None else sinks.usual_rate, "note": note}
    return CensusRow.model_validate(made.model_copy(update=update).model_dump())


def _save(result: MELayer | WeightScan | Sinks, place: Path | None, name: str) -> None:
    if place is not None:
        write_atomically(place / f"{name}.json", result.to_json())


def _given_names(one: FoundModel) -> tuple[str, ...]:
    """What a ``.gguf`` file, or a copy of one, says that the model is called."""
    from melens.models.gguf import given_names

    return given_names(Path(one.model)) if one.kind in ("gguf", "folder") else ()


def _of_scan(scanned: WeightScan) -> JsonObject:
    seen = scanned.seen
    return {
        "n_layers": scanned.n_layers,
        "d_model": scanned.d_model,
        "how": "predicted",
        "me_layer": scanned.me_layer,
        "predicted": scanned.me_layer,
        "dims": scanned.dims,
        "largest": abs(seen.farthest.value) if seen is not None and seen.reached else None,
        "confidence": scanned.confidence,
    }


def _of_located(located: MELayer, scanned: WeightScan) -> JsonObject:
    sizes = [abs(token.value) for token in located.massive]
    return {
        "how": "located",
        "me_layer": located.me_layer,
        "predicted": scanned.me_layer,
        "verdict": located.verdict,
        "dims": tuple(dict.fromkeys(token.dim for token in located.massive)),
        "largest": max(sizes, default=None),
        "confidence": located.confidence,
    }


def _run(
    one: FoundModel, survey: Survey, prompts: Prompts | None
) -> tuple[MELayer, Sinks | None, str | None]:
    """The model located and its sinks; what has no attention has none, and a note says so."""
    from melens.inputs import prepare
    from melens.locating.search import locate_in
    from melens.measuring import sinks
    from melens.models import load

    model = load(one.model, device=survey.device, dtype=survey.dtype)
    inputs = prepare(model, prompts, batch_size=survey.batch_size)
    located = locate_in(inputs, seed=survey.seed)
    try:
        return located, sinks(inputs, located), None
    except MelensError as error:
        return located, None, f"no sinks: {_told(error)}"


def _held(
    names: Sequence[str], result: MELayer | WeightScan, d_model: int | None = None
) -> JsonObject:
    """The published ME Layer, and whether this result fits what is on record."""
    width = result.d_model if isinstance(result, WeightScan) else d_model
    checks = {name: known(name, result, d_model=width) for name in names}
    name = next((name for name, check in checks.items() if check.source is not None), None)
    if name is None:
        return {"published": None, "match": None, "off": None}
    check = checks[name]
    return {"published": _published(name), "match": check.verdict, "off": _off(check)}


def _published(name: str) -> str:
    """Published ME Layers, each once; "none" where a source says that there is none."""
    said: dict[str, None] = {}
    for row in published_rows(name):
        if row.get("steps"):
            said["+".join(map(str, row["steps"]))] = None
        elif "me_layer" in row:
            said["none" if row["me_layer"] is None else str(row["me_layer"])] = None
    profile = published_profile(name)
    if profile is not None and not said:
        layer = profile.answer().me_layer
        said["none" if layer is None else str(layer)] = None
    return " or ".join(said) or "no layer"


def _off(check: KnownCheck) -> str | None:
    bad = [row for row in check.comparisons if row.verdict == "mismatch"]
    said = [f"{row.what}: {row.off or row.measured}" for row in bad]
    return "; ".join(said) or None


def _too_large(row: CensusRow, survey: Survey) -> str | None:
    """Why a model is not run: it would not fit into this machine's memory."""
    from melens.models.loading import DTYPES

    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    width = 2 if survey.dtype == "auto" else DTYPES[survey.dtype or "float32"].itemsize
    needed = (row.parameters or 0) * width
    if needed <= ROOM * memory or survey.device not in (None, "cpu"):
        return None
    return (
        f"not located: {needed / 1e9:.0f} GB of weights do not fit into {memory / 1e9:.0f} GB; "
        "try: melens locate MODEL --stream"
    )
