"""Model objects as people have them: compiled, wrapped, offloaded, quantised, of odd layouts."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from planted import plant
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3nTextConfig,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    PhiConfig,
)

from melens.batches import Batch
from melens.errors import ContractError, InterventionError, MelensError, ModelError
from melens.interventions import drop_key, ffn_scale, wemask
from melens.locating import locate
from melens.measuring import sinks
from melens.models import load, loading
from melens.models.origin import name_of
from melens.patching import patch
from melens.scanning import scan
from melens.streaming.streamed import load_streamed

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 64}
SIZES = {
    **ENDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
STREAMS = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"] * 3,
}
LAYOUTS = {
    "falcon-40b": lambda: FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "neox-without-bias": lambda: GPTNeoXConfig(**SIZES, attention_bias=False),
    "phi-qk-norm": lambda: PhiConfig(**SIZES, qk_layernorm=True),
    "granite-4-h": lambda: GraniteMoeHybridConfig(
        **SIZES,
        num_key_value_heads=2,
        num_local_experts=0,
        shared_intermediate_size=64,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_expand=2,
    ),
}
"""Layouts that TransformerLens' own adapters do not fit."""
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_transformer_lens_cannot_bridge_is_measured(layout, tokenizer):
    plain = build(LAYOUTS[layout]())
    with torch.no_grad():
        expected = plain(IDS, use_cache=False).logits
    bridge = load(plain, tokenizer=tokenizer)
    torch.testing.assert_close(bridge(IDS, use_cache=False), expected, rtol=1e-4, atol=1e-5)
    assert locate(bridge, [Batch.of(IDS)]).verdict == "none"


def test_an_object_that_no_bridge_fits_stays_as_it_was(tokenizer):
    plain = build(Gemma3nTextConfig(**SIZES, **STREAMS))
    modules = dict(plain.named_modules())
    with torch.no_grad():
        expected = plain(IDS, use_cache=False).logits
    with pytest.raises(ModelError, match=r"its residual is not one stream") as caught:
        load(plain, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    assert dict(plain.named_modules()) == modules
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS, use_cache=False).logits, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # torch says that its own int8 is to move elsewhere
def test_an_int8_object_is_one_model_error(tokenizer):
    model = build(LlamaConfig(**SIZES))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ModelError, match=r"cannot bridge this LlamaForCausalLM .*not a tensor for"):
        load(quantised, tokenizer=tokenizer)


def test_a_model_that_cannot_run_by_itself_is_refused_before_it_is_bridged(tokenizer):
    model = build(LlamaConfig(**SIZES))
    model.model.layers[1].mlp.down_proj.weight.data = torch.zeros(32, 63)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot run by itself"):
        load(model, tokenizer=tokenizer)


def test_offloaded_and_meta_tensors_are_named(tokenizer):
    model = build(LlamaConfig(**SIZES))
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ModelError, match=r"3 tensors .*layers.1.mlp.gate_proj.weight .*--stream"):
        load(model, tokenizer=tokenizer)


def test_wrapped_objects_are_unwrapped(tokenizer):
    plain = load(build(LlamaConfig(**SIZES)), tokenizer=tokenizer)(IDS)
    for wrap in (nn.DataParallel, torch.compile):
        torch.testing.assert_close(load(wrap(build(LlamaConfig(**SIZES))))(IDS), plain)
    inside = build(LlamaConfig(**SIZES))
    inside.compile()
    with pytest.raises(ModelError, match="was compiled in place"):
        load(inside)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
def test_a_prompt_adapter_is_refused(tokenizer):
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match=r"virtual tokens before every text.*get_base_model"):
        load(get_peft_model(build(LlamaConfig(**SIZES)), config), tokenizer=tokenizer)


def test_a_float64_object_works(make_tiny, tokenizer):
    """The same numbers as in float32, to float32's rounding."""
    wide = load(make_tiny("llama", dtype=torch.float64), tokenizer=tokenizer)
    narrow = load(make_tiny("llama"), tokenizer=tokenizer)
    rows = [locate(model, [Batch.of(IDS)]).profile for model in (wide, narrow)]
    for one, other in zip(*rows, strict=True):
        assert one.max == pytest.approx(other.max, rel=1e-5)
        assert one.median == pytest.approx(other.median, rel=1e-5)
    clean, corrupted = Batch.of(IDS[:1]), Batch.of(IDS[1:])
    grids = [patch(m, clean, corrupted, sites="resid_post", metric="loss") for m in (wide, narrow)]
    one, other = (torch.tensor(grid.values["resid_post"]) for grid in grids)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for edit in (lambda m: ffn_scale(m, 1, factor=0.5), lambda m: drop_key(m, 0)):
        made = []
        for model in (wide, narrow):
            with edit(model):
                made.append(model(IDS))
        assert made[0].dtype == torch.float64
        torch.testing.assert_close(made[0].float(), made[1], rtol=1e-4, atol=1e-5)


def test_a_tokenizer_may_be_a_path(make_tiny, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for given in (str(tmp_path), tmp_path):
        model = load(make_tiny("llama"), tokenizer=given)
        assert model.tokenizer("w5 w6")["input_ids"] == tokenizer("w5 w6")["input_ids"]
    with pytest.raises(ModelError, match="is not a folder here"):
        load(make_tiny("llama"), tokenizer=str(tmp_path / "none"))


def test_what_is_no_tokenizer_is_refused(make_tiny, tokenizer):
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    with pytest.raises(ModelError, match=r"tokenizers\.Tokenizer; .*PreTrainedTokenizerFast"):
        load(make_tiny("llama"), tokenizer=raw)
    with pytest.raises(ModelError, match=r"got a builtins\.int; give a transformers tokenizer"):
        load(make_tiny("llama"), tokenizer=7)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_checkpoint_saved_inside_a_wrapper_says_so(prefix, make_tiny, tokenizer, tmp_path):
    make_tiny("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    save_file({prefix + name: x for name, x in held.items()}, file, metadata={"format": "pt"})
    said = f"begin with '{prefix}'.*strip that prefix"
    for read in (load, load_streamed, scan):
        with pytest.raises(MelensError, match=said) as caught:
            read(tmp_path)
        assert "fetch it again" not in str(caught.value)


def test_an_object_of_the_callers_stays_as_it_is(make_tiny, tokenizer, tmp_path):
    """It is not wrapped: its modules, attention, mode and file are those of before."""
    hf = make_tiny("llama").train()
    before = [(name, type(module), module.training) for name, module in hf.named_modules()]
    attention, keys = hf.config._attn_implementation, list(hf.state_dict())
    bridge = load(hf, tokenizer=tokenizer)
    assert load(hf) is bridge
    after = [(name, type(module), module.training) for name, module in hf.named_modules()]
    assert after == before
    assert (hf.config._attn_implementation, list(hf.state_dict())) == (attention, keys)
    hf.save_pretrained(tmp_path)
    again = type(hf).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), hf.parameters(), strict=True))


def test_the_bridge_of_an_object_has_its_weights_and_hooks(make_tiny, tokenizer):
    """What is changed in place is seen; a hook of the caller's runs in the bridge as well."""
    hf, ids = make_tiny("llama"), torch.arange(5, 13)[None]
    bridge = load(hf, tokenizer=tokenizer)
    with torch.no_grad():
        hf.lm_head.weight.mul_(2)
        torch.testing.assert_close(bridge(ids), hf(ids).logits)
    mlp, block = hf.model.layers[1].mlp, hf.model.layers[1]
    handle = mlp.register_forward_hook(lambda module, args, output: 1.5 * output)
    scaled = load(hf, tokenizer=tokenizer)
    assert scaled is not bridge
    with torch.no_grad():
        torch.testing.assert_close(scaled(ids), hf(ids).logits)
        assert not torch.allclose(bridge(ids), scaled(ids))
    handle.remove()
    assert load(hf, tokenizer=tokenizer) is not scaled
    steer = torch.randn(hf.config.hidden_size, generator=torch.Generator().manual_seed(0))
    block.register_forward_hook(lambda module, args, output: output + steer)
    with pytest.raises(ContractError, match=r"hooks of its own at model\.layers\.1: remove"):
        load(hf, tokenizer=tokenizer)


def test_a_cast_object_is_bridged_again(make_tiny, tokenizer):
    hf = make_tiny("llama")
    bridge = load(hf, tokenizer=tokenizer)
    hf.to(torch.float64)
    again = load(hf, tokenizer=tokenizer)
    assert again is not bridge
    ids = torch.arange(5, 13)[None]
    assert again(ids).dtype == torch.float64
    torch.testing.assert_close(again(ids), hf(ids).logits)


def test_a_mask_on_an_object_that_was_located_acts_on_its_own_passes():
    """After ``locate`` the object is still plain: the mask acts where it generates."""
    hf, made = plant("llama", "single", seed=0).model, torch.tensor([[1, *range(6, 16)]])
    located = locate(hf, made)
    with torch.no_grad():
        plain = hf(made).logits
        with wemask(hf, located, rate=0.9, select="activation") as record:
            masked = hf(made).logits
        assert record.edited.tokens == 1
        assert not torch.allclose(masked, plain)
        torch.testing.assert_close(hf(made).logits, plain, rtol=0, atol=0)
        with wemask(load(hf), located, rate=0.9, select="activation"):
            torch.testing.assert_close(load(hf)(made), masked)


@pytest.mark.parametrize(("family", "copies"), [("neox", True), ("gpt2", False)])
def test_a_trained_object_is_measured_as_it_is_now(family, copies, make_tiny, tokenizer):
    """GPT-NeoX's bridge has queries, keys and values of its own, which a step does not reach."""
    hf, ids = make_tiny(family), torch.arange(5, 13)[None]
    bridge = load(hf, tokenizer=tokenizer)
    assert load(hf, tokenizer=tokenizer) is bridge
    optimiser = torch.optim.SGD(hf.parameters(), lr=0.5)
    hf(ids, labels=ids).loss.backward()
    optimiser.step()
    again = load(hf, tokenizer=tokenizer)
    assert (again is bridge) == (not copies)
    with torch.no_grad():
        torch.testing.assert_close(again(ids), hf(ids).logits)


def _pre_hook(hf):
    hf.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: None)


def _other_buffer(hf):
    hf.model.rotary_emb.register_buffer("inv_freq", hf.model.rotary_emb.inv_freq.clone())


def _other_data(hf):
    hf.lm_head.weight.data = hf.lm_head.weight.data.clone() * 2


def _other_module(hf):
    hf.model.layers[0].mlp.act_fn = nn.GELU()


def _other_scale(hf):
    hf.model.layers[0].self_attn.scaling *= 2


@pytest.mark.parametrize(
    "change", [_pre_hook, _other_buffer, _other_data, _other_module, _other_scale]
)
def test_an_object_that_changed_is_bridged_again(change, make_tiny, tokenizer):
    hf, ids = make_tiny("llama"), torch.arange(5, 13)[None]
    bridge = load(hf, tokenizer=tokenizer)
    change(hf)
    again = load(hf)
    assert again is not bridge
    assert again.tokenizer is tokenizer
    with torch.no_grad():
        torch.testing.assert_close(again(ids), hf(ids).logits)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_is_turned_off_or_changed_is_bridged_again(make_tiny, tokenizer):
    peft = pytest.importorskip("peft")
    hf, ids = make_tiny("llama"), torch.arange(5, 13)[None]
    config = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(hf, config)
    model.add_adapter("two", config)
    first = load(model, tokenizer=tokenizer)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(load(model)(ids), model(ids).logits)
    model.set_adapter("two")
    second = load(model)
    assert second is not first
    with torch.no_grad():
        torch.testing.assert_close(second(ids), model(ids).logits)


def test_a_forward_of_the_callers_own_is_named(make_tiny, tokenizer):
    hf = make_tiny("llama")
    mlp = hf.model.layers[1].mlp
    mlp.forward = lambda x, forward=mlp.forward: 2 * forward(x)
    with pytest.raises(ContractError, match=r"hooks of its own at model\.layers\.1\.mlp: remove"):
        load(hf, tokenizer=tokenizer)


def test_an_edit_on_a_bridge_that_no_longer_fits_is_not_forgotten():
    hf, made = plant("llama", "single", seed=0).model, torch.tensor([[1, *range(6, 26)]])
    located = locate(hf, made)
    with wemask(load(hf), located, rate=0.9, select="activation"):
        sinks(hf, located, made)
        _pre_hook(hf)
        with pytest.raises(InterventionError, match="its new bridge does not have the edit"):
            sinks(hf, located, made)


def test_an_object_that_is_edited_itself_is_not_measured():
    """Measures run the bridge, where the edit on the object would silently be missing."""
    hf, made = plant("llama", "single", seed=0).model, torch.tensor([[1, *range(6, 26)]])
    located = locate(hf, made)
    with wemask(hf, located, rate=0.9, select="activation"):
        hf(made)
        with pytest.raises(InterventionError, match=r"itself.* bridge = melens\.load"):
            sinks(hf, located, made)
    plain = sinks(hf, located, made)
    with wemask(load(hf), located, rate=0.9, select="activation"):
        assert sinks(hf, located, made).attention_to_token != plain.attention_to_token


def test_hooks_of_the_callers_own_look_on(make_tiny):
    hf, seen = make_tiny("llama"), []
    look = lambda module, args, out: seen.append(module)  # noqa: E731
    hf.get_submodule("model.layers.1.mlp").register_forward_hook(look)
    assert locate(hf, torch.arange(5, 25).reshape(2, 10)).n_layers
    assert len(seen) > 1  # by itself, and through its bridge


def test_a_model_object_keeps_its_name(tmp_path):
    (tmp_path / "mine").mkdir()
    for path, name in (
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("gpt2", "gpt2"),
        (str(tmp_path / "mine"), "mine"),
        (f"{tmp_path}/gone/", "gone"),
        ("./models/mine", "mine"),
        ("", ""),
    ):
        assert name_of(path) == name


def test_the_bridge_goes_with_its_object_and_not_with_copies(make_tiny, tokenizer, tmp_path):
    hf = make_tiny("llama")
    hf.model.layers[0].mlp.register_forward_hook(lambda *_, own=hf: None)  # a cycle
    bridge = load(hf, tokenizer=tokenizer)
    twin = copy.deepcopy(hf)
    assert load(twin, tokenizer=tokenizer) is not bridge
    hf.model.layers[0].mlp._forward_hooks.clear()
    torch.save(hf, tmp_path / "whole.pt")
    read = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert (tmp_path / "whole.pt").stat().st_size < 1.5 * sum(
        p.numel() * p.element_size() for p in hf.parameters()
    )
    assert loading.kept_bridge(read) is None
    gone = weakref.ref(hf)
    del hf, bridge, twin, read
    gc.collect()
    assert gone() is None
