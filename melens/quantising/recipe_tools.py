"""A scheme and the modules that stay out of it, in the words of each tool that can be told so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from melens.errors import ResultError
from melens.protocols import JsonObject
from melens.quantising.schemes import Grid, Scheme
from melens.results.quantise import LinearLayers, Quantisation

LLM_COMPRESSOR, COMPRESSED, LLAMA_CPP = "llm-compressor", "compressed-tensors", "llama.cpp"
GPTQMODEL, BITSANDBYTES, TORCHAO = "GPTQModel", "bitsandbytes", "TorchAO"
VLLM, SGLANG, TRANSFORMERS = "vLLM", "SGLang", "transformers"

ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
WHOLE = {"_type": "PerTensor", "_version": 1, "_data": {}}
INT8_BOTH = "Int8DynamicActivationInt8WeightConfig"
TOOLS: dict[str, dict[str, JsonObject]] = {
    "w8a8-tensor": {
        LLM_COMPRESSOR: {},
        COMPRESSED: {},
        TORCHAO: {"_type": INT8_BOTH, "_data": {"granularity": [WHOLE, ROW]}},
    },
    "w8a8-static": {LLM_COMPRESSOR: {}, COMPRESSED: {}},
    "w8a8-token": {
        LLM_COMPRESSOR: {},
        COMPRESSED: {},
        BITSANDBYTES: {"load_in_8bit": True, "llm_int8_threshold": 0.0},
        TORCHAO: {"_type": INT8_BOTH, "_data": {"granularity": ROW}},
    },
    "fp8-static": {LLM_COMPRESSOR: {}, COMPRESSED: {}},
    "fp8-token": {
        LLM_COMPRESSOR: {},
        COMPRESSED: {},
        TORCHAO: {
            "_type": "Float8DynamicActivationFloat8WeightConfig",
            "_data": {"granularity": [ROW, ROW]},
        },
    },
    "w8a16": {
        LLM_COMPRESSOR: {},
        COMPRESSED: {},
        GPTQMODEL: {"bits": 8},
        TORCHAO: {"_type": "Int8WeightOnlyConfig", "_data": {"granularity": ROW}},
    },
    "w4a16": {
        LLM_COMPRESSOR: {},
        COMPRESSED: {},
        GPTQMODEL: {"bits": 4},
        TORCHAO: {
            "_type": "IntxWeightOnlyConfig",
            "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "int4"}},
        },
    },
    "w4a4": {LLM_COMPRESSOR: {}, COMPRESSED: {}},
    "q8_0": {LLAMA_CPP: {"type": "Q8_0"}},
    "q4_0": {LLAMA_CPP: {"type": "Q4_0"}},
    "kv8-token": {VLLM: {"dtype": "int8_per_token_head"}, LLAMA_CPP: {"cache": "q8_0"}},
    "kv8-channel": {},
    "kv4-token": {VLLM: {"dtype": "int4_per_token_head"}, LLAMA_CPP: {"cache": "q4_0"}},
    "kv4-channel": {},
    "kv-fp8": {VLLM: {"dtype": "fp8"}, SGLANG: {"dtype": "fp8_e4m3"}},
}
"""Scheme -> tools that round as it does, each with what its file says of the numbers. For
llm-compressor and compressed-tensors that is read off the scheme's grids."""

GGUF_NAMES = {
    "cohere": "command-r",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "ministral": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
}
"""transformers' model type -> llama.cpp's architecture, where the two names differ."""


@dataclass(frozen=True)
class Setting:
    """What a file is to say: a scheme of a measured model, without some modules."""

    result: Quantisation
    scheme: Scheme
    tool: str
    kept: tuple[str, ...] = ()

    @property
    def own(self) -> JsonObject:
        """The tool's words for the numbers."""
        return TOOLS[self.scheme.name][self.tool]

    @property
    def left_out(self) -> list[str]:
        """Modules that stay as they are: those that no scheme rounds, then those that are kept."""
        return [*self.result.whole, *self.kept]

    def groups(self) -> dict[int, list[LinearLayers]]:
        """Layers by the size of their groups, the largest first; one group of size 0 where the
        scheme has none.
        """  # noqa: D205
        grid, made = self.scheme.weights, dict[int, list[LinearLayers]]()
        grouped = isinstance(grid, Grid) and grid.per == "group"
        for layers in self.result.linear:
            made.setdefault(layers.group or 0 if grouped else 0, []).append(layers)
        return dict(sorted(made.items(), reverse=True))


Writer = Callable[[Setting], str]
WRITERS: dict[str, tuple[str, Writer]] = {}
"""Tool -> ending of its file, and what is in it."""


def writer(tool: str, ending: str) -> Callable[[Writer], Writer]:
    """Register what writes a tool's file."""

    def add(write: Writer) -> Writer:
        WRITERS[tool] = (ending, write)
        return write

    return add


def unsayable(setting: Setting) -> str | None:
    """Why a tool cannot be told of these layers, whatever is kept; None where it can."""
    kinds = {layers.kind for layers in setting.result.linear}
    if setting.tool in (LLM_COMPRESSOR, COMPRESSED, TORCHAO) and "Conv1D" in kinds:
        return "the model keeps linear layers as Conv1D, which it does not quantise"
    if setting.tool in (BITSANDBYTES, TORCHAO) and "experts" in kinds:
        return "the model keeps routed experts in one parameter, which it does not quantise"
    if setting.tool == LLAMA_CPP and setting.scheme.weights is not None:
        try:
            for module in setting.kept:
                gguf_pattern(setting.result, module)
        except ResultError as error:
            return str(error).rstrip(".")
    return None


def _modules(names: Sequence[str]) -> list[str]:
    """Names for compressed-tensors: of experts all that it makes of the one module."""
    return [f"re:{_regex(name)}$" if name.endswith("experts") else name for name in names]


def _regex(name: str) -> str:
    """A module's name, and where it holds all experts theirs, as they are once taken apart."""
    return f"^{re.escape(name)}" + (r"(\..+)?" if name.endswith("experts") else "")


def _target(layers: LinearLayers) -> str:
    """The modules of one name in all blocks, as a regular expression."""
    if layers.kind == "experts":
        before, _, last = layers.name.rpartition(".")
        parts = "(gate|up|gate_up)_proj" if last == "gate_up_proj" else re.escape(last)
        return rf"^{_any_block(before)}\.\d+\.{parts}$"
    return f"^{_any_block(layers.name.removesuffix('.weight'))}$"


def _any_block(name: str) -> str:
    return re.escape(name).replace(r"\*", r"\d+")


def _args(grid: Grid, group: int | None = None) -> JsonObject:
    """A grid as compressed-tensors' QuantizationArgs."""
    strategy = "tensor" if grid.per == "text" else grid.per
    made = {"num_bits": grid.bits, "type": grid.kind, "symmetric": True, "strategy": strategy}
    return {**made, "group_size": group} if grid.per == "group" else made


def _config_groups(setting: Setting) -> JsonObject:
    scheme, groups = setting.scheme, setting.groups()
    assert isinstance(scheme.weights, Grid)
    made = {}
    for at, (size, layers) in enumerate(groups.items()):
        targets = ["Linear"] if len(groups) == 1 else [f"re:{_target(one)}" for one in layers]
        made[f"group_{at}"] = {
            "targets": targets,
            "weights": {**_args(scheme.weights, size), "dynamic": False},
        }
        if scheme.inputs is not None:
            inputs = {**_args(scheme.inputs), "dynamic": not scheme.inputs.static}
            made[f"group_{at}"]["input_activations"] = inputs
    return made


@writer(COMPRESSED, "json")
def compressed_tensors(setting: Setting) -> str:
    """A QuantizationConfig, as ``quantization_config`` of a config.json is one."""
    return _json(
        {
            "quant_method": "compressed-tensors",
            "config_groups": _config_groups(setting),
            "ignore": _modules(setting.left_out),
        }
    )


@writer(LLM_COMPRESSOR, "yaml")
def llm_compressor(setting: Setting) -> str:
    """A recipe with one QuantizationModifier: rounding to nearest, as was measured."""
    import yaml

    modifier = {
        "config_groups": _config_groups(setting),
        "ignore": _modules(setting.left_out),
    }
    recipe = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}
    return yaml.safe_dump(recipe, sort_keys=False)


@writer(GPTQMODEL, "json")
def gptqmodel(setting: Setting) -> str:
    """QuantizeConfig's arguments; the first rule of ``dynamic`` that matches a module counts."""
    rules: JsonObject = {f"-:{_regex(name)}$": {} for name in setting.kept}
    sizes = setting.groups()
    first = next(iter(sizes), 0)
    for size, layers in sizes.items():
        if size != first:
            rules |= {f"+:{_target(one)}": {"group_size": size} for one in layers}
    return _json({**setting.own, "group_size": first or -1, "sym": True, "dynamic": rules})


@writer(BITSANDBYTES, "json")
def bitsandbytes(setting: Setting) -> str:
    """Transformers' BitsAndBytesConfig."""
    skipped = {"llm_int8_skip_modules": setting.left_out}
    return _json({"quant_method": "bitsandbytes", **setting.own, **skipped})


@writer(TORCHAO, "json")
def torchao(setting: Setting) -> str:
    """Transformers' TorchAoConfig."""
    sizes = setting.groups()
    made = {size: _ao(setting.own, size) for size in sizes}
    kind = next(iter(made.values()))
    if len(made) > 1:
        named = {f"re:{_target(one)}": made[size] for size in sizes for one in sizes[size]}
        kind = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": named}}
    return _json(
        {
            "quant_method": "torchao",
            "quant_type": {"default": kind},
            "modules_to_not_convert": setting.left_out,
        }
    )


def _ao(own: JsonObject, group: int) -> JsonObject:
    data = dict(own["_data"])
    if group:
        data["granularity"] = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": group}}
    return {"_type": own["_type"], "_version": 2, "_data": data}


@writer(LLAMA_CPP, "txt")
def llama_cpp(setting: Setting) -> str:
    """Lines of a ``--tensor-type-file``; for a cache the server's flags."""
    if setting.scheme.cache is not None:
        kind = setting.own["cache"]
        return f"--flash-attn on --cache-type-k {kind} --cache-type-v {kind}\n"
    kind = ggml_type(setting.result)
    return "".join(f"{gguf_pattern(setting.result, name)}={kind}\n" for name in setting.kept)


def ggml_type(result: Quantisation) -> str:
    """What keeps a tensor in the dtype that the model was measured in."""
    return {"bfloat16": "bf16", "float16": "f16"}.get(result.run.dtype.split(".")[-1], "f32")


def gguf_pattern(result: Quantisation, module: str) -> str:
    r"""A module's tensors as llama-quantize looks for them: ``^blk\.11\.ffn_down\.weight$``.

    Raises:  ResultError: llama.cpp has no such model, or no tensor of that name.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    own = result.model_type or ""
    wanted = GGUF_NAMES.get(own, own)
    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == wanted), None)
    if arch is None:
        raise ResultError(f"gguf knows no architecture of the model type {own!r}.")
    table = get_tensor_name_map(arch, result.n_layers)
    parts = ("down_proj", "gate_proj", "up_proj", "gate_up_proj")
    inside = [f"{module}.{part}" for part in parts] if module.endswith("experts") else [module]
    found = [name for one in inside if (name := table.get_name(one)) is not None]
    if not found:
        raise ResultError(f"gguf knows no tensor of {module} in {wanted}.")
    either = "|".join(re.escape(name) for name in found)
    return rf"^({either})\.weight$" if len(found) > 1 else rf"^{either}\.weight$"


@writer(VLLM, "yaml")
def vllm(setting: Setting) -> str:
    """A file for ``vllm serve --config``."""
    return f"kv-cache-dtype: {setting.own['dtype']}\n"


@writer(SGLANG, "yaml")
def sglang(setting: Setting) -> str:
    """A file for ``sglang.launch_server --config``."""
    return f"kv-cache-dtype: {setting.own['dtype']}\n"


def _json(value: JsonObject) -> str:
    return json.dumps(value, indent=1) + "\n"


def written(setting: Setting) -> tuple[str, str]:
    """A tool's file: its text and its ending."""
    ending, write = WRITERS[setting.tool]
    return write(setting), ending
