"""Attention that no hook shows is not attention that is not there."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, NemotronHConfig

from melens.batches import Batch
from melens.errors import InterventionError, ModelError, SiteError
from melens.interventions import drop_key
from melens.measuring import attention, collapse, sinks
from melens.models import anatomy, load
from melens.models.decoder import decoder_of
from melens.patching.sites import SITES

SIZES = {"vocab_size": 64, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2}
TEXTS = [Batch.of(torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3)))]
UNREAD = "the attention of layer 1 cannot be read here: no hook shows its pattern"


def plain(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def hybrid():
    return plain(
        NemotronHConfig(
            num_hidden_layers=4,
            hybrid_override_pattern="M*-M",
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=1,
            expand=2,
            intermediate_size=64,
            **SIZES,
        )
    )


def test_nemotron_h_has_attention_that_cannot_be_read(hybrid, tokenizer):
    assert list(decoder_of(hybrid).inputs) == [1]  # of the plain model, measured
    model = load(hybrid, tokenizer=tokenizer)
    assert anatomy(model).attention_layers == ()
    assert [block.layer for block in anatomy(model).blocks if block.unread] == [1]
    assert decoder_of(model).unread == (1,)
    with pytest.raises(ModelError, match=UNREAD):
        sinks(model, prompts=TEXTS)
    with pytest.raises(SiteError, match=UNREAD):
        attention(model, prompts=TEXTS)
    with pytest.raises(SiteError, match=UNREAD):
        attention(model, prompts=TEXTS, layers=[1])
    found = collapse(model, prompts=TEXTS)
    assert any("cannot be read here" in line and "layers 1)" in line for line in found.missing)
    with (
        pytest.raises(InterventionError, match="attention of layer 1 cannot be edited here"),
        drop_key(model, 0),
    ):
        model(TEXTS[0].ids)
    assert "cannot be read here" in SITES["z"].find(model, 1)
    assert SITES["z"].find(model, 0) == "the layer has no attention"


def test_mamba_has_none(tokenizer):
    model = load(plain(MambaConfig(num_hidden_layers=2, state_size=8, **SIZES)))
    assert not any(block.unread for block in anatomy(model).blocks)
    with pytest.raises(ModelError, match="no layer of this model has attention"):
        sinks(model, prompts=TEXTS)
