"""Which weights are pruned in one shot; every fault of the model is found here, before the first weight changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError
from hfcompress.packed import packed_layers
from hfcompress.pruning.masks import prunable_weights
from hfcompress.pruning.oneshot.magnitude import Magnitude
from hfcompress.pruning.oneshot.options import group_pattern
from hfcompress.pruning.oneshot.sparsegpt import SparseGPT
from hfcompress.pruning.oneshot.wanda import Wanda
from hfcompress.pruning.patterns import NofM
from hfcompress.structure.stack import LINEAR_TYPES, stack_linears


@dataclass(frozen=True)
class PlannedWeight:
    """One weight to prune.  name: of its module.  weight: as rows of outputs, (out, in); a view of the parameter."""

    name: str
    module: nn.Module
    weight: Tensor


def plan_weights(
    model: PreTrainedModel,
    method: Magnitude | Wanda | SparseGPT,
    targets: Iterable[str] | None,
    exclude: Iterable[str],
    *,
    loaded: bool = True,
) -> dict[str, PlannedWeight]:
    """Return the weights to prune by their modules' names; one that two modules share appears once.

    loaded: False checks a model on the meta device, by shapes alone, before its weights are loaded.  Raises ModelError
    when the model is quantized, when nothing matches, and for weights that are damaged or cannot be pruned.
    """
    if packed_layers(model) or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{type(model).__name__} is quantized already; prune the dense model first and quantize it then, or give "
            "quantize a SparseGPT to do both in one pass."
        )
    names = [name.removesuffix(".weight") for name in prunable_weights(model, targets, exclude)]
    modules = {name: model.get_submodule(name) for name in names}
    if method.needs_calibration:
        _check_seen_by_the_walk(model, modules, type(method).__name__)
    pattern = group_pattern(method.pattern)
    planned = {}
    for name, module in modules.items():
        assert isinstance(module.weight, nn.Parameter)
        if loaded:
            _check_values(name, module.weight)
        weight = module.weight.detach()
        planned[name] = PlannedWeight(name, module, weight.T if isinstance(module, Conv1D) else weight)
        if pattern is not None:
            _check_divides(planned[name], pattern)
    return planned


def _check_seen_by_the_walk(model: nn.Module, modules: Mapping[str, nn.Module], method: str) -> None:
    inside = stack_linears(model)
    for name, module in modules.items():
        if name not in inside:
            raise ModelError(
                f"{name} ({type(module).__name__}) is no linear layer inside the model's stack of layers, so {method} "
                "cannot see its inputs. Leave it out, or prune it by Magnitude."
            )


def _check_divides(one: PlannedWeight, pattern: NofM) -> None:
    if not isinstance(one.module, LINEAR_TYPES):
        raise ModelError(
            f"{one.name} is a {type(one.module).__name__}, but the pattern {pattern.kept}:{pattern.group} is for the "
            "input columns of linear layers. Leave it out, or prune it without a pattern."
        )
    if not pattern.divides(*one.weight.shape):
        raise ModelError(
            f"{one.name} has {one.weight.shape[1]} input columns, which groups of {pattern.group} do not divide. "
            f"Exclude it, or choose another pattern than {pattern.kept}:{pattern.group}."
        )


def _check_values(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point() or weight.device.type == "meta":
        raise ModelError(f"{name}.weight is {weight.dtype} on {weight.device}, not loaded floating numbers.")
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{name}.weight holds NaN or infinite values; the checkpoint is damaged.")
