"""Reference values on the real SmolLM2-135M (docs/definitions.md); fp32, CPU."""

from __future__ import annotations

import pytest
import torch

from melens.batches import prompts
from melens.emergence import locate
from melens.knowledge import known

pytestmark = pytest.mark.weights
TEXT = "My favorite color is Dark Blue."

NORMS_WITH_BOS = [
    98.7, 345.0, 810.5, 806.3, 800.8, 792.3, 783.8, 772.1, 631.9, 152.3, 180.8, 25101.9, 25094.1,
    25082.3, 25070.1, 25053.8, 25040.1, 25025.9, 25017.9, 25011.3, 25011.1, 25018.9, 25013.0,
    25015.7, 24987.0, 24990.5, 24984.4, 24754.9, 10689.6, 6134.4,
]  # fmt: skip
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
    from melens.emergence.trajectory import trace

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


def test_bf16_gives_the_same_layers(found):
    from melens.models import load

    rough = locate(load("smollm2-135m", device="cpu", dtype="bfloat16"), prompts())
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
