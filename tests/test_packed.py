"""Packed codes are laid out as compressed-tensors lays them out; a packed layer is the linear layer it stands for."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError
from hfcompress.packed import (
    PackedLinear,
    code_range,
    compressed_tensors_config,
    pack_codes,
    packed_twin,
    unpack_codes,
)
from tests.conftest import tiny_bert

BITS = (2, 3, 4, 8)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    low, high = code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.int8)


def packed_linear(
    bits: int, group_size: int | None, dtype: torch.dtype = torch.float32, columns: int = 96, rows: int = 5
) -> PackedLinear:
    codes = random_codes(rows, columns, bits)
    scale = torch.rand(rows, columns // (group_size or columns)).add(0.1).to(dtype)
    return PackedLinear.from_codes(codes, scale, torch.randn(rows).to(dtype), bits, group_size)


@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33, 64, 95, 130])
@pytest.mark.parametrize("bits", BITS)
def test_words_equal_those_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = random_codes(6, columns, bits)
    packed = pack_codes(codes, bits)
    theirs = pack_to_int32(codes, bits)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, theirs)
    assert torch.equal(unpack_codes(theirs, bits, columns), codes)
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size([6, columns])), codes)


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_survive_packing(bits: int) -> None:
    low, high = code_range(bits)
    codes = torch.tensor([[low] * 40, [high] * 40, [low, high] * 20], dtype=torch.int8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 40), codes)


def test_codes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("codes of 4 bits lie in [-8, 7], not [-3, 8]")):
        pack_codes(torch.tensor([[8, -3]]), 4)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bits cannot be packed; the widths are 2, 3, 4, 8"):
        pack_codes(torch.zeros(1, 8, dtype=torch.int8), 5)
    with pytest.raises(ValueError, match="9 codes of 4 bits take 2 words, not 1"):
        unpack_codes(torch.zeros(1, 1, dtype=torch.int32), 4, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", BITS)
def test_dequantised_weight_has_the_bits_that_compressed_tensors_gives(
    bits: int, group_size: int | None, dtype: torch.dtype
) -> None:
    module = packed_linear(bits, group_size, dtype)
    strategy = "group" if group_size else "channel"
    arguments = QuantizationArgs(num_bits=bits, strategy=strategy, group_size=group_size, symmetric=True)
    theirs = dequantize(module.codes(), module.weight_scale, None, arguments)
    assert module.dequantize().dtype == dtype
    assert torch.equal(module.dequantize(), theirs)


def test_state_dict_is_the_checkpoint_format_and_loads_back() -> None:
    module = packed_linear(4, 32)
    state = module.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "weight_packed": (5, 12), "weight_scale": (5, 3), "weight_shape": (2,), "bias": (5,),
    }  # fmt: skip
    assert state["weight_shape"].tolist() == [5, 96]
    empty = PackedLinear(96, 5, bits=4, group_size=32)
    empty.load_state_dict(state)
    assert torch.equal(empty.weight, module.weight)


def test_forward_equals_a_dense_layer_and_gives_inputs_their_gradient() -> None:
    module = packed_linear(3, None)
    dense = nn.Linear(96, 5)
    dense.load_state_dict({"weight": module.weight, "bias": module.bias.detach()})
    inputs = torch.randn(2, 3, 96, requires_grad=True)
    output = module(inputs)
    assert torch.equal(output, dense(inputs))
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, module.weight.sum(0).expand(2, 3, 96))
    assert [name for name, _ in module.named_parameters()] == ["bias"]


def test_autocast_computes_in_the_autocast_dtype() -> None:
    module = packed_linear(4, 32)
    inputs = torch.randn(4, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(inputs)
    expected = nn.functional.linear(inputs.bfloat16(), module.weight.bfloat16(), module.bias.bfloat16())
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


def test_inputs_of_another_dtype_keep_it() -> None:
    module = packed_linear(4, 32, torch.bfloat16)
    inputs = torch.randn(4, 96)
    expected = nn.functional.linear(inputs, module.weight.float(), module.bias.float())
    assert torch.equal(module(inputs), expected)


def test_casting_the_layer_moves_scales_and_keeps_codes() -> None:
    module = packed_linear(4, 32)
    codes = module.codes()
    cast = copy.deepcopy(module).to(torch.bfloat16)
    assert cast.weight.dtype == cast.bias.dtype == torch.bfloat16
    assert torch.equal(cast.codes(), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", BITS)
def test_zero_points_are_stored_and_used_as_compressed_tensors_does(
    bits: int, group_size: int | None, dtype: torch.dtype
) -> None:
    codes, groups = random_codes(37, 96, bits), 96 // (group_size or 96)
    points, scale = random_codes(37, groups, bits, seed=1), torch.rand(37, groups).add(0.1).to(dtype)
    module = PackedLinear.from_codes(codes, scale, None, bits, group_size, points)
    assert torch.equal(module.weight_zero_point, pack_to_int32(points, bits, packed_dim=0))
    assert torch.equal(module.zero_point(), points)
    strategy = "group" if group_size else "channel"
    arguments = QuantizationArgs(num_bits=bits, strategy=strategy, group_size=group_size, symmetric=False)
    assert torch.equal(module.dequantize(), dequantize(codes, scale, points, arguments))
    assert module.nonzero() == int(module.dequantize().count_nonzero())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_an_embedding_unpacks_the_rows_that_occur(bits: int, symmetric: bool) -> None:
    module = packed_twin(nn.Embedding(37, 96, padding_idx=0), bits, 32, symmetric)
    points = None if symmetric else random_codes(37, 3, bits, seed=1)
    module.fill_(random_codes(37, 96, bits), torch.rand(37, 3).add(0.1), points)
    ids = torch.tensor([[0, 36, 5], [5, 31, 32]])
    assert torch.equal(module(ids), nn.functional.embedding(ids, module.dequantize()))


def test_a_conv1d_keeps_its_layout_and_computes_the_same() -> None:
    dense = Conv1D(8, 96)
    packed = packed_twin(dense, 4, None)
    packed.fill_(random_codes(96, 8, 4), torch.rand(96, 1))
    dense.weight.data.copy_(packed.dequantize())
    inputs = torch.randn(2, 3, 96)
    assert torch.equal(packed(inputs), dense(inputs))
    assert (packed.nx, packed.nf) == (96, 8)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size 40 does not divide 96 columns"):
        PackedLinear(96, 5, bits=4, group_size=40)
    with pytest.raises(ValueError, match=re.escape("scale has shape (5, 2), not (5, 3)")):
        PackedLinear.from_codes(random_codes(5, 96, 4), torch.ones(5, 2), None, 4, 32)


def pack_some(model: nn.Module, schemes: dict[str, tuple[int, int | None]]) -> None:
    """Replace the linear layers whose name ends in a key by packed ones of its (bits, group size)."""
    for name, module in list(model.named_modules()):
        for ending, (bits, group_size) in schemes.items():
            if isinstance(module, nn.Linear) and name.endswith(ending):
                packed = PackedLinear(module.in_features, module.out_features, bits, group_size)
                model.set_submodule(name, packed)


def test_one_scheme_targets_linear_and_ignores_dense_layers() -> None:
    model = tiny_bert()
    pack_some(model, {"query": (4, 16), "key": (4, 16)})
    config = compressed_tensors_config(model)
    group = config["config_groups"]["group_0"]
    assert list(config["config_groups"]) == ["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16, "dynamic": False,
    }  # fmt: skip
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(config["ignore"]) == dense
    assert {"classifier", "bert.pooler.dense", "bert.encoder.layer.1.attention.self.value"} <= dense


def test_several_schemes_name_exactly_their_layers() -> None:
    model = tiny_bert()
    pack_some(model, {"self.query": (8, None), "0.output.dense": (4, 16), "1.output.dense": (4, 32)})
    config = compressed_tensors_config(model)
    found = {}
    for group in config["config_groups"].values():
        weights = group["weights"]
        for name, _ in model.named_modules():
            if any(re.match(target.removeprefix("re:"), name) for target in group["targets"]):
                found[name] = (weights["num_bits"], weights["group_size"], weights["strategy"])
    layers = "bert.encoder.layer"
    assert found == {
        f"{layers}.0.attention.self.query": (8, None, "channel"),
        f"{layers}.1.attention.self.query": (8, None, "channel"),
        f"{layers}.0.output.dense": (4, 16, "group"),
        f"{layers}.1.output.dense": (4, 32, "group"),
    }
    queries = next(group for group in config["config_groups"].values() if group["weights"]["num_bits"] == 8)
    assert len(queries["targets"]) == 1


def test_a_model_without_packed_layers_has_no_config() -> None:
    with pytest.raises(ModelError, match="no packed linear layer"):
        compressed_tensors_config(tiny_bert())
