"""scan."""

from __future__ import annotations

from melens.cli import options as opt
from melens.network import go_offline
from melens.progress import progress_on

LAYERS = "scan-layers.jsonl"
"""File in --out that finished layers are kept in; removed at the end."""


def scan(
    model: opt.Model,
    out: opt.Out = None,
    as_json: opt.Json = False,
    device: opt.Device = "auto",
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    quiet: opt.Quiet = False,
) -> None:
    """Predict MODEL's ME Layer from its weights alone: nothing is run, no tokenizer is needed.

    For every layer, the most that a single FFN neuron could write into one coordinate of the
    residual stream, norm gains included; then the neurons that stand out, the coordinates they
    share, and the layers where those are made and erased. Reads the weights a piece at a time, so
    models that do not fit into memory can be scanned. Of a Hugging Face id only the tensors that
    are needed are fetched. Interrupted, a scan with --out goes on where it was.

    Examples:
      melens scan smollm2-135m --out runs/scan

      melens scan ./Llama-3.1-8B --json
    """
    from melens.cli import output

    if offline:
        go_offline()
    out = output.writable(out)
    from melens.scanning import scan as look

    kept = None if out is None else out / LAYERS
    with progress_on("layers") as tick:
        result = look(
            model, device=None if device == "auto" else device, revision=revision, keep=kept,
            progress=tick,
        )  # fmt: skip
    output.save(result, out, "scan", "scan")
    if kept is not None:
        kept.unlink(missing_ok=True)
    output.show(result, as_json=as_json, folder=out)
