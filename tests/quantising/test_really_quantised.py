"""What is measured here against models that a library really quantised: within 1e-3 nats."""

from __future__ import annotations

import copy

import planted_gguf
import pytest
import torch

from melens.batches import Batch
from melens.models import load
from melens.quantising import SCHEMES
from melens.quantising.layers import plain_model
from melens.quantising.running import KeptWhole, QuantisedModel, unquantised

CLOSE = 1e-3


def loss(logits, batch):
    found = logits[:, :-1].double().flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(found, batch.ids[:, 1:].flatten()))


@pytest.fixture(scope="module")
def made():
    from planted import batch, plant

    planted = plant("llama", "single", 0)
    return planted.model, Batch.of(batch(planted, n=4, length=24))


def compare(hf, batch, scheme, real):
    plain = plain_model(load(hf))
    found = QuantisedModel.of(plain, SCHEMES[scheme]).logits(batch, KeptWhole())
    with torch.no_grad():
        theirs = real(batch.ids, use_cache=False).logits
    whole = unquantised(plain, batch)
    assert loss(found, batch) == pytest.approx(loss(theirs, batch), abs=CLOSE)
    # nearer to what the library made than to the model as it is
    assert (found - theirs).abs().mean() < 0.5 * (found - whole).abs().mean()


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-token"])
def test_a_compressed_tensors_checkpoint_that_transformers_loads(scheme, made, tmp_path):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStrategy,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    hf, batch = copy.deepcopy(made[0]), made[1]
    weights = QuantizationArgs(num_bits=8, strategy=QuantizationStrategy.CHANNEL)
    inputs = QuantizationArgs(num_bits=8, strategy=QuantizationStrategy.TOKEN, dynamic=True)
    group = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=inputs if scheme == "w8a8-token" else None,
    )
    apply_quantization_config(
        hf, QuantizationConfig(config_groups={"all": group}, ignore=["lm_head"])
    )
    for module in hf.modules():
        if hasattr(module, "weight_scale"):
            stored = module.weight.detach()
            ends = stored.amin(-1, keepdim=True), stored.amax(-1, keepdim=True)
            module.weight_scale.data.copy_(calculate_qparams(*ends, weights)[0])
    compressor = ModelCompressor.from_pretrained_model(hf)
    assert compressor is not None
    compressor.compress_model(hf)
    hf.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    compare(made[0], batch, scheme, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0"])
def test_a_gguf_that_transformers_loads(scheme, made, tmp_path):
    from transformers import AutoModelForCausalLM

    hf, batch = made
    tensors = planted_gguf.tensors_of(hf, "llama")
    kinds = {n: scheme.upper() for n, x in tensors.items() if n.startswith("blk.") and x.ndim == 2}
    fields = planted_gguf.fields_of(hf.config, "llama")
    planted_gguf.write(tmp_path / "m.gguf", "llama", fields, tensors, kinds=kinds)
    real = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    compare(hf, batch, scheme, real)
