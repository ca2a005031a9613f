"""Recipes say what was measured, in their tools' own words, and only what was shown to help."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from recipes_made import KEPT, LLAMA, WEIGHTED, helping, linear, of_tool, quantisation, scheme


@pytest.fixture(scope="module")
def llama():
    """Twelve layers, so that layer 1 is the beginning of another's name."""
    from tiny import GROUPED
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = {**GROUPED, "num_hidden_layers": 12}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()


def blocks_linear(model):
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_the_layers_are_named_as_transformers_does(bridged, family):
    from melens.quantising.layers import linear_layers, plain_model, whole_layers

    plain = plain_model(bridged(family))
    found = list(linear_layers(plain))
    blocks = range(plain.n_layers)
    names = {one.name.replace("*", str(n)) for one in found for n in blocks}
    assert names == {one.name for one in plain.weights}
    assert whole_layers(plain)[-1] == "lm_head"
    if family == "llama":
        assert [one.model_dump(mode="json") for one in found] == LLAMA
    routers = [name for name in whole_layers(plain) if name.endswith(".mlp.gate")]
    assert len(routers) == (plain.n_layers if family == "qwen3-moe" else 0)
    kinds = {"llama": {"Linear"}, "gpt2": {"Conv1D"}, "qwen3-moe": {"Linear", "experts"}}
    assert {one.kind for one in found} == kinds[family]


def test_a_measured_result_carries_what_recipes_need(bridged, ids):
    from melens.quantising import quantise, recipes

    found = quantise(bridged("llama"), ids, schemes=["w8a16"])
    again = type(found).from_json(found.to_json())
    assert [one.model_dump(mode="json") for one in again.linear] == LLAMA
    assert (again.model_type, again.whole) == ("llama", ("lm_head",))
    assert recipes(again) == []  # nothing of a random model is shown to help


def test_tools_are_listed_for_every_scheme_and_have_a_writer():
    from melens.quantising.recipe_tools import TOOLS, WRITERS
    from melens.quantising.schemes import SCHEMES

    assert set(TOOLS) == set(SCHEMES)
    assert {tool for tools in TOOLS.values() for tool in tools} == set(WRITERS)


@pytest.mark.parametrize("name", WEIGHTED)
def test_compressed_tensors_rounds_all_but_the_kept_layer_as_was_measured(llama, name):
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    from compressed_tensors.utils.match import match_named_modules

    from melens.quantising.rounding import packed
    from melens.quantising.schemes import SCHEMES, Grid

    text = of_tool(helping([name]), "compressed-tensors")[name].text
    config, own = QuantizationConfig.model_validate_json(text), SCHEMES[name]
    seen = {}
    for group in config.config_groups.values():
        for found, module in match_named_modules(llama, group.targets, config.ignore):
            assert found not in seen
            seen[found] = group, module
    assert set(seen) == blocks_linear(llama) - {KEPT}
    assert isinstance(own.weights, Grid)
    for group, module in (
        seen["model.layers.0.mlp.down_proj"],
        seen["model.layers.11.mlp.up_proj"],
    ):
        args, weight = group.weights, module.weight.detach()
        rows = weight.unflatten(-1, (-1, args.group_size or weight.shape[-1]))
        over = (0, 1, 2) if args.strategy == "tensor" else (-1,)
        largest = rows.abs().amax(over, keepdim=True)
        scale, zero = (
            x.reshape(largest.shape[:2]) for x in calculate_qparams(-largest, largest, args)
        )
        theirs = fake_quantize(
            weight, scale[:1] if args.strategy == "tensor" else scale, zero, args
        )
        torch.testing.assert_close(theirs, packed(weight, own.weights).dense(torch.float32))
        inputs = group.input_activations
        assert (inputs is None) == (own.inputs is None)
        if inputs is not None and own.inputs is not None:
            per = {"text": "tensor"}.get(own.inputs.per, own.inputs.per)
            measured = (own.inputs.bits, own.inputs.kind, per, not own.inputs.static)
            assert (inputs.num_bits, inputs.type, inputs.strategy, inputs.dynamic) == measured
    assert config.requires_calibration_data() == own.static


def as_compressed_tensors_runs(plain, name):
    """The model as compressed-tensors itself runs it, by a recipe's file."""
    import copy

    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    text = of_tool(helping([name]), "compressed-tensors")[name].text
    made = copy.deepcopy(plain.hf)
    apply_quantization_config(made, QuantizationConfig.model_validate_json(text))
    for module in made.modules():
        if found := getattr(module, "quantization_scheme", None):
            args, weight = found.weights, module.weight.detach()
            rows = weight.unflatten(-1, (-1, args.group_size or weight.shape[-1]))
            largest = rows.abs().amax(-1)
            module.weight_scale.data.copy_(calculate_qparams(-largest, largest, args)[0])
            module.weight_zero_point.data.zero_()
            module.quantization_status = QuantizationStatus.FROZEN
    return made


@pytest.mark.parametrize(
    "name", ["w8a8-tensor", "w8a8-token", "fp8-token", "w8a16", "w4a16", "w4a4"]
)
@torch.no_grad()
def test_compressed_tensors_computes_what_was_measured(bridged, ids, name):
    """The whole model by its own code, one text, the down projection of layer 1 left out."""
    from melens.batches import Batch
    from melens.quantising.layers import plain_model
    from melens.quantising.running import KeptWhole, QuantisedModel
    from melens.quantising.schemes import SCHEMES

    plain, text = plain_model(bridged("llama")), ids[:1]
    theirs, ours = as_compressed_tensors_runs(plain, name), QuantisedModel.of(plain, SCHEMES[name])
    kept = frozenset({KEPT})
    found = theirs(text).logits
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(ours.logits(Batch.of(text), KeptWhole(modules=kept)), found, **close)
    moved = float((plain.hf(text).logits - found).abs().max())
    assert moved > 1e-4
    if name in ("w8a8-tensor", "w8a8-token"):
        from transformers import DynamicCache

        first = torch.zeros_like(text, dtype=torch.bool)
        first[:, 0] = True
        measured = ours.logits(Batch.of(text), KeptWhole(tokens=first, modules=kept))
        cache = DynamicCache(config=plain.hf.config)
        as_compressed_tensors_runs(plain, "w8a16")(text[:, :1], past_key_values=cache)
        after = theirs(text[:, 1:], past_key_values=cache).logits
        apart = float((measured[:, 1:] - after).abs().mean())
        effect = float((measured - plain.hf(text).logits)[:, 1:].abs().mean())
        # sums over a cache differ in their last digit, which moves a few codes by one
        assert apart < 0.05 * effect


@pytest.mark.parametrize("name", WEIGHTED)
def test_llm_compressor_is_told_the_same(name):
    result = helping([name])
    recipe = yaml.safe_load(of_tool(result, "llm-compressor")[name].text)
    modifier = recipe["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    config = json.loads(of_tool(result, "compressed-tensors")[name].text)
    assert {"quant_method": "compressed-tensors", **modifier} == config


def test_experts_are_left_out_together_and_no_others():
    from compressed_tensors.utils.match import match_name

    layers = [
        linear("model.layers.*.self_attn.q_proj.weight"),
        linear("model.layers.*.mlp.experts.gate_up_proj", kind="experts"),
        linear("model.layers.*.mlp.experts.down_proj", 32, 32, kind="experts"),
    ]
    kept = {"beyond": 0.3, "modules": ["model.layers.1.mlp.experts"]}
    result = quantisation(scheme("w4a16", me_layers=kept), linear=layers)
    config = json.loads(of_tool(result, "compressed-tensors")["w4a16"].text)

    def sizes(name):
        if any(match_name(name, ignored) for ignored in config["ignore"]):
            return []
        groups = config["config_groups"].values()
        return [
            g["weights"]["group_size"] for g in groups for t in g["targets"] if match_name(name, t)
        ]

    assert sizes("model.layers.11.mlp.experts.7.gate_proj") == [64]
    assert sizes("model.layers.11.mlp.experts.7.up_proj") == [64]
    assert sizes("model.layers.11.mlp.experts.7.down_proj") == [32]
    assert sizes("model.layers.1.mlp.experts.7.down_proj") == []
    assert sizes("model.layers.1.self_attn.q_proj") == [64]
    assert sizes("model.layers.1.mlp.gate") == []


def test_transformers_reads_bitsandbytes_and_leaves_the_layer_out(llama):
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizers_utils import should_convert_module

    text = of_tool(helping(["w8a8-token"]), "bitsandbytes")["w8a8-token"].text
    config, unused = BitsAndBytesConfig.from_dict(json.loads(text), return_unused_kwargs=True)
    assert not unused
    assert config.load_in_8bit
    assert config.llm_int8_threshold == 0.0
    names = {name for name, x in llama.named_modules() if isinstance(x, torch.nn.Linear)}
    rounded = {n for n in names if should_convert_module(n, config.llm_int8_skip_modules)}
    assert rounded == blocks_linear(llama) - {KEPT}


@pytest.mark.parametrize("name", ["w8a8-tensor", "w8a8-token", "fp8-token", "w8a16", "w4a16"])
def test_torchao_leaves_the_layer_out(llama, name):
    """What it reads of the numbers is tested in it, with make test-interop."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = json.loads(of_tool(helping([name]), "TorchAO")[name].text)
    names = {name for name, x in llama.named_modules() if isinstance(x, torch.nn.Linear)}
    kept = config["modules_to_not_convert"]
    assert {n for n in names if should_convert_module(n, kept)} == blocks_linear(llama) - {KEPT}
    kind = config["quant_type"]["default"]
    if name == "w4a16":
        sizes = {}
        for pattern, one in kind["_data"]["fqn_to_config"].items():
            size = one["_data"]["granularity"]["_data"]["group_size"]
            found = [n for n in names if re.fullmatch(pattern.removeprefix("re:"), n)]
            sizes |= dict.fromkeys(found, size)
        assert set(sizes) == blocks_linear(llama)
        assert {size for n, size in sizes.items() if n.endswith("down_proj")} == {64}
        assert {size for n, size in sizes.items() if not n.endswith("down_proj")} == {32}


@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
def test_the_first_rule_of_gptqmodel_that_matches_says_each_layers_group(llama, name):
    config = json.loads(of_tool(helping([name]), "GPTQModel")[name].text)
    assert config["bits"] == (8 if name == "w8a16" else 4)

    def said(module):
        for rule, change in config["dynamic"].items():
            if re.match(rule[2:], module):
                return None if rule.startswith("-:") else change["group_size"]
        return config["group_size"]

    found = {module: said(module) for module in blocks_linear(llama)}
    assert [module for module, size in found.items() if size is None] == [KEPT]
    wanted = {False: -1, True: 32}[name == "w4a16"]
    assert {s for m, s in found.items() if s and not m.endswith("down_proj")} == {wanted}
    assert found["model.layers.11.mlp.down_proj"] == (64 if name == "w4a16" else -1)


def test_llama_cpp_is_told_by_its_own_tensor_names():
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map

    found = of_tool(helping(["q4_0", "q8_0"]), "llama.cpp")
    assert found["q4_0"].text == found["q8_0"].text == "^blk\\.1\\.ffn_down\\.weight$=bf16\n"
    assert found["q4_0"].command.endswith(" Q4_0")
    pattern, kind = found["q4_0"].text.strip().split("=")
    assert kind.upper() in GGMLQuantizationType.__members__
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, 12)
    tensors = [name + ".weight" for _, name in table.mapping.values()]
    assert {name for name in tensors if re.search(pattern, name)} == {"blk.1.ffn_down.weight"}
    assert pattern == pattern.lower()  # llama-quantize lowers what it reads


def test_every_family_of_the_tests_has_its_tensors_in_llama_cpp():
    from gguf import MODEL_ARCH_NAMES
    from tiny import TINY
    from transformers import AutoModelForCausalLM

    from melens.quantising.recipe_tools import GGUF_NAMES, gguf_pattern

    assert set(GGUF_NAMES.values()) <= set(MODEL_ARCH_NAMES.values())
    downs = r"\.(down_proj|c_proj|dense_4h_to_h|experts)$"
    for family, config in TINY.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config())
        result = quantisation(model_type=model.config.model_type)
        names = [n for n, _ in model.named_modules() if re.search(r"\.0\..*" + downs, n)]
        mlp = [n for n in names if ".attn." not in n and "shared" not in n]
        patterns = {gguf_pattern(result, n) for n in mlp}
        assert len(patterns) == 1, family
        assert "ffn_down" in patterns.pop(), family


def test_what_llama_cpp_does_not_know_is_refused_with_the_reason():
    from melens.quantising.recipe import cannot_say, recipes

    for given, reason in (
        ({"model_type": "novel"}, "gguf knows no architecture of the model type 'novel'"),
        ({"n_layers": 1}, f"gguf knows no tensor of {KEPT} in llama"),
    ):
        result = helping(["q4_0"], **given)
        assert recipes(result) == []
        assert [(one.tools, one.why) for one in cannot_say(result)] == [(("llama.cpp",), reason)]


def test_each_helping_protection_is_said_or_refused_in_every_tool_of_its_scheme():
    from melens.quantising.recipe import cannot_say, recipes
    from melens.quantising.recipe_tools import TOOLS
    from melens.quantising.schemes import SCHEMES

    for name, own in SCHEMES.items():
        tried = {}
        if own.inputs or own.cache:
            tried |= {"massive_token": {}, "prefix": {}}
        if own.cache:
            tried["first_tokens"] = {}
        if own.weights:
            down = f"{KEPT}.weight[0,1]"
            tried |= {"super_weights": {"weights": [down]}, "me_layers": {"modules": [KEPT]}}
        result = quantisation(
            scheme(name, **{key: {"beyond": 0.3, **given} for key, given in tried.items()})
        )
        said = {(one.protection, one.tool) for one in recipes(result)}
        refused = {(one.protection, tool) for one in cannot_say(result) for tool in one.tools}
        assert not said & refused
        wanted = {(key.replace("_", "-"), tool) for key in tried for tool in TOOLS[name]}
        assert wanted <= said | refused, name
        assert {protection for protection, _ in said | refused} == {
            p.replace("_", "-") for p in tried
        }
        for one in cannot_say(result):
            assert one.why


def test_only_what_was_shown_to_help_is_written(tmp_path):
    from melens.quantising.recipe import cannot_say, recipes, write_recipes

    below = scheme("w8a16", me_layers={"beyond": 0.04, "modules": [KEPT]})  # -0.01 to 0.09
    unknown = scheme("w4a16", me_layers={"modules": [KEPT]})
    result = quantisation(below, unknown)
    assert recipes(result) == []
    assert cannot_say(result) == []
    (page,) = write_recipes(result, tmp_path)
    assert "Nothing was shown to help" in page.read_text("utf-8")
    early = helping(["w8a16"], linear=[])
    with pytest.raises(Exception, match="measure it again") as error:
        recipes(early)
    assert type(error.value).__name__ == "ResultError"


def test_a_scale_per_token_is_advised_where_it_costs_less_and_tokens_were_the_cause():
    from melens.quantising.recipe import recipes

    def files(coarse, fine, beyond=0.3, names=("w8a8-tensor", "w8a8-token")):
        result = quantisation(
            scheme(names[0], coarse, massive_token={"beyond": beyond}), scheme(names[1], fine)
        )
        return {one.file: one for one in recipes(result)}

    made = files(1.0, 0.1)
    assert {name.split(".")[1] for name in made} == {"scale-per-token"}
    assert {one.tool for one in made.values()} == {
        "llm-compressor", "compressed-tensors", "bitsandbytes", "TorchAO"
    }  # fmt: skip
    config = json.loads(made["w8a8-token.scale-per-token.compressed-tensors.json"].text)
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"]) == ("token", True)
    assert config["ignore"] == ["lm_head"]
    why = made["w8a8-token.scale-per-token.compressed-tensors.json"].why
    assert "0.1 (0.09 to 0.11) nats a token and w8a8-tensor 1 (0.99 to 1.01)" in why
    assert "massive-token kept whole the latter costs 0.5 (0.49 to 0.51)" in why
    assert not files(1.0, 0.985)  # the intervals overlap
    assert not files(1.0, 0.1, beyond=0.04)  # nothing was shown to help
    fixed = files(1.0, 0.1, names=("kv8-channel", "kv-fp8"))
    assert {name: one.text for name, one in fixed.items()} == {
        "kv-fp8.no-scale.vllm.yaml": "kv-cache-dtype: fp8\n",
        "kv-fp8.no-scale.sglang.yaml": "kv-cache-dtype: fp8_e4m3\n",
    }
    cache = files(1.0, 0.1, names=("kv4-channel", "kv4-token"))
    texts = {one.tool: one.text for one in cache.values()}
    assert yaml.safe_load(texts["vLLM"]) == {"kv-cache-dtype": "int4_per_token_head"}
    assert texts["llama.cpp"] == "--flash-attn on --cache-type-k q4_0 --cache-type-v q4_0\n"


def test_experts_that_hold_super_weights_are_listed_by_their_block():
    from melens.quantising.recipe import cannot_say, recipes

    down = "model.layers.{}.mlp.experts.down_proj[{},12,99]"
    weights = [down.format(3, 5), down.format(3, 5), down.format(3, 1), down.format(7, 0)]
    shared = "model.layers.3.mlp.shared_expert.down_proj.weight[12,99]"
    kept = {"beyond": 0.3, "weights": [*weights, shared]}
    result = quantisation(scheme("w4a16", super_weights=kept))
    (one,) = recipes(result)
    assert one.file == "w4a16.experts.json"
    assert json.loads(one.text) == {"model.layers.3.mlp": [1, 5], "model.layers.7.mlp": [0]}
    assert {tool for r in cannot_say(result) for tool in r.tools} == {
        "llm-compressor", "compressed-tensors", "GPTQModel", "TorchAO"
    }  # fmt: skip


def test_melens_itself_reads_the_command_of_a_prefix():
    from melens.cli.app import group
    from melens.quantising.recipe import recipes

    model = "it's; rm -rf here"
    result = quantisation(
        scheme("w8a8-static", prefix={"beyond": 0.3}), scheme("kv4-token", prefix={"beyond": 0.3})
    )
    named = result.model_copy(update={"run": result.run.model_copy(update={"model": model})})
    (one,) = recipes(named)
    assert one.file == "w8a8-static.prefix.transformers.sh"
    words = shlex.split(one.text)
    assert words[:3] == ["melens", "export", model]
    context = group().commands["export"].make_context("export", words[2:])
    assert context.params["search_prefix"] == 1
    assert (context.params["bos"], context.params["n_seq"], context.params["length"]) == (
        True,
        8,
        128,
    )


def test_models_of_conv1d_are_refused_where_the_tool_has_none():
    from melens.quantising.recipe import cannot_say, recipes

    gpt2 = [linear("transformer.h.*.mlp.c_proj.weight", kind="Conv1D")]
    kept = {"beyond": 0.3, "modules": ["transformer.h.1.mlp.c_proj"]}
    result = quantisation(scheme("w8a16", me_layers=kept), linear=gpt2, model_type="gpt2")
    assert {one.tool for one in recipes(result)} == {"GPTQModel"}
    (refused,) = cannot_say(result)
    assert refused.tools == ("llm-compressor", "compressed-tensors", "TorchAO")
    assert "Conv1D" in refused.why


def test_the_command_writes_the_files_and_refuses_other_results(tmp_path, capsys):
    from melens.cli.app import attempt

    result = quantisation(
        scheme("w8a16", me_layers={"beyond": 0.3, "modules": [KEPT]}),
        scheme("kv4-token", massive_token={"beyond": 0.3}),
    )
    result.save(tmp_path / "quantise.json")
    out = tmp_path / "recipes"
    assert attempt(["recipes", str(tmp_path), "-o", str(out)]).code == 0
    shown = capsys.readouterr().out
    assert "w8a16.me-layers.llm-compressor.yaml" in shown
    assert "residual_length" in shown
    page = (out / "README.md").read_text("utf-8")
    files = {path.name for path in out.iterdir()} - {"README.md"}
    assert len(files) == 4
    assert all(f"## {name}\n" in page for name in files)
    assert attempt(["recipes", str(tmp_path / "quantise.json"), "-o", str(out), "--json"]).code == 0
    made = json.loads(capsys.readouterr().out)
    assert {one["file"] for one in made["recipes"]} == files
    assert [one["scheme"] for one in made["cannot"]] == ["kv4-token"] * 3

    saved = "docs/results/smollm2-135m.locate.json"
    ended = attempt(["recipes", saved, "-o", str(tmp_path / "none")])
    assert (ended.code, "a result of 'locate'" in ended.error) == (2, True)
    ended = attempt(["recipes", str(out), "-o", str(tmp_path / "none")])
    assert (ended.code, "holds no quantise.json" in ended.error) == (2, True)
    assert not (tmp_path / "none").exists()


def test_recipes_are_written_without_torch(tmp_path):
    result = helping([*WEIGHTED, "q4_0"])
    result.save(tmp_path / "quantise.json")
    code = (
        "from melens.cli.app import _run; import sys; "
        f"here = {str(tmp_path)!r}; "
        "assert _run(['recipes', here, '-o', here + '/out'], debug=True) == 0; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "q4_0.me-layers.llama-cpp.txt").exists()


def test_what_helps_in_kl_alone_says_so_and_earlier_recipes_go(tmp_path):
    from melens.quantising.recipe import recipes, write_recipes

    result = quantisation(scheme("q4_0", me_layers={"beyond": 0.3}))
    loss = recipes(result)[0].why
    assert "In KL alone" not in loss

    def moved(trial):
        if trial.name != "me-layers":
            return trial
        zero = trial.beyond_random.model_copy(update={"value": 0.0, "interval": (-0.1, 0.1)})
        return trial.model_copy(
            update={"beyond_random": zero, "kl_beyond_random": trial.beyond_random}
        )

    trials = tuple(map(moved, result.schemes[0].trials))
    only = result.schemes[0].model_copy(update={"trials": trials})
    in_kl = result.model_copy(update={"schemes": (only,)})
    assert recipes(in_kl)[0].why.startswith("In KL alone, not in loss")

    (tmp_path / "mine.txt").write_text("kept")
    files = write_recipes(result, tmp_path)
    assert len(files) > 1
    nothing = quantisation(scheme("q4_0"))
    (readme,) = write_recipes(nothing, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "README.md"}
    assert "No random control was run" in readme.read_text()
