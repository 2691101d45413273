"""Which linear layers are quantized and how; every fault is found here, before the first weight changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import gcd
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.calibration import ColumnPruning
from hfcompress.errors import ModelError, did_you_mean
from hfcompress.loading.record import says_shapes_alone
from hfcompress.packed import has_packed_form, packed_layers
from hfcompress.packed.format import is_seq2seq
from hfcompress.quantization.options import GPTQ, RTN
from hfcompress.quantization.rtn import Grid, Scale
from hfcompress.structure.offload import is_offloaded
from hfcompress.structure.stack import layer_stacks, stack_linears


class LinearMethod(Protocol):
    """What the plan reads of a method's options; see ``RTN``."""

    @property
    def package(self) -> str: ...  # noqa: D102

    @property
    def bits(self) -> int: ...  # noqa: D102

    @property
    def group_size(self) -> int | None: ...  # noqa: D102

    @property
    def symmetric(self) -> bool: ...  # noqa: D102

    @property
    def embeddings(self) -> bool: ...  # noqa: D102

    @property
    def head(self) -> bool: ...  # noqa: D102

    @property
    def exclude(self) -> tuple[str, ...]: ...  # noqa: D102


GROUP_MULTIPLE = 8
SMALLEST_HALF = 32


@dataclass(frozen=True)
class PlannedLinear:
    """One layer and the grid it gets.

    name: the full name.  group_size: columns of the stored matrix that share a scale; None is one scale per row.
    also: other modules with the same weight by name, which become packed together with this one.
    """

    name: str
    module: nn.Module
    bits: int
    group_size: int | None
    requested_group_size: int | None
    symmetric: bool = True
    also: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def matrix(self) -> Tensor:
        """Return the weight as it is stored: (out, in), but (in, out) for Conv1D and (tokens, size) for embeddings."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def weight(self) -> Tensor:
        """Return the weight of a linear layer as rows of outputs, (out, in)."""
        return self.as_weight(self.matrix)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix as it is stored as rows of outputs."""
        return matrix.T if isinstance(self.module, Conv1D) else matrix

    def grid(self, scale: Scale, dtype: torch.dtype | None = None) -> Grid:
        """Return how the stored matrix is rounded to nearest."""
        return Grid(self.bits, self.group_size, self.symmetric, scale, dtype)


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


def plan_linears(model: PreTrainedModel, method: LinearMethod, *, loaded: bool = True) -> list[PlannedLinear]:
    """Return the linear layers of the model's stacks that the method quantizes.

    loaded: False checks a model on the meta device, by shapes alone, before its weights are loaded.  Raises ModelError
    when the model is quantized already, has layers that cannot be packed, shares or damages a targeted weight, or when
    nothing is left to quantize. Warns once about group sizes that do not divide.
    """
    chosen = chosen_layers(model, method.exclude, outside_layers(model, method.embeddings, method.head))
    if method.package == "compressed_tensors":
        _refuse_fused_experts(model)
    also = _check_weights(model, chosen, loaded)
    chosen = {name: model.get_submodule(name) for name in also}
    asked = method.group_size
    sizes = {name: _columns(module) for name, module in chosen.items()}
    # Stock Transformers unpacks some models by one scheme only, so there one group size has to fit all.
    plain = method.symmetric and all(isinstance(module, nn.Linear) for module in chosen.values())
    common = None if plain and not is_seq2seq(model) else gcd(*sizes.values())
    planned = [
        PlannedLinear(
            name,
            module,
            method.bits,
            fitting_group_size(common or sizes[name], asked),
            asked,
            method.symmetric,
            {other: model.get_submodule(other) for other in also[name]},
        )
        for name, module in chosen.items()
    ]
    if loaded:
        _warn_about_group_sizes(planned)
    return planned


def chosen_layers(
    model: PreTrainedModel, exclude: Iterable[str], more: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """Return the linear layers of the model's stacks by name, and ``more``, without those that are excluded.

    Raises ModelError when the model is quantized already, or when nothing is left.
    """
    recorded = getattr(model.config, "quantization_config", None)
    if packed_layers(model) or not (recorded is None or says_shapes_alone(model.config)):
        raise ModelError(f"{type(model).__name__} is quantized already; load the dense checkpoint instead.")
    candidates = {**stack_linears(model), **(more or {})}
    _check_exclude(model, candidates, exclude)
    chosen = {name: module for name, module in candidates.items() if not _matches(name, exclude)}
    if not chosen:
        raise ModelError(
            f"exclude={list(exclude)} leaves no linear layer of {type(model).__name__} to quantize. "
            f"Its {len(candidates)} linear layers have names like {_examples(candidates)}."
        )
    return chosen


def fused_experts(model: nn.Module) -> dict[str, list[str]]:
    """Return the modules whose parameters hold one matrix per expert, by name, with these parameters' names."""
    found = {}
    for stack in layer_stacks(model):
        for name, module in stack.layers.named_modules():
            fused = [leaf for leaf, one in module._parameters.items() if one is not None and _holds_matrices(one)]
            if fused and not isinstance(module, _ConvNd):
                found[f"{stack.name}.{name}"] = fused
    return found


def _refuse_fused_experts(model: nn.Module) -> None:
    """Raise ModelError for experts that are slices of one tensor: most weights would stay dense without a word.

    Nor could they on request: Transformers expects packed experts in a compressed-tensors checkpoint, and fills those
    that are dense with random numbers.
    """
    for name, fused in fused_experts(model).items():
        raise ModelError(
            f"{name} holds its experts as slices of one tensor ({', '.join(fused)}), which is not packed yet, and "
            "Transformers reads no compressed-tensors checkpoint in which experts are dense. "
            f"BitsAndBytes(exclude=('*.{name.rpartition('.')[2]}',)) quantizes the layers around them."
        )


def _holds_matrices(parameter: Tensor) -> bool:
    return parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point()


def _columns(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1])


def outside_layers(model: PreTrainedModel, embeddings: bool, head: bool) -> dict[str, nn.Module]:
    """Return the input embeddings and the output head by name, where they are asked for.

    Raises ModelError when the model has none, such as embeddings of pixels.
    """
    found: dict[str, nn.Module] = {}
    for asked, get, kind in (
        (embeddings, model.get_input_embeddings, nn.Embedding),
        (head, model.get_output_embeddings, nn.Linear),
    ):
        if not asked:
            continue
        module = get()
        if not isinstance(module, kind):
            what = "embeddings" if kind is nn.Embedding else "head"
            raise ModelError(f"{what}=True, but {type(model).__name__} has no {what} over a vocabulary. Leave it out.")
        found[next(name for name, one in model.named_modules() if one is module)] = module
    return found


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
    period = prune.period or 1
    for one in planned:
        in_features = one.weight.shape[1]
        if in_features % period or (one.group_size or period) % period:
            raise ModelError(
                f"{one.name}: groups of {period} columns of the pruning pattern do not divide its "
                f"{in_features} input columns or its quantization groups of {one.group_size} columns."
            )


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


def _check_weights(model: nn.Module, chosen: Mapping[str, nn.Module], loaded: bool) -> dict[str, tuple[str, ...]]:
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


def _warn_about_group_sizes(planned: Iterable[PlannedLinear]) -> None:
    changed: dict[str, list[str]] = {}
    for one in planned:
        if one.group_size != one.requested_group_size:
            size = "one scale per row" if one.group_size is None else str(one.group_size)
            note = f"{one.requested_group_size} -> {size} for {_columns(one.module)} columns"
            changed.setdefault(note, []).append(one.name)
    if changed:
        parts = [f"{note} ({len(names)} layers, such as {names[0]})" for note, names in changed.items()]
        message = f"Group sizes that do not divide the input columns were changed: {'; '.join(parts)}."
        warnings.warn(message, stacklevel=4)


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
            stacklevel=3,
        )


def _grid_without_dtype(grid: Grid | None) -> Grid | None:
    return None if grid is None else replace(grid, dtype=None)
