"""What a norm multiplies by, against norms whose formula is written here."""

import pytest
import torch
from torch import nn

from melens.errors import ModelError
from melens.models.norms import measured_norm


class Written(nn.Module):
    """(offset + weight) * normalised + bias."""

    def __init__(self, width, *, offset, centred=False, bias=False):
        super().__init__()
        rng = torch.Generator().manual_seed(width)
        self.weight = nn.Parameter(torch.randn(width, generator=rng))
        self.bias = nn.Parameter(torch.randn(width, generator=rng)) if bias else None
        self.offset, self.centred = offset, centred

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        made = x * (self.offset + self.weight)
        return made if self.bias is None else made + self.bias


@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize(
    ("offset", "centred", "bias"), [(0, 0, 0), (1, 0, 0), (1, 1, 1), (0, 1, 1)]
)
def test_the_gain_is_what_the_formula_says(width, offset, centred, bias):
    module = Written(width, offset=offset, centred=centred, bias=bias)
    found = measured_norm(module, width, where="here")
    assert found.kind == ("layer" if centred else "rms")
    assert found.offset == offset
    torch.testing.assert_close(found.gain, module.weight + offset)  # exact: not as measured
    expected = module.bias if bias else torch.zeros(width)
    torch.testing.assert_close(found.bias, expected, atol=1e-5, rtol=1e-5)


def test_torch_s_own_norms_are_read():
    for module, kind in ((nn.LayerNorm(16), "layer"), (nn.RMSNorm(16), "rms")):
        nn.init.normal_(module.weight)
        found = measured_norm(module, 16, where="here")
        assert (found.kind, found.offset) == (kind, 0.0)
        torch.testing.assert_close(found.gain, module.weight.detach())
    assert measured_norm(nn.LayerNorm(16, elementwise_affine=False), 16, where="here").is_bare


def test_an_adapter_on_a_norm_is_part_of_what_it_multiplies_by():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.by = nn.RMSNorm(16), nn.Parameter(torch.rand(16) + 0.5)

        def forward(self, x):
            return self.base(x) * self.by

    module = Adapted()
    nn.init.normal_(module.base.weight)
    found = measured_norm(module, 16, where="here")
    assert found.offset is None
    torch.testing.assert_close(found.gain, (module.base.weight * module.by).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_stored_weight(dtype):
    module = Written(64, offset=1).to(dtype)
    found = measured_norm(module, 64, where="here")
    assert found.offset == 1.0
    torch.testing.assert_close(found.gain, module.weight.float() + 1)


def test_what_is_no_norm_is_refused_by_name():
    with pytest.raises(ModelError, match="layer 3's norm, a Linear, is no normalisation"):
        measured_norm(nn.Linear(8, 8), 8, where="layer 3's norm")
