"""What a number format makes of values: closed forms, and the libraries' own answers."""

from __future__ import annotations

import pytest
import torch

from melens.errors import ModelError
from melens.quantising.rounding import packed, require_divides, rounded, scale_of
from melens.quantising.schemes import SCHEMES, Grid


@pytest.fixture
def matrix():
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_the_nearest_multiples_of_a_step_from_the_largest(bits, matrix):
    found = packed(matrix, Grid(bits, "channel")).dense(torch.float32).double()
    step = matrix.abs().amax(-1, keepdim=True).double() / ((2**bits - 1) / 2)
    codes = found / step
    assert (codes - codes.round()).abs().max() < 1e-5
    assert codes.round().min() >= -(2 ** (bits - 1))
    assert codes.round().max() <= 2 ** (bits - 1) - 1
    # half a step at most, that of the largest entry too: it lies between two steps
    assert ((found - matrix).abs() / step).max() < 0.5 + 1e-5


def test_groups_have_a_scale_each_and_it_counts_among_the_bits(matrix):
    few = matrix[:, :32]
    made = packed(few, Grid(4, "group"))
    assert (made.group, made.bits) == (32, 4 + 16 / 32)
    wide = torch.cat([few, 100 * few, -few], dim=1)
    found = packed(wide, Grid(4, "group")).dense(torch.float32).split(32, dim=1)
    torch.testing.assert_close(found[0], made.dense(torch.float32))
    assert (found[1] - 100 * few).abs().max() <= 100 * (found[0] - few).abs().max() * 1.01


def test_fp8_is_what_torch_casts_to(matrix):
    grid = Grid(8, "tensor", "float", scale=1.0)
    found = rounded(matrix, scale_of(grid, matrix.abs().amax()), grid)
    assert torch.equal(found, matrix.to(torch.float8_e4m3fn).float())
    assert rounded(torch.tensor([1e4]), torch.ones(1), grid).item() == 448  # cut, no infinity


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_gguf_blocks_are_those_of_a_file(name, matrix, tmp_path):
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

    kind = GGMLQuantizationType[name]
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", quants.quantize(matrix.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = GGUFReader(tmp_path / "x.gguf").tensors
    made = packed(matrix, name)
    assert torch.equal(
        made.dense(torch.float32), torch.tensor(quants.dequantize(tensor.data, kind))
    )
    assert made.bits == {"Q8_0": 8.5, "Q4_0": 4.5}[name]


def test_a_packed_matrix_is_no_second_copy(matrix):
    for scheme in SCHEMES.values():
        if scheme.weights is not None:
            assert packed(matrix, scheme.weights).held < 0.3 * matrix.nbytes


def test_rows_that_do_not_divide_are_refused_by_name():
    for grid in ("Q8_0", Grid(4, "group")):
        with pytest.raises(ModelError, match=r"model.x have 40 weights"):
            require_divides(40, grid, "model.x")
    require_divides(40, Grid(8, "channel"), "model.x")


def test_zeros_stay_zero():
    for scheme in SCHEMES.values():
        if scheme.weights is not None:
            assert not packed(torch.zeros(2, 64), scheme.weights).dense(torch.float32).any()
