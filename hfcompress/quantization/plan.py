"""Which linear layers are quantized and how; every fault is found here, before the first weight changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.calibration import ColumnPruning
from hfcompress.errors import ModelError, did_you_mean
from hfcompress.packed import packed_linears
from hfcompress.quantization.options import GPTQ, RTN
from hfcompress.structure.stack import stack_linears

GROUP_MULTIPLE = 8
SMALLEST_HALF = 32


@dataclass(frozen=True)
class PlannedLinear:
    """One linear layer and the grid it gets.  name: the full name.  group_size: None is one scale per output row."""

    name: str
    module: nn.Linear
    bits: int
    group_size: int | None
    requested_group_size: int | None


def fitting_group_size(in_features: int, requested: int | None) -> int | None:
    """Return ``requested`` if it divides ``in_features``, or else a smaller size that does.

    Halves of what was requested come first, down to 32: serving engines have kernels for them.  Then the largest
    divisor that is a multiple of 8.  None is one scale per row: what was asked for, or the only choice left.
    """
    if requested is None:
        return None
    if in_features % requested == 0:
        return requested
    halves = [requested // 2**times for times in range(1, requested.bit_length()) if requested % 2**times == 0]
    sizes = [*(half for half in halves if half >= SMALLEST_HALF), *range(min(requested, in_features), 0, -1)]
    return next((size for size in sizes if size % GROUP_MULTIPLE == 0 and in_features % size == 0), None)


def plan_linears(model: PreTrainedModel, method: RTN | GPTQ) -> list[PlannedLinear]:
    """Return the linear layers of the model's stacks that the method quantizes.

    Raises ModelError when the model is quantized already, has layers that cannot be packed, shares or damages a
    targeted weight, or when nothing is left to quantize. Warns once about group sizes that do not divide.
    """
    already = packed_linears(model)
    if already or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{type(model).__name__} is quantized already; load the dense checkpoint instead.")
    candidates = stack_linears(model)
    _check_exclude(model, candidates, method.exclude)
    chosen = {name: module for name, module in candidates.items() if not _matches(name, method.exclude)}
    if not chosen:
        raise ModelError(
            f"exclude={list(method.exclude)} leaves no linear layer of {type(model).__name__} to quantize. "
            f"Its {len(candidates)} linear layers have names like {_examples(candidates)}."
        )
    linears = _packable(chosen)
    _check_weights(model, linears)
    asked = method.group_size
    # Stock Transformers reads an encoder-decoder's layers by one scheme only, so there one group size has to fit all.
    common = gcd(*(linear.in_features for linear in linears.values())) if _is_seq2seq(model) else None
    planned = [
        PlannedLinear(name, linear, method.bits, fitting_group_size(common or linear.in_features, asked), asked)
        for name, linear in linears.items()
    ]
    _warn_about_group_sizes(planned)
    return planned


def check_joint_pruning(method: RTN | GPTQ, prune: ColumnPruning, planned: Iterable[PlannedLinear]) -> None:
    """Raise ModelError for a pruning method that cannot share the quantizer's pass over the columns."""
    if not isinstance(prune, ColumnPruning):
        raise ModelError(
            f"{type(prune).__name__} does not prune column by column, so it cannot share a pass with quantization; "
            "use SparseGPT, or call hfcompress.prune first: quantize keeps its zeros."
        )
    if not isinstance(method, GPTQ):
        raise ModelError(f"{type(method).__name__} sees no data; pruning and rounding in one pass needs GPTQ.")
    if prune.damping != method.damping:
        raise ModelError(
            f"One Hessian serves both, but damping is {prune.damping:g} for pruning and {method.damping:g} for GPTQ; "
            "give both the same."
        )
    period = prune.period or 1
    for one in planned:
        if one.module.in_features % period or (one.group_size or period) % period:
            raise ModelError(
                f"{one.name}: groups of {period} columns of the pruning pattern do not divide its "
                f"{one.module.in_features} input columns or its quantization groups of {one.group_size} columns."
            )


def _is_seq2seq(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _examples(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in list(names)[:3])


def _check_exclude(model: nn.Module, candidates: Mapping[str, nn.Module], exclude: Iterable[str]) -> None:
    """A pattern that matches no module at all is a typing error, and its layers would be quantized silently."""
    everything = [name for name, _ in model.named_modules()]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in everything):
            raise ModelError(
                f"exclude pattern '{pattern}' matches no module of {type(model).__name__}. "
                f"{did_you_mean(pattern, everything)}Its linear layers have names like {_examples(candidates)}."
            )


def _packable(chosen: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    linears: dict[str, nn.Linear] = {}
    for name, module in chosen.items():
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"{name} is a {type(module).__name__} (GPT-2's layout of a linear layer). GPT-2's Conv1D cannot be "
                "quantized yet: the compressed-tensors format knows nn.Linear only."
            )
        linears[name] = module
    return linears


def _check_weights(model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    """Refuse weights that live in two places, are no floating numbers, or hold NaN or infinite values."""
    homes: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            homes.setdefault(id(parameter), []).append(f"{name}.{parameter_name}")
    for name, linear in linears.items():
        weight = linear.weight
        shared = homes[id(weight)]
        if len(shared) > 1:
            raise ModelError(f"{name} shares its weight ({', '.join(shared)}), so it cannot be replaced; exclude it.")
        if not weight.is_floating_point() or weight.device.type == "meta":
            raise ModelError(f"{name}.weight is {weight.dtype} on {weight.device}, not loaded floating numbers.")
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{name}.weight holds NaN or infinite values; the checkpoint is damaged.")


def _warn_about_group_sizes(planned: Iterable[PlannedLinear]) -> None:
    changed: dict[str, list[str]] = {}
    for one in planned:
        if one.group_size != one.requested_group_size:
            size = "one scale per row" if one.group_size is None else str(one.group_size)
            note = f"{one.requested_group_size} -> {size} for {one.module.in_features} columns"
            changed.setdefault(note, []).append(one.name)
    if changed:
        parts = [f"{note} ({len(names)} layers, such as {names[0]})" for note, names in changed.items()]
        message = f"Group sizes that do not divide the input columns were changed: {'; '.join(parts)}."
        warnings.warn(message, stacklevel=4)
