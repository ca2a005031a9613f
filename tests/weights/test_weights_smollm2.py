"""Reference values on the real SmolLM2-135M (docs/definitions.md); fp32, CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from melens.batches import prompts
from melens.locating import locate
from melens.models.anatomy import norm_gain
from melens.published import known

pytestmark = pytest.mark.weights
TEXT = "My favorite color is Dark Blue."

NORMS_WITH_BOS = [
    98.7,
    345.0,
    810.5,
    806.3,
    800.8,
    792.3,
    783.8,
    772.1,
    631.9,
    152.3,
    180.8,
    25101.9,
    25094.1,
    25082.3,
    25070.1,
    25053.8,
    25040.1,
    25025.9,
    25017.9,
    25011.3,
    25011.1,
    25018.9,
    25013.0,
    25015.7,
    24987.0,
    24990.5,
    24984.4,
    24754.9,
    10689.6,
    6134.4,
]
SHARES_WITH_BOS = {1: 0.0101, 2: 0.0188, 9: -0.022, 11: 0.9989, 27: -0.01, 28: -0.5719, 29: -0.2296}


@pytest.fixture(scope="module")
def found(smol):
    return locate(smol, prompts())


@pytest.fixture(scope="module")
def found_bos(smol):
    return locate(smol, prompts(bos=True))


def test_emergence_is_re_emergent_at_layer_11(found, found_bos):
    for result in (found, found_bos):
        assert result.verdict == "re-emergent"
        assert (result.me_layer, result.main_layer, result.peak_layer) == (11, 11, 11)
        assert 1.1 < result.effective_layers < 1.25
        assert result.erase_layer == 28
        assert result.writer.ffn == pytest.approx(0.998, abs=0.003)
        assert result.confidence > 0.85
        largest = {}
        for token in result.massive:
            largest.setdefault(token.token_id, token.dim)
        assert set(largest.values()) == {507}
        assert {token.position for token in result.massive} == {0}
        answers = result.criteria.model_dump()
        assert answers.pop("sun_token") is None
        assert set(answers.values()) == {11}
        first, second = result.stages
        assert (first.layer, first.erased_at, first.dim) == (2, 9, 507)
        assert (second.layer, second.erased_at) == (11, 28)


def test_every_first_token_tried_is_massive(found_bos):
    seen = found_bos.stability
    assert seen.sequences_massive == 8
    assert all(token.massive and token.me_layer == 11 for token in seen.first_tokens)
    assert seen.observations == 9  # BOS is one observation, however many texts follow it


def test_values_without_and_with_bos(smol, found_bos):
    plain = locate(smol, TEXT)
    assert plain.massive[0].value == pytest.approx(23738, rel=0.002)
    assert plain.massive[0].token == "My"
    assert plain.stages[0].peak == pytest.approx(714, rel=0.002)
    assert found_bos.massive[0].value == pytest.approx(24926.2, rel=0.002)
    assert found_bos.massive[0].token == "<|im_start|>"


def test_norms_and_write_shares_of_the_first_token(smol):
    from melens.locating.trajectory import trace

    (path,) = trace(smol, [[smol.tokenizer.bos_token_id]])
    torch.testing.assert_close(
        path.norms[1:], torch.tensor(NORMS_WITH_BOS, dtype=torch.float64), rtol=0.002, atol=0.0
    )
    for layer, share in SHARES_WITH_BOS.items():
        assert path.shares[layer].item() == pytest.approx(share, abs=0.003)
    assert path.part_shares(path.ffn)[11].item() == pytest.approx(0.9982, abs=0.003)


def test_the_profile_agrees_with_plain_transformers(smol, found):
    """The independent check: no hook, no bridge; a second copy of the weights, hidden states."""
    from transformers import AutoModelForCausalLM

    from melens.models.named import NAMED

    hf = AutoModelForCausalLM.from_pretrained(
        NAMED["smollm2-135m"].converted, dtype=torch.float32, local_files_only=True
    )
    rows = prompts().token_rows(smol.tokenizer)
    assert {len(row) for row in rows} == {128}
    with torch.no_grad():
        states = hf.model(torch.tensor(rows), output_hidden_states=True).hidden_states
    for row in found.profile[:-1]:  # the last hidden state has the final norm on it
        state = states[row.layer + 1]
        assert row.max == pytest.approx(state.abs().max().item(), rel=1e-4)
        medians = state.abs().flatten(1).median(dim=-1).values
        assert row.median == pytest.approx(medians.mean().item(), rel=1e-3)
        norms = state.norm(dim=-1)
        ratios = norms.max(dim=-1).values / norms.median(dim=-1).values
        assert row.norm_ratio == pytest.approx(ratios.mean().item(), rel=1e-3)


def test_a_text_of_one_repeated_token_has_no_massive_token(smol):
    result = locate(smol, " the" * 64)
    assert result.verdict == "none"
    assert result.me_layer is None


def test_the_chat_template_puts_its_own_first_token(smol):
    result = locate(smol, prompts(chat=True))
    assert result.me_layer == 11
    assert result.massive[0].token == "<|im_start|>"


def test_published_numbers_match(found):
    check = known("smollm2-135m", found)
    assert check.verdict == "match"
    assert {row.verdict for row in check.comparisons} == {"match"}


def test_bf16_gives_the_same_layers(smol):
    from melens.models import load

    texts = prompts(n=2, length=64)  # a CPU is slow in bfloat16
    found = locate(smol, texts)
    rough = locate(load("smollm2-135m", device="cpu", dtype="bfloat16"), texts)
    assert (rough.verdict, rough.me_layer, rough.erase_layer) == ("re-emergent", 11, 28)
    assert [stage.layer for stage in rough.stages] == [2, 11]
    assert rough.criteria == found.criteria
    # weights and activations rounded to 8 bits, then cubed by the gated FFN
    assert rough.profile[11].max == pytest.approx(found.profile[11].max, rel=0.03)
    assert rough.run.dtype == "bfloat16"


def test_a_gguf_file_of_the_users_own_loads_like_the_named_model(smol, tmp_path, monkeypatch):
    from melens.models import NAMED, load
    from melens.models.cache import package_dir

    package, module, inside = NAMED["smollm2-135m"].parts[0]
    file = package_dir(package, module) / inside
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path))
    own = load(file, device="cpu")
    ids = torch.tensor([[1, 5965, 5488, 2380]])
    with torch.no_grad():
        assert torch.equal(own(ids), smol(ids))
    assert own.tokenizer(TEXT)["input_ids"] == smol.tokenizer(TEXT)["input_ids"]
    assert len(list((tmp_path / "models").iterdir())) == 1


# --- what the token does (docs/definitions.md, sections 3, 4 and 6); BOS first ------------------

WIKI = "WIKITEXT2"
"""Environment variable: WikiText-2's valid.txt, which the reference values were measured on."""
SINK_HEADS = [
    0,
    0,
    0,
    0.111,
    0,
    0,
    0,
    0,
    0,
    0.111,
    0,
    0,
    0.778,
    0.889,
    1,
    0.889,
    0.778,
    1,
    0.889,
    0.778,
    0.889,
    0.889,
    1,
    1,
    1,
    1,
    1,
    1,
    0.778,
    0.778,
]


@pytest.fixture(scope="module")
def measured(smol, found_bos):
    from melens.measuring import measure_all

    return measure_all(smol, found_bos, prompts(bos=True), t=128)


def test_the_token_is_one_coordinate_and_rigid(measured, smol):
    made = measured.describe
    assert made.energy["1"] == pytest.approx(0.99, abs=0.01)
    assert made.cosine_layers[10] == pytest.approx(0.16, abs=0.005)
    assert min(made.cosine_layers[11:27]) > 0.9995
    assert made.cosine_layers[28] == pytest.approx(0.97, abs=0.005)
    assert {step.layer for step in made.step_up} == {0, 1, 2, 11}
    assert {9, 28} <= {step.layer for step in made.step_down}
    sample = next(row for row in made.conditions if row.name == "vocabulary sample")
    assert sample.massive >= sample.first_tokens - 1  # 99.9 % of 1,500 in the reference
    assert min(made.cosine_inputs[2:9]) == pytest.approx(0.99, abs=0.006)
    assert min(made.cosine_inputs[11:27]) > 0.995
    left = {(norm.layer, norm.site): norm.after for norm in made.norms}
    assert left[12, "ln2"] < 0.25 < 0.9 < left[12, "ln1"]  # dim 247 is left, 507 is not
    for layer in (11, 12, 13):
        assert norm_gain(smol, layer, "ln2")[507].abs() < 1e-3


def test_the_residual_collapses_by_one_row_and_queries_and_keys_do_not(measured):
    """Text moves these by up to 4 (bundled texts against WikiText-2)."""
    ranks = measured.collapse
    kept, left = ranks.curve("resid_post")
    assert (kept[10], left[10]) == (pytest.approx(83, abs=4), pytest.approx(83, abs=4))
    assert (kept[11], left[11]) == (pytest.approx(6.9, abs=1), pytest.approx(84, abs=4))
    stable = ranks.curve("resid_post", "stable_rank")
    assert stable[0][11] == pytest.approx(1.0, abs=0.01)
    assert stable[1][11] == pytest.approx(1.86, abs=0.2)
    for site, before, after in (("q", 33, 28), ("k", 26, 30)):
        kept, left = ranks.curve(site)
        assert kept[11] == pytest.approx(before, abs=3)
        assert kept[12] == pytest.approx(after, abs=3)
        assert all(abs(a - b) < 0.7 for a, b in zip(kept, left, strict=True))
    assert ranks.missing == ()


def test_sinks_begin_in_the_layer_after(measured):
    found = measured.sinks
    assert max(found.head_rate["0.3"][:3]) == 0
    assert found.head_rate["0.3"][10:12] == (0, 0)
    assert min(found.head_rate["0.3"][12:28]) > 0.7
    assert [span.first for span in found.spans][-1] == 12
    assert sum(found.attention_to_token[12:]) / 18 == pytest.approx(0.54, abs=0.1)
    assert found.uniform == pytest.approx(0.0424, abs=1e-3)


def test_without_bos_sinks_come_with_the_first_stage_and_go_with_it(smol, found):
    from melens.measuring import sinks

    made = sinks(smol, found, prompts())
    assert [(span.first, span.last) for span in made.spans] == [(3, 9), (12, 29)]
    stages = [(stage.layer, stage.erased_at) for stage in found.stages]
    assert stages == [(2, 9), (11, 28)]


@pytest.mark.skipif(WIKI not in os.environ, reason=f"set {WIKI} to WikiText-2's valid.txt")
def test_reference_values_on_wikitext(smol):
    """32 x 128 tokens drawn evenly; the reference's own 8 (sinks) and 4 (ranks) are not known."""
    import json
    import random

    from melens.batches import Batch
    from melens.measuring import measure_all

    text = "\n".join(
        line for line in Path(os.environ[WIKI]).read_text("utf-8").split("\n") if line.strip()
    )
    ids = smol.tokenizer(text, verbose=False)["input_ids"]
    draw = random.Random(1)
    rows = [ids[i : i + 127] for i in (draw.randrange(len(ids) - 127) for _ in range(32))]
    batches = [
        Batch.of(torch.tensor([[smol.tokenizer.bos_token_id, *row] for row in rows[i : i + 8]]))
        for i in range(0, 32, 8)
    ]
    made = measure_all(smol, locate(smol, batches), batches, t=128)
    for rate, expected in zip(made.sinks.head_rate["0.3"], SINK_HEADS, strict=True):
        assert rate == pytest.approx(expected, abs=0.12)
    assert made.sinks.overall["0.3"] == pytest.approx(0.55, abs=0.02)
    reference = json.loads((Path(__file__).parent / "golden/smollm2_ranks.json").read_text())
    # a mean of 4 sequences against one of 32: the residual moves most with the text
    for site, tolerance in (("q", 1.5), ("k", 1.75), ("ln1", 4), ("resid_post", 4)):
        kept, left = made.collapse.curve(site)
        for layer, (with_token, without_token, _) in enumerate(reference[site]):
            assert kept[layer] == pytest.approx(with_token, abs=tolerance)
            assert left[layer] == pytest.approx(without_token, abs=tolerance)
