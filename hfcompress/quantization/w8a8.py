"""Eight bits for weights and inputs: which layers take it, and rounding one of them to nearest."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.calibration.hessian import relative_error
from hfcompress.errors import ModelError
from hfcompress.packed.bytes import DTYPES, LIMITS, ByteLinear, Kind
from hfcompress.packed.format import is_seq2seq
from hfcompress.quantization.grids import storable_scale
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.report import QuantizedLinear
from hfcompress.quantization.rtn import Scale, round_to_nearest
from hfcompress.structure.shapes import uneven_shapes


def check_bytes(
    model: PreTrainedModel, planned: Sequence[PlannedLinear], activations: bool, kind: Kind = "int"
) -> None:
    """Raise ModelError where stock Transformers could not run what would be stored."""
    other = next((one for one in planned if type(one.module) is not nn.Linear), None)
    if other is not None:
        raise ModelError(
            f"{other.name} is a {type(other.module).__name__}; 8-bit codes with a scale per output are read back for "
            "Linear only. Exclude it, or use RTN(bits=8)."
        )
    if uneven_shapes(model):
        raise ModelError(
            f"This {type(model).__name__} has shapes that its config cannot say, which our loader reads with packed "
            "codes of other methods only. Use RTN(bits=8) or GPTQ."
        )
    if kind == "float" and is_seq2seq(model):
        raise ModelError(
            f"{type(model).__name__} has an encoder and a decoder; T5's code casts inputs to the dtype that a weight "
            "is stored in, which float8 does not survive. Use RTN(bits=8)."
        )
    if activations and is_seq2seq(model):
        raise ModelError(
            f"{type(model).__name__} has an encoder, which generate calls by itself; stock Transformers unpacks "
            "weights beside rounded inputs only when the whole model is called. Use RTN(bits=8)."
        )


def byte_codes(weight: Tensor, kind: Kind, scale: Scale = "absmax") -> tuple[Tensor, Tensor]:
    """Round a weight to 8-bit codes with a scale for each row.

    weight: (out, in).  Returns codes (out, in) int8 or float8_e4m3fn, scale (out, 1) in the weight's dtype.
    """
    if kind == "int":
        codes, found, _ = round_to_nearest(weight, 8, None, True, scale)
        return codes, found
    low, high, widest = LIMITS[kind]
    values = weight.detach().float()
    found = storable_scale(values.abs().amax(-1, keepdim=True) / widest, weight.dtype)
    return (values / found).clamp_(low, high).to(DTYPES[kind]), found.to(weight.dtype)


def byte_twin(one: PlannedLinear) -> ByteLinear:
    """Return a layer of int8 codes and rounded inputs for a dense one, without its codes."""
    assert isinstance(one.module, nn.Linear)
    return ByteLinear.twin_of(one.module, "int", activations=True)


def byte_layer(
    one: PlannedLinear, kind: Kind, activations: bool, scale: Scale = "absmax", tokens: int = 0
) -> tuple[ByteLinear, QuantizedLinear]:
    """Return what stands in the place of a linear layer, and its row; the error is the weight's."""
    started = time.perf_counter()
    assert isinstance(one.module, nn.Linear)
    layer = ByteLinear.twin_of(one.module, kind, activations)
    layer.weight, layer.weight_scale = byte_codes(one.matrix, kind, scale)
    with torch.no_grad():
        error = relative_error(one.matrix, layer.dequantize())
    return layer, QuantizedLinear(one.name, 8, None, None, error, None, tokens, time.perf_counter() - started)
