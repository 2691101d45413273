"""What cannot be quantized, and what would come out otherwise than meant: found before the first weight changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.calibration import ColumnPruning
from hfcompress.errors import ModelError, did_you_mean
from hfcompress.loading.record import says_shapes_alone
from hfcompress.packed import has_packed_form, packed_layers
from hfcompress.quantization.options import GPTQ, RTN
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.rtn import Grid
from hfcompress.structure.offload import is_offloaded
from hfcompress.structure.stack import stack_linears


def chosen_layers(
    model: PreTrainedModel, exclude: Iterable[str], more: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """Return the linear layers of the model's stacks by name, and ``more``, without those that are excluded.

    Layers that shrinking left no weight stay as they are: there is nothing in them to store in fewer bits.
    Raises ModelError when the model is quantized already, or when nothing is left.
    """
    recorded = getattr(model.config, "quantization_config", None)
    if packed_layers(model) or not (recorded is None or says_shapes_alone(model.config)):
        raise ModelError(f"{type(model).__name__} is quantized already; load the dense checkpoint instead.")
    candidates = {**stack_linears(model), **(more or {})}
    _check_exclude(model, candidates, exclude)
    chosen = {
        name: module for name, module in candidates.items() if not (_matches(name, exclude) or _is_empty(module))
    }
    if not chosen:
        raise ModelError(
            f"exclude={list(exclude)} leaves no linear layer of {type(model).__name__} to quantize. "
            f"Its {len(candidates)} linear layers have names like {_examples(candidates)}."
        )
    return chosen


def check_joint_pruning(method: object, prune: ColumnPruning, planned: Iterable[PlannedLinear]) -> None:
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
    if method.order != "stored":
        raise ModelError(
            f"order={method.order!r} takes columns apart that {type(prune).__name__} chooses from together. Use "
            "order='stored', or call hfcompress.prune first: quantize keeps its zeros."
        )
    period = prune.period or 1
    for one in planned:
        in_features = one.weight.shape[1]
        if in_features % period or (one.group_size or period) % period:
            raise ModelError(
                f"{one.name}: groups of {period} columns of the pruning pattern do not divide its "
                f"{in_features} input columns or its quantization groups of {one.group_size} columns."
            )


def _is_empty(module: nn.Module) -> bool:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.numel() == 0


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


def check_weights(model: nn.Module, chosen: Mapping[str, nn.Module], loaded: bool) -> dict[str, tuple[str, ...]]:
    """Return the modules to pack, each with the names of those that share its weight: tied embeddings and heads.

    Refuses layers that compute more than a product, and weights that are no floating numbers, hold NaN or infinite
    values, or are shared by layers that would have to be packed apart.
    """
    homes: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "weight" in module._parameters:
            homes.setdefault(id(module.weight), []).append(name)
    found: dict[str, tuple[str, ...]] = {}
    for name, module in chosen.items():
        if loaded and not is_offloaded(module):
            check_values(name, module)
        first, *others = homes[id(module.weight)]
        modules = [model.get_submodule(one) for one in (first, *others)]
        refused = next((one for one in modules if not has_packed_form(one)), None)
        if refused is not None:
            raise ModelError(f"{name} is a {type(refused).__name__}, which has no packed form yet; leave it out.")
        if others and not any(isinstance(one, nn.Embedding) for one in modules):
            raise ModelError(
                f"{name} shares its weight ({', '.join((first, *others))}), so it cannot be replaced; exclude it."
            )
        found.setdefault(first, tuple(others))
    return found


def check_values(name: str, module: nn.Module) -> None:
    """Raise ModelError for a weight that holds NaN or infinite values, or no loaded floating numbers."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or weight.device.type == "meta":
        raise ModelError(f"{name}.weight is {weight.dtype} on {weight.device}, not loaded floating numbers.")
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{name}.weight holds NaN or infinite values; the checkpoint is damaged.")


def warn_about_other_grid(model: nn.Module, planned: Iterable[PlannedLinear], method: object) -> None:
    """Warn about layers that were trained for another grid than they get, or for one and get none."""
    trained = {
        name: grid for name, module in model.named_modules() if isinstance(grid := vars(module).get("grid"), Grid)
    }
    same = {
        name
        for one in planned
        for name in (one.name, *one.also)
        if isinstance(method, RTN) and _grid_without_dtype(trained.get(name)) == one.grid(method.scale)
    }
    other = [name for name in trained if name not in same]
    if other:
        warnings.warn(
            f"{len(other)} layers ({_examples(other)}) were trained for {trained[other[0]]} and get another or none: "
            "QuantizeAwareCallback.export gives them theirs.",
            stacklevel=4,
        )


def _grid_without_dtype(grid: Grid | None) -> Grid | None:
    return None if grid is None else replace(grid, dtype=None)
