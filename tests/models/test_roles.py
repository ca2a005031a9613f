"""What each module of a block does, also where a massive token stands among others."""

from __future__ import annotations

import families
import pytest
import torch

from melens.models.decoder import decoder_of
from melens.models.roles import roles_of

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))
NAMES = ("HeliumForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM", "GPT2LMHeadModel")


def told(model, ids):
    return [
        (set(row.writes), row.norms, row.mixers, row.ffn, row.ffn_reads, row.why)
        for row in roles_of(model, ids)
    ]


def test_a_block_in_closed_form():
    plain = families.tiny("GraniteForCausalLM/scaled")  # adds half of what its parts make
    for row in roles_of(plain, IDS):
        assert row.writes == pytest.approx({"self_attn": 0.5, "mlp": 0.5})
        assert row.norms == {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
        assert (row.ffn, row.ffn_reads) == ("mlp", "post_attention_layernorm")
        form = row.formula
        assert (form.gate, form.up, form.down) == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_massive_token_hides_no_part(name, dtype):
    """Token 1 stands first and is massive: other tokens count by their own size."""
    plain = families.tiny(name).to(dtype)
    ids = IDS.clone()
    ids[:, 0] = 1
    expected = told(plain, ids)
    massive = families.tiny(name)
    families.plant(massive, 1, 7, size=30000.0)
    assert told(massive.to(dtype), ids) == expected
    assert not any(row[-1] for row in expected)


def test_parallel_parts_with_a_norm_each_are_told_apart():
    for row in roles_of(families.tiny("FalconForCausalLM/40b"), IDS):
        assert row.norms == {"ln1": "ln_attn", "ln2": "ln_mlp"}
        assert row.ffn_reads == "ln_mlp"


def test_an_open_hook_is_no_part_of_what_a_plain_model_is():
    plain = families.tiny("HeliumForCausalLM")
    handle = plain.model.layers[1].register_forward_hook(lambda module, args, out: out + 1)
    found = decoder_of(plain)
    handle.remove()
    assert list(found.ffns) == [0, 1, 2]
    assert found.norms[1] is plain.model.layers[1].input_layernorm
