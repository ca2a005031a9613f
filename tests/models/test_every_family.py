"""Every causal family of transformers, tiny and random, with one planted massive token.

Ten of them always; all with ``make test-families``, which also holds the committed table
(docs/architectures.md) against what is measured now.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import warnings
import weakref
from pathlib import Path

import families
import family_commands
import pytest
import torch
from family_measures import MEASURES, Family
from words import letters

from melens.errors import MelensError
from melens.models.bridging import checked_bridge
from melens.models.families import family

REPRESENTATIVE = (
    "LlamaForCausalLM",
    "BloomForCausalLM",
    "CohereForCausalLM",
    "FalconForCausalLM/40b",
    "Gemma4ForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "OlmoHybridForCausalLM",
    "OPTForCausalLM/350m",
    "RwkvForCausalLM",
)
REST = [name for name in families.TINY if name not in REPRESENTATIVE]
ROOT = Path(__file__).parents[2]
TABLE = ROOT / "melens" / "data" / "architectures.json"


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_family_does_what_the_table_says(name, tmp_path):
    hold_to_the_table(name, tmp_path)


@pytest.mark.families
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", REST)
def test_every_other_family_does_what_the_table_says(name, tmp_path):
    hold_to_the_table(name, tmp_path)


@pytest.mark.families
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", families.TINY)
def test_every_command_ends_as_a_command_may(name, tmp_path):
    """A result, or one line that says why; never an exception that nobody foresaw."""
    made = families.tiny(name)
    if name not in families.NO_PLANT:
        families.plant(made, 1, 7)
    made.save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not family_commands.run_all(tmp_path / "model", tmp_path / "out")


def hold_to_the_table(name, folder):
    """A measure works where the table says so; elsewhere it is one line, and melens' own."""
    table = json.loads(TABLE.read_text("utf-8"))["families"][name]
    made = Family(name, folder)
    for measure, run in MEASURES.items():
        if table["load"] and measure != "load":
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = outcome(run, made)
        assert bool(said) == bool(table[measure]), f"{measure}: {said or 'works now'}"


def outcome(run, made):
    """What a measure says; an exception that is no refusal goes through."""
    said = ""
    try:
        return run(made)
    except MelensError as error:
        said = str(error)
    assert "\n" not in said
    return said


def test_the_table_holds_every_family_and_no_fault():
    table = json.loads(TABLE.read_text("utf-8"))
    assert set(table["families"]) == set(families.TINY)
    faults = {
        (name, measure): said
        for name, row in table["families"].items()
        for measure, said in row.items()
        if said.startswith("FAULT")
    }
    assert not faults
    opened = [row for row in table["families"].values() if not row["load"]]
    assert len(opened) >= 140
    for measure, least in {"isolate": 90, "mask": 100, "scan": 75}.items():
        assert sum(not row[measure] for row in opened) >= least, measure


def test_the_page_is_what_the_table_says():
    path = ROOT / "experiments" / "make_architectures.py"
    spec = importlib.util.spec_from_file_location("make_architectures", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    table = json.loads(TABLE.read_text("utf-8"))
    written = (ROOT / "docs" / "architectures.md").read_text("utf-8")
    assert written == made.page(table), "python experiments/make_architectures.py LlamaForCausalLM"


def test_a_measured_model_is_let_go():
    """What is noted beside a model must not keep it."""
    bridge, _ = checked_bridge(families.tiny("HeliumForCausalLM"), None, name="it")
    with torch.no_grad():
        bridge(torch.tensor([[1, 5, 9]]), use_cache=False)
    gone = weakref.ref(bridge.original_model)
    del bridge
    gc.collect()
    assert gone() is None


def test_a_row_is_found_by_its_short_name_or_not_at_all():
    assert family("gptoss") == family("GptOssForCausalLM")
    with pytest.raises(
        MelensError, match=r"no architecture 'LamaForCausalLM' was measured.* Did you mean"
    ):
        family("LamaForCausalLM")


def test_a_folder_is_found_by_its_config_or_refused(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert family(str(tmp_path)) == family("gpt2")
    for wrong in ("[1]", '"a"'):
        config.write_text(wrong)
        with pytest.raises(MelensError, match=r"config\.json is not a JSON object"):
            family(str(tmp_path))
    config.write_text('{"architectures": 7}')
    with pytest.raises(MelensError, match="no architecture"):
        family(str(tmp_path))
