"""sidecar: what other tools need of a model's massive activations, as one small file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melens.cli import options as opt
from melens.cli import output
from melens.cli.job import Job, read_scan
from melens.errors import MelensError, ResultError
from melens.progress import remark
from melens.results.base import kind_name

if TYPE_CHECKING:
    from melens.results.scan import WeightScan
    from melens.results.super_weights import SuperWeights


def sidecar(
    model: opt.Model,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, e.g. massive.json.")],
    reader: Annotated[
        bool,
        typer.Option(
            "--reader", help="Write massive_mask.py beside it: reads it with torch alone."
        ),
    ] = False,
    scan: Annotated[
        Path | None,
        typer.Option(help="This model's scan.json (default: scan its weights now)."),
    ] = None,
    super_weights: Annotated[
        Path | None,
        typer.Option(help="This model's super-weights.json: adds weights whose loss was measured."),
    ] = None,
    located: opt.Located = None,
    texts: opt.TextOptions,
    as_json: opt.Json = False,
    run: opt.RunOptions,
) -> None:
    """Write what quantisers, servers and trainers need to know of MODEL's massive activations.

    Layer by layer: a threshold that tells massive tokens from others, the massive dimensions with
    sign and size, and what ordinary tokens reach. Beside it: ids of massive first tokens, weights
    and experts to protect, dimensions that are large on all tokens. Layers count from 0.

    Examples:
      melens sidecar smollm2-135m -o massive.json --reader

      melens sidecar ./my-model --located runs/locate/locate.json -o massive.json
    """
    if out.suffix.lower() != ".json":
        raise ResultError(f"--out {out} is not a .json file; name one, e.g. massive.json.")
    output.refuse_unwritable_file("--out", out)
    job = Job.of(model, run, texts=texts, located=located)
    found = searched(super_weights)
    scanned = read_scan(scan)
    loaded, prompts = job.load()
    from melens.exporting.sidecars import sidecar as measure
    from melens.exporting.sidecars import write_sidecar

    where = job.locate(loaded, prompts)
    scanned = scanned or _scanned(model, run)
    result = measure(loaded, where, prompts, scan=scanned, super_weights=found)
    for path in write_sidecar(result, out, reader=reader):
        remark(f"wrote {path}")
    output.show(result, as_json=as_json)


def _scanned(model: str, run: opt.RunOptions) -> WeightScan | None:
    from melens.scanning import scan

    try:
        return scan(model, revision=run.revision, reach=False)
    except MelensError as error:
        output.note(f"no weights are protected, since MODEL cannot be scanned: {error}")
        return None


def searched(path: Path | None) -> SuperWeights | None:
    """Saved super weights.

    Raises:  ResultError: the file holds something else.
    """
    from melens.results import SuperWeights, load_result

    if path is None:
        return None
    found = load_result(path)
    if not isinstance(found, SuperWeights):
        raise ResultError(
            f"{path} holds a result of '{kind_name(found)}'; give a super-weights.json."
        )
    return found
