"""Experts that are slices of one tensor, taken apart so that each of their matrices is quantized like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.packed.experts import SplitExperts, expert_linears, split_experts
from hfcompress.quantization.float8 import Float8
from hfcompress.quantization.options import GPTQ, RTN
from hfcompress.quantization.placing import put_
from hfcompress.structure.experts import ExpertMatrix, fused_experts, stored_matrices
from hfcompress.structure.offload import is_offloaded
from hfcompress.structure.parts_on_disk import PartOnDisk, WholeOnDisk
from hfcompress.structure.shapes import uneven_shapes

Function = TypeVar("Function", bound=Callable[..., Any])
PROBE_TOKENS = 8
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest output


def with_split_experts(function: Function) -> Function:
    """Have a function of model and method see experts as linear layers; if it fails, they are put back."""

    @wraps(function)
    def run(model: PreTrainedModel, method: Any, *args: Any, **kwargs: Any) -> Any:
        fused = split_experts_(model, method) if method.package == "compressed_tensors" else {}
        try:
            result = function(model, method, *args, **kwargs)
        except BaseException:
            join_experts_(model, fused)
            raise
        for split in split_experts(model).values():
            split.__dict__["on_disk"] = None
        return result

    return cast(Function, run)


def split_experts_(model: PreTrainedModel, method: Any) -> dict[str, nn.Module]:
    """Put linear layers in the place of experts that are slices of one tensor; they share the slices' memory.

    Returns the modules that were replaced by name.  Raises ModelError, with the model as it was, for experts that
    cannot be taken apart, and for methods whose result stock Transformers does not read as experts.
    """
    names = list(fused_experts(model))
    if not names:
        return {}
    _refuse_unreadable(model, method, names[0])
    split = {}
    for name, matrices in stored_matrices(model, names).items():
        fused = model.get_submodule(name)
        split[name] = _split(fused, matrices)
        if all(type(fused) is not type(model.get_submodule(other)) for other in list(split)[:-1]):
            _check_alike(name, fused, split[name])
    replaced = {name: model.get_submodule(name) for name in split}
    for name, module in split.items():
        put_(model, name, module)
    return replaced


def join_experts_(model: nn.Module, fused: Mapping[str, nn.Module]) -> None:
    """Put experts back that were taken apart."""
    for name, module in fused.items():
        put_(model, name, module)


def refuse_dense_experts(model: nn.Module, chosen: Iterable[str]) -> None:
    """Raise ModelError for experts that would stay dense: those not taken apart, or excluded.

    Transformers expects packed experts in a compressed-tensors checkpoint, and fills dense ones with random numbers.
    """
    packed = set(chosen)
    for name, linears in expert_linears(model).items():
        dense = [one for one in linears if one not in packed]
        if dense:
            raise ModelError(
                f"exclude leaves {len(dense)} of the {len(linears)} matrices of {name} dense, such as '{dense[0]}', "
                "and Transformers reads no compressed-tensors checkpoint in which experts are dense. "
                f"BitsAndBytes(exclude=('*.{name.rpartition('.')[2]}',)) quantizes the layers around them."
            )
    for name, fused in fused_experts(model).items():
        raise ModelError(
            f"{name} holds its experts as slices of one tensor ({', '.join(fused)}), which are not trained for a "
            "grid. Quantize the trained model with hfcompress.quantize and RTN or GPTQ instead."
        )


def _refuse_unreadable(model: PreTrainedModel, method: Any, name: str) -> None:
    """Raise ModelError for what stock Transformers does not read as experts, or reads otherwise than meant."""
    kind = type(method).__name__
    reason = ""
    if getattr(method, "activations", None) or kind == "SmoothQuant":
        reason = "Transformers unpacks experts while it loads them, and would not round their inputs"
    elif not isinstance(method, (RTN, GPTQ, Float8)):
        reason = f"{kind} does not know how to go past their router"
    elif not method.symmetric:
        reason = "Transformers stops at experts with zero points; symmetric=True has none"
    elif uneven_shapes(model):
        reason = "the model's shapes are uneven, and our loader for such models knows no packed experts"
    if reason:
        instead = "" if isinstance(method, (RTN, GPTQ)) else " Use RTN or GPTQ, which pack each expert by itself."
        raise ModelError(f"{name} holds its experts as slices of one tensor: {reason}.{instead}")


def _split(fused: nn.Module, matrices: Sequence[ExpertMatrix]) -> SplitExperts:
    """Return the same experts with a linear layer per matrix, which is a view of the slice."""
    linears: dict[str, nn.Linear] = {}
    leaves: dict[str, list[str]] = {}
    whole = WholeOnDisk(fused, len(matrices)) if is_offloaded(fused) else None
    for one in matrices:
        values = one.of(fused)
        linear = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta", dtype=values.dtype)
        linear.weight = nn.Parameter(values, requires_grad=fused.get_parameter(one.parameter).requires_grad)
        if whole is not None:
            linear._hf_hook = PartOnDisk(whole, one)
        linears[one.name] = linear.train(fused.training)
        if one.expert == 0:
            leaves.setdefault(one.parameter, []).append(one.leaf)
    (last,) = leaves.pop("down_proj")
    (first,) = leaves.values()
    split = SplitExperts(fused, linears, first, last)
    split.__dict__["on_disk"] = fused if whole is not None else None
    return split


@torch.no_grad()
def _check_alike(name: str, fused: nn.Module, split: SplitExperts) -> None:
    """Raise ModelError where experts taken apart do not compute what Transformers' own module does."""
    parameter = fused.get_parameter("down_proj")
    if parameter.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    places = min(2, split.count)
    tokens = torch.randn(PROBE_TOKENS, parameter.shape[1], generator=generator).to(parameter)
    chosen = torch.rand(PROBE_TOKENS, split.count, generator=generator).topk(places).indices.to(parameter.device)
    weights = torch.full((PROBE_TOKENS, places), 1 / places).to(parameter)
    expected, found = fused(tokens, chosen, weights).float(), split(tokens, chosen, weights).float()
    tolerance = PROBE_TOLERANCE.get(parameter.dtype, 1e-4) * float(expected.abs().max())
    if not torch.allclose(found, expected, rtol=0, atol=tolerance):
        raise ModelError(
            f"{name} ({type(fused).__name__}) computes something else than a linear layer, a gate and another linear "
            "layer for each expert, so its experts cannot be packed one by one. "
            f"BitsAndBytes(exclude=('*.{name.rpartition('.')[2]}',)) quantizes the layers around them."
        )
