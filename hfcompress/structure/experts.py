"""Experts that are slices of one tensor: where they are, and which matrices a dense checkpoint holds in their stead.

Transformers keeps all experts of a layer in 3-D parameters and stores them one by one. What each is called, and which
rows of a slice it is, is asked of Transformers' own conversions, which know it for every architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel

from hfcompress.errors import ModelError

NO_EXPERTS = (_ConvNd, ParametrizationList)  # their parameters have three dimensions for other reasons


class ExpertMatrix(NamedTuple):
    """A matrix as dense checkpoints hold it: rows ``start`` to ``stop`` of one slice of a 3-D parameter.

    expert, leaf: it is called ``{expert}.{leaf}`` inside its module, such as ``3.gate_proj``.
    """

    expert: int
    leaf: str
    parameter: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Return the name inside the module of the experts."""
        return f"{self.expert}.{self.leaf}"

    def of(self, fused: nn.Module) -> Tensor:
        """Return the matrix (out, in) as a view of the parameter that holds it."""
        return self.within(fused.get_parameter(self.parameter).detach())

    def within(self, parameter: Tensor) -> Tensor:
        """Return the matrix (out, in) as a view of the parameter's values (experts, rows, in)."""
        return parameter[self.expert, self.start : self.stop]


def fused_experts(model: nn.Module) -> dict[str, list[str]]:
    """Return the modules in layers whose parameters hold one matrix per expert, with these parameters' names."""
    found = {}
    for name, module in model.named_modules():
        fused = [leaf for leaf, one in module._parameters.items() if one is not None and _holds_matrices(one)]
        if fused and any(part.isdecimal() for part in name.split(".")) and not isinstance(module, NO_EXPERTS):
            found[name] = fused
    return found


def _holds_matrices(parameter: Tensor) -> bool:
    return parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point()


def stored_matrices(model: PreTrainedModel, names: Sequence[str]) -> dict[str, list[ExpertMatrix]]:
    """Return the matrices of some modules of ``fused_experts`` as dense checkpoints hold them.

    Raises ModelError, with the reason, for experts that cannot be taken apart into linear layers without a bias.
    """
    conversions = list(_conversions(model))
    found = {}
    for name in names:
        fused = model.get_submodule(name)
        reason = _unlike(fused)
        matrices = (
            [] if reason else [one for leaf in fused._parameters for one in _parts(model, name, leaf, conversions)]
        )
        if not reason and not _whole(fused, matrices):
            reason = "Transformers does not store its experts as one matrix after another"
        if reason:
            raise ModelError(
                f"{name} ({type(fused).__name__}) holds its experts as slices of one tensor "
                f"({', '.join(fused._parameters)}) that cannot be packed: {reason}. BitsAndBytes(exclude="
                f"('*.{name.rpartition('.')[2]}',)) quantizes the layers around them."
            )
        found[name] = matrices
    return found


def _unlike(fused: Any) -> str:
    """Return what keeps experts from being linear layers with a gate between them; empty where nothing does."""
    if not hasattr(fused, "has_gate"):
        return "its class is none of Transformers' interface for experts"
    expected = {"gate_up_proj" if fused.has_gate else "up_proj", "down_proj"}
    for attribute, reason in (
        ("has_bias", "its experts have biases"),
        ("is_transposed", "its slices are stored inputs first"),
        ("has_post_expert_norm", "a norm comes after each expert"),
    ):
        if getattr(fused, attribute, False):
            return reason
    if fused._parameters.keys() != expected or fused._buffers:
        return f"it has other tensors than {' and '.join(sorted(expected))}"
    return ""


def _conversions(model: PreTrainedModel) -> Iterator[Any]:
    """Yield what takes fused experts apart while Transformers saves, where packed ones can be read in the same way.

    Transformers unpacks the experts of a checkpoint before it merges and concatenates them, and before nothing else.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    for one in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(one, WeightConverter) and all(
            isinstance(step, (MergeModulelist, Concatenate)) for step in one.operations
        ):
            yield one.reverse_transform()


def _parts(model: PreTrainedModel, name: str, leaf: str, conversions: Sequence[Any]) -> Iterator[ExpertMatrix]:
    """Have numbered rows taken apart in the place of a parameter, and yield where they come out."""
    parameter = model.get_submodule(name).get_parameter(leaf)
    experts, rows, _ = parameter.shape
    numbered = torch.arange(experts * rows, device="cpu").view(experts, rows, 1)
    for conversion in conversions:
        renamed, pattern = conversion.rename_source_key(f"{name}.{leaf}")
        if pattern is None:
            continue
        work = copy.deepcopy(conversion)
        work.add_tensor(renamed, f"{name}.{leaf}", pattern, numbered)
        for key, given in work.convert(renamed, model=model, config=model.config).items():
            numbers = (given[0] if isinstance(given, list) else given).flatten()
            inside = key.removeprefix(f"{name}.").split(".")
            expert, start = divmod(int(numbers[0]), rows)
            consecutive = bool((numbers.diff() == 1).all())
            if consecutive and len(inside) == 3 and inside[::2] == [str(expert), "weight"]:
                yield ExpertMatrix(expert, inside[1], leaf, start, start + len(numbers))
        return


def _whole(fused: nn.Module, matrices: Sequence[ExpertMatrix]) -> bool:
    """Tell whether the matrices are all rows of all slices, in their order."""
    ends: dict[tuple[str, int], int] = {}
    for one in matrices:
        if ends.setdefault((one.parameter, one.expert), 0) != one.start:
            return False
        ends[one.parameter, one.expert] = one.stop
    return all(
        ends.get((leaf, expert)) == parameter.shape[1]
        for leaf, parameter in fused.named_parameters(recurse=False)
        for expert in range(parameter.shape[0])
    )
