"""Rounded as melens does, and really quantised: the loss of SmolLM2-135M both ways.

    python experiments/10_quantised.py                               # compressed-tensors, a minute
    python experiments/10_quantised.py --library gguf                # transformers reads the files
    PYTHONPATH=. .interop/torchao/bin/python experiments/10_quantised.py --library torchao

TorchAO multiplies int8 by int8; compressed-tensors keeps int8 and multiplies after it. Both round
by a scale per output of the weights and, for w8a8-token, per token of what layers read. Prints the
losses, and how far one is from the other. make .interop/torchao/.test makes its environment.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from melens import prompts
from melens.batches import Batch
from melens.exporting.baked_gguf import copy_fields, source_gguf
from melens.models import load
from melens.quantising import SCHEMES
from melens.quantising.layers import plain_model
from melens.quantising.running import QuantisedModel, Spared, unquantised


def torchao(hf: Any, scheme: str) -> None:
    """Quantise the blocks' linear layers in place."""
    from torchao.quantization import (  # type: ignore[import-not-found]
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    dynamic = scheme == "w8a8-token"
    kind = Int8DynamicActivationInt8WeightConfig if dynamic else Int8WeightOnlyConfig
    quantize_(hf, kind(version=2), filter_fn=lambda module, name: _wanted(module, name))


def compressed_tensors(hf: Any, scheme: str) -> None:
    """The same, by compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStrategy,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = QuantizationArgs(num_bits=8, strategy=QuantizationStrategy.CHANNEL)
    inputs = QuantizationArgs(num_bits=8, strategy=QuantizationStrategy.TOKEN, dynamic=True)
    group = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=inputs if scheme == "w8a8-token" else None,
    )
    config = QuantizationConfig(config_groups={"all": group}, ignore=["lm_head"])
    apply_quantization_config(hf, config)
    for module in hf.modules():
        if hasattr(module, "weight_scale"):
            ends = module.weight.amin(-1, keepdim=True), module.weight.amax(-1, keepdim=True)
            module.weight_scale.data.copy_(calculate_qparams(*ends, weights)[0])
    compressor = ModelCompressor.from_pretrained_model(hf)
    assert compressor is not None
    compressor.compress_model(hf)


def logits_of(hf: Any, batch: Batch) -> torch.Tensor:
    """Logits of a model object."""
    return hf(batch.ids, use_cache=False).logits


def _wanted(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and ".layers." in name


def gguf_file(scheme: str, folder: Path) -> Any:
    """The model's own GGUF with its blocks' matrices quantised again, as transformers reads it."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
    from transformers import AutoModelForCausalLM

    kind, path = GGMLQuantizationType[scheme.upper()], folder / f"{scheme}.gguf"
    with source_gguf("smollm2-135m") as header:
        readers = [GGUFReader(file) for file in header.files]
        writer = GGUFWriter(path, str(header.fields["general.architecture"]))
        copy_fields(readers[0], writer)
        for tensor in (tensor for reader in readers for tensor in reader.tensors):
            data, stored = tensor.data, tensor.tensor_type
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
                data, stored = quants.quantize(quants.dequantize(data, stored), kind), kind
            writer.add_tensor(tensor.name, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)


LIBRARIES: dict[str, Callable[[Any, str], None]] = {
    "compressed-tensors": compressed_tensors,
    "torchao": torchao,
}


@torch.no_grad()
def main() -> None:
    """Print a line a scheme."""
    given = argparse.ArgumentParser()
    given.add_argument("--library", choices=(*LIBRARIES, "gguf"), default="compressed-tensors")
    given.add_argument("--n", type=int, default=28)
    given.add_argument("--length", type=int, default=64)
    args = given.parse_args()
    model = load("smollm2-135m")
    plain = plain_model(model)
    texts = prompts(n=args.n, length=args.length, bos=True)
    batches = [Batch.pad(rows) for rows in [texts.token_rows(model.tokenizer)]]
    for scheme in ("q8_0", "q4_0") if args.library == "gguf" else ("w8a16", "w8a8-token"):
        quantised = QuantisedModel.of(plain, SCHEMES[scheme])
        if args.library == "gguf":
            with TemporaryDirectory() as folder:
                real = gguf_file(scheme, Path(folder))
        else:
            real = copy.deepcopy(plain.hf)
            LIBRARIES[args.library](real, scheme)
        losses = {
            "as it is": _loss(lambda batch: unquantised(plain, batch), batches),
            "melens": _loss(lambda batch, q=quantised: q.logits(batch, Spared()), batches),
            args.library: _loss(
                lambda batch, r=real: r(batch.ids, use_cache=False).logits, batches
            ),
        }
        apart = losses["melens"] - losses[args.library]
        said = ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
        sys.stdout.write(f"{scheme}: {said}; melens - {args.library} {apart:+.5f} nats a token\n")


def _loss(logits: Callable[[Batch], torch.Tensor], batches: list[Batch]) -> float:
    total = count = 0.0
    for batch in batches:
        for row, ids in zip(logits(batch).unbind(), batch.ids, strict=True):
            loss = torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:], reduction="sum")
            total, count = total + float(loss), count + len(ids) - 1
    return total / count


if __name__ == "__main__":
    main()
