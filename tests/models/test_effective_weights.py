"""Weights are those that the model acts with: adapters beside them, and packed ones, included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from melens.errors import SiteError
from melens.interventions import ffn_ablate_neurons, ffn_scale, ffn_zero_weights
from melens.interventions.ffn import transplant
from melens.models import load
from melens.models.anatomy import norm_gain
from melens.models.decoder import decoder_of
from melens.models.ffn import ffn_input, ffn_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))
PROJECTIONS = ["down_proj", "up_proj", "gate_proj", "q_proj"]


@pytest.fixture
def adapted(make_tiny):
    """A PEFT model with a random adapter, as after training."""
    from peft import LoraConfig, get_peft_model

    def make(family="llama", **settings):
        torch.manual_seed(1)
        config = LoraConfig(
            **{"r": 4, "target_modules": PROJECTIONS, "init_lora_weights": False, **settings}
        )
        return get_peft_model(make_tiny(family), config).eval()

    return make


def seen(model, layer):
    """(what the FFN read, its product, what it wrote) as the hooks saw them."""
    found, ffn = {}, ffn_of(model, layer)
    sites = {"x": ffn_input(model, layer), "product": ffn.product, "output": ffn.output}
    hooks = [
        (site, lambda x, hook, name=name: found.update({name: x.detach()}))
        for name, site in sites.items()
    ]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(IDS)
    return found


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True, "r": 8}])
def test_a_lora_counts_in_every_matrix(settings, adapted, tokenizer):
    model = load(adapted(**settings), tokenizer=tokenizer)
    merged = load(adapted(**settings).merge_and_unload(), tokenizer=tokenizer)
    torch.testing.assert_close(model(IDS), merged(IDS), rtol=1e-4, atol=1e-5)
    for layer in range(3):
        ffn, plain, found = ffn_of(model, layer), ffn_of(merged, layer), seen(model, layer)
        torch.testing.assert_close(ffn.down, plain.down, rtol=1e-4, atol=1e-6)
        for one, other in zip(ffn.reads, plain.reads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ffn.product_of(found["x"]), found["product"])
        torch.testing.assert_close(ffn.written(found["product"]), found["output"])


def test_edits_of_weights_are_those_of_the_merged_model(adapted, make_tiny, tokenizer):
    models = [load(made, tokenizer=tokenizer) for made in (adapted(), adapted().merge_and_unload())]
    donor = load(make_tiny("llama", seed=5), tokenizer=tokenizer)
    edits = (
        lambda m: ffn_zero_weights(m, 1, weights=[(3, 7), (9, 11)], tokens="all"),
        lambda m: ffn_ablate_neurons(m, 1, neurons=[5, 6], tokens="all"),
        lambda m: transplant(m, 1, donor=donor, tokens="all"),
        lambda m: transplant(donor, 1, donor=m, tokens="all"),
    )
    for i, edit in enumerate(edits):
        made = []
        for model in models:
            with torch.no_grad(), edit(model):
                made.append((donor if i == 3 else model)(IDS))
        torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_is_off_does_not_count(adapted, make_tiny, tokenizer):
    model = adapted()
    model.base_model.disable_adapter_layers()
    down = ffn_of(load(model, tokenizer=tokenizer), 1).down
    base = ffn_of(load(make_tiny("llama"), tokenizer=tokenizer), 1).down
    torch.testing.assert_close(down, base)


def test_a_fused_matrix_that_the_bridge_cuts_without_its_adapter_is_measured(adapted, tokenizer):
    model = adapted("gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    bridge = load(model, tokenizer=tokenizer)
    torch.testing.assert_close(bridge(ids, use_cache=False), expected, rtol=1e-4, atol=1e-5)


def test_conv1d_and_its_adapter(adapted, tokenizer):
    model = load(
        adapted("gpt2", target_modules=["c_fc", "mlp.c_proj"], fan_in_fan_out=True),
        tokenizer=tokenizer,
    )
    found, ffn = seen(model, 1), ffn_of(model, 1)
    torch.testing.assert_close(ffn.product_of(found["x"]), found["product"])
    torch.testing.assert_close(ffn.written(found["product"]), found["output"])


class Packed(nn.Module):
    """int8 weights with a scale a row; ``step`` rounds activations, too."""

    def __init__(self, linear, step=None):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (linear.weight.detach() / scale).round().to(torch.int8)
        self.in_features, self.out_features, self.step = linear.in_features, *packed.shape[:1], step
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), None
        self.register_buffer("scale", scale)

    def forward(self, x):
        x = x if self.step is None else (x / self.step).round() * self.step
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


def packed(hf, step=None):
    for block in hf.model.layers:
        block.mlp.down_proj = Packed(block.mlp.down_proj, step)
    return hf


def test_packed_weights_are_read_by_what_they_make(make_tiny, tokenizer):
    model = load(packed(make_tiny("llama")), tokenizer=tokenizer)
    part = model.blocks[1].mlp.out.original_component
    expected = (part.weight.float() * part.scale).T
    torch.testing.assert_close(ffn_of(model, 1).down, expected)
    with ffn_zero_weights(model, 1, weights=[(3, 7)], tokens="all"):
        edited = seen(model, 1)
    without = expected.clone()
    without[7, 3] = 0
    torch.testing.assert_close(edited["output"], edited["product"] @ without)


def test_what_is_not_linear_is_refused_where_weights_are_read(make_tiny, tokenizer):
    model = load(packed(make_tiny("llama"), step=0.05), tokenizer=tokenizer)
    with pytest.raises(SiteError, match="a Packed does not act as one matrix"):
        _ = ffn_of(model, 1).down
    with ffn_scale(model, 1, factor=0.5):  # reads no weight
        model(IDS)


def test_a_norm_that_is_tuned_beside_its_gain_is_read_right_or_refused(adapted, tokenizer):
    """As PEFT's modules_to_save does it."""
    model = adapted(modules_to_save=["input_layernorm"])
    for name, value in model.named_parameters():
        if "modules_to_save" in name:
            value.data.add_(0.5)
    norm, row = model.get_base_model().model.layers[1].input_layernorm, torch.randn(1, 1, 32)
    with torch.no_grad():
        made = (norm(row) / (row * row.pow(2).mean().add(1e-6).rsqrt()))[0, 0]
    torch.testing.assert_close(decoder_of(model).gain(1), made, rtol=1e-3, atol=1e-4)
    bridged = load(model, tokenizer=tokenizer)
    torch.testing.assert_close(norm_gain(bridged, 1, "ln1"), made, rtol=1e-3, atol=1e-4)


def test_a_norm_that_does_not_multiply_by_its_gain_is_measured(make_tiny):
    model = make_tiny("llama")
    stored = decoder_of(model).gain(1)
    norm = model.model.layers[1].input_layernorm
    own = norm.forward
    norm.forward = lambda x: 1.5 * own(x)
    torch.testing.assert_close(decoder_of(model).gain(1), 1.5 * stored, rtol=1e-4, atol=1e-5)
