"""recipes(): settings of other tools, of what was shown to help and of nothing else."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from melens.errors import ResultError
from melens.formatting import clipped, printable, with_interval
from melens.quantising.recipe_tools import (
    BITSANDBYTES,
    COMPRESSED,
    GPTQMODEL,
    LLAMA_CPP,
    LLM_COMPRESSOR,
    SGLANG,
    TOOLS,
    TORCHAO,
    TRANSFORMERS,
    VLLM,
    Setting,
    ggml_type,
    unsayable,
    written,
)
from melens.quantising.schemes import SCHEMES
from melens.results.evaluation import Delta
from melens.results.quantise import Quantisation, QuantisedTrial, SchemeTrials
from melens.store import PAGE, read_text, remove_file, write_atomically

BETTER: dict[str, tuple[str, ...]] = {
    "w8a8-tensor": ("w8a8-token",),
    "w8a8-static": ("w8a8-token",),
    "fp8-static": ("fp8-token",),
    "kv8-channel": ("kv8-token", "kv-fp8"),
    "kv4-channel": ("kv4-token",),
    "kv-fp8": ("kv8-token",),
}
"""A scheme in which one scale serves many tokens -> those of as many bits in which none does."""
PER_TOKEN, NO_SCALE, EXPERTS = "scale per token", "no scale", "experts"
"""What a recipe is for, where that is no trial's name."""
MODULES = "me-layers"
"""The one protection that whole modules say."""
WHOLE_MODULES = "it leaves out whole modules, not tokens"
NO_ENTRY = "it leaves out whole modules, not single weights"
ONE_TYPE = "it has one type for the cache of all tokens"
CANNOT: dict[str, dict[str, str]] = {
    "massive-token": {
        LLM_COMPRESSOR: WHOLE_MODULES,
        COMPRESSED: WHOLE_MODULES,
        TORCHAO: WHOLE_MODULES,
        BITSANDBYTES: "llm_int8_threshold chooses columns by size, not tokens",
        VLLM: "--kv-cache-dtype-skip-layers keeps all tokens of a layer, not a token of all layers",
        SGLANG: ONE_TYPE,
        LLAMA_CPP: ONE_TYPE,
        TRANSFORMERS: "residual_length of a quantised cache keeps the last tokens, not the first",
    },
    "super-weights": {
        LLM_COMPRESSOR: NO_ENTRY,
        COMPRESSED: NO_ENTRY,
        TORCHAO: NO_ENTRY,
        BITSANDBYTES: NO_ENTRY,
        GPTQMODEL: NO_ENTRY,
        LLAMA_CPP: "it has one type for all weights of a tensor",
    },
}
"""Protection -> tool -> why it cannot be told to keep that."""
CANNOT["first-tokens"] = CANNOT["massive-token"]
ENGINES_OWN = "a prefix that the engine itself computes is rounded as any other token"
CANNOT["prefix"] = dict.fromkeys(CANNOT["massive-token"], ENGINES_OWN)
CANNOT["prefix"][TRANSFORMERS] = CANNOT["massive-token"][TRANSFORMERS]
NO_CHANNELS = "no type of its cache has a scale per channel"
NO_CACHE = dict.fromkeys((VLLM, SGLANG, LLAMA_CPP), NO_CHANNELS)
"""For a cache with a scale per channel, whatever is kept."""
CALIBRATED = "needs texts for its scales"
REMARKS: dict[str, dict[str, str]] = {
    "w8a8-tensor": dict.fromkeys(
        (LLM_COMPRESSOR, COMPRESSED),
        "one scale for all texts of a batch; vLLM refuses it, as int8 inputs have a scale per "
        "token or a static one there",
    )
    | {TORCHAO: "one scale for all texts of a batch"},
    "w8a8-static": {LLM_COMPRESSOR: CALIBRATED, COMPRESSED: CALIBRATED},
    "fp8-static": {LLM_COMPRESSOR: CALIBRATED, COMPRESSED: CALIBRATED},
    "w8a8-token": {BITSANDBYTES: "the default threshold of 6 was not measured"},
}
"""Scheme -> tool -> what else is to be known of the two."""


TITLE = "# Recipes for "
"""How the README.md of a folder of recipes begins."""


@dataclass(frozen=True)
class Recipe:
    """One file for one tool."""

    tool: str
    scheme: str
    protection: str
    """A trial's name; ``scale per token`` or ``no scale`` where another scheme is advised;
    ``experts``."""
    file: str
    text: str
    why: str
    """The measured numbers, in one sentence."""
    says: str
    """What the file tells the tool."""
    command: str
    """How it is used; names in capitals are the user's."""


@dataclass(frozen=True)
class CannotSay:
    """A protection that helps, and tools that cannot be told of it, all for one reason."""

    tools: tuple[str, ...]
    scheme: str
    protection: str
    why: str


def recipes(result: Quantisation) -> list[Recipe]:
    """Settings of other tools: each protection that helps, and schemes that need none.

    A protection is said in every tool that rounds as the scheme does and that can be told what is
    kept. Where keeping tokens or layers helps a scheme whose scale many tokens share, a measured
    one of as many bits with a scale per token is said too, if it costs less and the intervals are
    apart.

    Raises:  ResultError: the result says nothing of its linear layers, being of an early version.
    """
    if not isinstance(result, Quantisation):
        raise ResultError(
            f"recipes are made of a Quantisation, got a {type(result).__name__}; read the file "
            "with melens.results.load_result."
        )
    _require_layers(result)
    made = [one for found in result.schemes for one in _protected(result, found)]
    made += [
        one
        for name, others in BETTER.items()
        for other in others
        for one in _better(result, name, other)
    ]
    unique = {one.file: one for one in made}
    return list(unique.values())


def cannot_say(result: Quantisation) -> list[CannotSay]:
    """Protections that help, and why which tools cannot be told to keep that."""
    _require_layers(result)
    made: dict[tuple[str, str, str], list[str]] = {}
    for found in result.schemes:
        for trial in _helping(found):
            for tool, why in _refusals(result, found, trial):
                made.setdefault((found.scheme, trial.name, why), []).append(tool)
    return [CannotSay(tuple(tools), *key) for key, tools in made.items()]


def write_recipes(result: Quantisation, folder: Path) -> list[Path]:
    """Write :func:`recipes` into a folder, and a README.md that says what each is for and why.

    Raises:  ResultError: see there. OutputError: the folder cannot be written.
    """
    made, refused = recipes(result), cannot_say(result)
    _remove_earlier(folder)
    for one in made:
        write_atomically(folder / one.file, one.text)
    write_atomically(folder / "README.md", _readme(result, made, refused))
    return [folder / one.file for one in made] + [folder / "README.md"]


def _remove_earlier(folder: Path) -> None:
    """Recipes that an earlier result gave: applied now they would stand on other numbers."""
    readme = folder / "README.md"
    if not readme.is_file() or not read_text(readme, PAGE, error=ResultError).startswith(TITLE):
        return
    for path in folder.iterdir():
        if path.name.partition(".")[0] in SCHEMES and path.is_file():
            remove_file(path)


def _require_layers(result: Quantisation) -> None:
    if not result.linear:
        raise ResultError(
            "this result does not name the model's linear layers; measure it again with "
            "`melens quantise`."
        )


def _helping(found: SchemeTrials) -> list[QuantisedTrial]:
    """None of a scheme that this version does not know."""
    known = found.scheme in TOOLS
    return [one for one in found.trials if known and one.role == "protected" and one.helps]


def _protected(result: Quantisation, found: SchemeTrials) -> Iterator[Recipe]:
    for trial in _helping(found):
        if trial.name == MODULES:
            for tool in TOOLS[found.scheme]:
                setting = Setting(result, SCHEMES[found.scheme], tool, trial.modules)
                if unsayable(setting) is None:
                    yield _recipe(setting, MODULES, _why(result, found, trial))
        elif trial.name == "prefix" and SCHEMES[found.scheme].inputs is not None:
            yield _prefix(result, found, trial)
        elif trial.name == "super-weights" and (experts := experts_of(trial.weights)):
            yield _experts(result, found, trial, experts)


def _better(result: Quantisation, coarse: str, other: str) -> Iterator[Recipe]:
    """A scheme without a shared scale, where it costs less than one that tokens spoil."""
    before, after = result.scheme(coarse), result.scheme(other)
    if before is None or after is None:
        return
    kept = [trial for trial in _helping(before) if trial.name != "super-weights"]
    if not kept or not _below(after.as_is.damage, before.as_is.damage):
        return
    best = min(kept, key=lambda trial: trial.damage.value)
    why = (
        f"{after.scheme} costs {_said(after.as_is.damage)} and {before.scheme} "
        f"{_said(before.as_is.damage)} on the same {result.texts} texts; with {best.name} kept "
        f"whole the latter costs {_said(best.damage)}."
    )
    scheme = SCHEMES[other]
    fixed = scheme.cache is not None and scheme.cache.scale is not None
    for tool in TOOLS[other]:
        setting = Setting(result, scheme, tool)
        if unsayable(setting) is None:
            yield _recipe(setting, NO_SCALE if fixed else PER_TOKEN, why)


def _below(one: Delta, other: Delta) -> bool:
    """Whether the whole interval of one lies below the other's."""
    if one.interval is None or other.interval is None:
        return False
    return one.interval[1] < other.interval[0]


def _recipe(setting: Setting, protection: str, why: str) -> Recipe:
    text, ending = written(setting)
    name = f"{setting.scheme.name}.{protection.replace(' ', '-')}.{_plain(setting.tool)}.{ending}"
    says = setting.scheme.said()
    if setting.kept:
        says += f"; not rounded: {', '.join(setting.kept)}"
    if remark := REMARKS.get(setting.scheme.name, {}).get(setting.tool):
        says += f"; {remark}"
    if setting.tool == GPTQMODEL:
        says += "; GPTQ chooses the codes, where rounding to nearest was measured"
    command = _command(setting, name)
    return Recipe(setting.tool, setting.scheme.name, protection, name, text, why, says, command)


def _plain(tool: str) -> str:
    return tool.lower().replace(".", "-")


def _command(setting: Setting, file: str) -> str:
    model = shlex.quote(printable(setting.result.run.model))
    tool, scheme = setting.tool, setting.scheme
    if tool == LLAMA_CPP and scheme.weights is not None:
        kind = ggml_type(setting.result)
        return (
            f"llama-quantize --tensor-type-file {file} --token-embedding-type {kind} "
            f"--output-tensor-type {kind} MODEL.gguf OUT.gguf {setting.own['type']}"
        )
    data = "dataset=DATASET, " if scheme.static else ""
    load = "AutoModelForCausalLM.from_pretrained(MODEL, quantization_config="
    return {
        LLM_COMPRESSOR: f'oneshot(model=MODEL, recipe="{file}", {data}output_dir=OUT)',
        COMPRESSED: "apply_quantization_config(model, QuantizationConfig.model_validate_json("
        f'Path("{file}").read_text()))',
        GPTQMODEL: f'GPTQModel.load(MODEL, QuantizeConfig(**json.load(open("{file}"))))'
        ".quantize(TEXTS)",
        BITSANDBYTES: f'{load}BitsAndBytesConfig.from_dict(json.load(open("{file}"))))',
        TORCHAO: f'{load}TorchAoConfig.from_dict(json.load(open("{file}"))))',
        VLLM: f"vllm serve {model} --config {file}",
        SGLANG: f"python -m sglang.launch_server --model-path {model} --config {file}",
        LLAMA_CPP: f"llama-server -m MODEL.gguf $(cat {file})",
    }[tool]


def _prefix(result: Quantisation, found: SchemeTrials, trial: QuantisedTrial) -> Recipe:
    """The prefix as melens exports it: keys and values of the model before it is quantised."""
    settings, count = result.run.settings, len(result.prefix)
    flags = [f"--search-prefix {count}", "--format prefix"]
    if settings.get("bos") is not None:
        flags.append("--bos" if settings["bos"] else "--no-bos")
    for option, key in (("--n-seq", "sequences"), ("--length", "length")):
        if isinstance(settings.get(key), int):
            flags.append(f"{option} {settings[key]}")
    model = shlex.quote(printable(result.run.model))
    line = " ".join(["melens export", model, *flags, "-o prefix"])
    return Recipe(
        TRANSFORMERS,
        found.scheme,
        trial.name,
        f"{found.scheme}.prefix.transformers.sh",
        line + "\n",
        _why(result, found, trial),
        f"keys and values of the prefix {list(result.prefix)}, of the model before it is "
        "quantised, as was measured; the quantised model continues them with for_generate(ids, "
        "mask, prefix=...). See that the search finds these tokens",
        f"sh {found.scheme}.prefix.transformers.sh",
    )


def experts_of(weights: Sequence[str]) -> dict[str, list[int]]:
    """Module of the experts' block -> experts, of weights named ``name[expert, output, input]``."""
    made: dict[str, set[int]] = {}
    for weight in weights:
        found = re.fullmatch(r"(.+?)(?:\.experts)?\.[^.\[]+\[(\d+),\d+,\d+\]", weight)
        if found is not None:
            made.setdefault(found[1], set()).add(int(found[2]))
    return {name: sorted(experts) for name, experts in made.items()}


def _experts(
    result: Quantisation,
    found: SchemeTrials,
    trial: QuantisedTrial,
    experts: dict[str, list[int]],
) -> Recipe:
    file = f"{found.scheme}.experts.json"
    return Recipe(
        LLM_COMPRESSOR,
        found.scheme,
        EXPERTS,
        file,
        json.dumps(experts, indent=1) + "\n",
        _why(result, found, trial),
        "experts that hold super weights, block by block, in the form of the report of "
        "REAPPruningModifier; that has no option for them: compare its report_path",
        f"all(set(kept) <= set(report[name]) for name, kept in json.load(open({file!r})).items())",
    )


def _refusals(
    result: Quantisation, found: SchemeTrials, trial: QuantisedTrial
) -> Iterator[tuple[str, str]]:
    """Tools that cannot be told of a trial that helps, each with the reason."""
    scheme, tools = SCHEMES[found.scheme], TOOLS[found.scheme]
    if trial.name == MODULES:
        for tool in tools:
            why = unsayable(Setting(result, scheme, tool, trial.modules))
            if why is not None:
                yield tool, why
        return
    known = CANNOT.get(trial.name, {})
    if scheme.cache is None:
        yield from ((tool, known[tool]) for tool in tools if tool in known)
    elif not tools:
        yield from NO_CACHE.items()
        if TRANSFORMERS in known:
            yield TRANSFORMERS, known[TRANSFORMERS]
    else:
        yield from ((tool, known[tool]) for tool in (*tools, TRANSFORMERS) if tool in known)


def nothing_said(result: Quantisation) -> str:
    """Why there is no recipe."""
    trials = [trial for found in result.schemes for trial in found.trials]
    compared = [trial.beyond_random for trial in trials if trial.beyond_random is not None]
    if not compared:
        return "No random control was run, so nothing can be said to help."
    if all(found.interval is None for found in compared):
        return f"What helps cannot be said of {result.texts} texts (20 are needed)."
    return "Nothing was shown to help that another tool can be told of."


def _why(result: Quantisation, found: SchemeTrials, trial: QuantisedTrial) -> str:
    of = f"({result.texts} texts, {result.tokens} tokens)"
    if trial.helps_loss:
        assert trial.beyond_random is not None
        return (
            f"{found.scheme} costs {_said(found.as_is.damage)} as it is and {_said(trial.damage)} "
            f"with {trial.name} kept whole, {_said(trial.beyond_random)} less than with as much at "
            f"random kept {of}."
        )
    assert trial.kl_beyond_random is not None
    return (
        f"In KL alone, not in loss: KL to the unquantised model is {found.as_is.kl.value:.3g} nats "
        f"with {found.scheme} as it is and {trial.kl.value:.3g} with {trial.name} kept whole, "
        f"{_said(trial.kl_beyond_random)} less than with as much at random kept; the loss is "
        f"{found.as_is.damage.value:.3g} and {trial.damage.value:.3g} above it {of}."
    )


def _said(found: Delta) -> str:
    return f"{with_interval(found.value, found.interval, '.3g')} nats a token"


def _readme(result: Quantisation, made: Sequence[Recipe], refused: Sequence[CannotSay]) -> str:
    lines = [f"{TITLE}{clipped(result.run.model)}", ""]
    lines += ["Measured by `melens quantise`; only what was shown to help is here.", ""]
    for one in made:
        lines += [f"## {one.file}", "", f"{one.tool}: {one.says}.", "", one.why, ""]
        lines += ["```text", one.command, "```", ""]
    if not made:
        lines += [nothing_said(result), ""]
    if refused:
        lines += ["## What cannot be said", "", "| scheme | what helps | tools | why not |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {r.scheme} | {r.protection} | {', '.join(r.tools)} | {r.why} |" for r in refused
        ]
        lines.append("")
    return printable("\n".join(lines), keep="\n")
