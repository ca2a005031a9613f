"""scan(): every layer's ceilings from the weights alone, and what they predict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from melens import __version__
from melens.errors import ModelError
from melens.provenance import ModelFacts, RunInfo
from melens.results.scan import WeightScan
from melens.scanning.files import Checkpoint
from melens.scanning.kept import Kept
from melens.scanning.neurons import LayerScan, scan_layer
from melens.scanning.opening import open_checkpoint
from melens.scanning.plan import Plan, plan_of
from melens.scanning.predict import RULE, predict

LEAVES_OUT = (
    "what attention writes",
    "constant biases of the FFN's output",
    "neurons that write together",
)
ALONE = "after a norm, a neuron's ceiling is of that neuron alone"
HYBRID = "what linear-attention (DeltaNet) blocks write"


def scan(
    model: str | Path,
    *,
    device: str | None = None,
    revision: str | None = None,
    keep: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WeightScan:
    """Predict the ME Layer of a checkpoint from its weights; runs no model, needs no tokenizer.

    Reads the norm gains and FFN matrices, a piece at a time, in whatever dtype they are stored.

    Args:    model: a named model, a folder of safetensors, a ``.gguf`` file, or a hub id; of an id
             that is not in the hub's cache only the tensors needed are fetched, by range.
             device: where pieces are computed on; None = CUDA if there is one, else CPU.
             revision: branch, tag or commit of a hub id.
             keep: file that finished layers are kept in, so that an interrupted scan goes on; it
             stays when the scan is done.
             progress: called with (layers done, layers).
    Returns: ceilings by layer, candidates, and the predicted layers and dimensions.
    Raises:  ModelNotFoundError, ModelError: no such model, or a family without a layout.
             WeightsError: missing, truncated, misshapen or not finite; names file and tensor.
             FetchError: the hub is out of reach, or offline was asked for.
    """  # fmt: skip
    device = _device(device)
    files = open_checkpoint(model, revision=revision)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # a piece is too small to be shared: threads wait longer than they work
    try:
        plan = plan_of(files)
        key = "" if keep is None else f"{__version__} {files.key(times=True)} {device}"
        kept = Kept(keep, key)
        for layer in plan.layers:
            if layer.layer not in kept.layers:
                kept.add(scan_layer(files, plan, layer, device))
            if progress is not None:
                progress(layer.layer + 1, len(plan.layers))
        return _result(files, plan, kept.layers, device)
    finally:
        torch.set_num_threads(threads)
        files.close()


def _result(files: Checkpoint, plan: Plan, layers: dict[int, LayerScan], device: str) -> WeightScan:
    scans = [layers[layer.layer] for layer in plan.layers]
    profile = tuple(found.row for found in scans)
    said = predict(scans)
    kinds = {files.stored(f.down.name).kind for layer in plan.layers for f in layer.ffns}
    left = LEAVES_OUT
    if plan.layout.post is not None:
        left = (*left, ALONE)
    if plan.layout.hybrid:
        left = (*left, HYBRID)
    if plan.beyond is not None:
        left = (*left, f"layers from {plan.beyond} on, which the config does not count")
    return WeightScan(
        n_layers=len(scans), d_model=plan.d_model, me_layer=said.me_layer,
        erase_layer=said.erase_layer, dims=said.dims, confidence=said.confidence, rule=RULE,
        candidates=said.candidates, profile=profile, covered=all(row.covered for row in profile),
        leaves_out=left,
        run=RunInfo.collect(
            ModelFacts(files.name, files.revision, None, " ".join(sorted(kinds)) or "-", device),
            seed=0,
            settings={"files": files.key(), "format": files.kind, "layers": len(scans)},
        ),
    )  # fmt: skip


def _device(device: str | None) -> str:
    """A device that can be used.

    Raises:  ModelError: it cannot.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        first = " ".join(str(error).split())[:90]
        raise ModelError(f"device {device!r} cannot be used: {first}") from None
    return device
