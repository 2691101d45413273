"""Depth pruning: keep some layers of a stack, drop the others, and say so in the config."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import DataError, ModelError
from hfcompress.structure.layer_count import follow_, layer_count_of
from hfcompress.structure.layer_scores import least_angular_block, least_loss_layers
from hfcompress.structure.places import as_reloaded, renumbered
from hfcompress.structure.running import Batch
from hfcompress.structure.shapes import has_shapes_recorded, record_shapes
from hfcompress.structure.stack import LayerStack, layer_stacks


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DropLayers:
    """Keep ``keep`` layers of one of the model's stacks.

    select: ``even`` keeps the first and the last layer and evenly spaced ones between; ``first`` keeps the first
    ``keep`` layers; ``last`` the last ones.  Measured on calibration data: ``angular`` drops the consecutive layers
    between whose input and output the hidden states turn least; ``loss`` those that raise the loss least when skipped.
    layers: the indices to keep, instead of keep and select.  greedy: with ``loss``, measure again after each layer.
    stack: which stack of a model with several, by a part of its name such as ``decoder``.
    """

    keep: Annotated[int, Field(ge=1)] | None = None
    select: Literal["even", "first", "last", "angular", "loss"] = "even"
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    greedy: bool = False
    stack: str | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.layers is None):
            raise ValueError("give either keep (how many layers) or layers (which ones)")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must be distinct indices in rising order")
        if self.layers is not None and self.select != "even":
            raise ValueError("layers says which layers to keep, so select has nothing to choose: leave one out")
        if self.greedy and self.select != "loss":
            raise ValueError("greedy is for select 'loss' alone")

    @property
    def needs_calibration(self) -> bool:
        """Tell whether the choice is measured on batches."""
        return self.select in ("angular", "loss")


def kept_count(total: int, method: DropLayers) -> int:
    """Return how many of a stack's layers stay.  Raises ModelError when the stack has not that many."""
    if method.layers is not None:
        beyond = [index for index in method.layers if index >= total]
        if beyond:
            raise ModelError(f"layers={list(method.layers)}: the stack has layers 0 to {total - 1}, no {beyond}.")
        return len(method.layers)
    assert method.keep is not None
    if method.keep > total:
        raise ModelError(f"keep={method.keep}: the stack has only {total} layers.")
    return method.keep


def layers_to_keep(total: int, method: DropLayers) -> list[int]:
    """Return the indices that stay, in rising order, for a choice that needs no measurement."""
    keep = kept_count(total, method)
    if method.layers is not None:
        return list(method.layers)
    if method.select == "first":
        return list(range(keep))
    if method.select == "last":
        return list(range(total - keep, total))
    if keep == 1:
        return [0]
    return [round(place * (total - 1) / (keep - 1)) for place in range(keep)]


def drop_layers(model: PreTrainedModel, method: DropLayers, calibration: Iterable[Batch] | None = None) -> list[int]:
    """Remove layers from one of the model's stacks in place and return the indices that stayed.

    calibration: batches for the measured choices, as the model takes them; for ``loss`` with labels.
    The config is changed with the modules (layer count, per-layer lists, the numbers by which layers know their place,
    the record of a shrunk model's shapes), so that the model reloads with plain ``from_pretrained``.  Raises, before
    anything changed: ModelError for a model with several stacks of which none is named, whose config cannot say how
    many layers there are, or whose layers compute with their place and so cannot stand elsewhere; DataError when a
    measured choice has no batches, or no labels for ``loss``.
    """
    stack = find_stack(model, method.stack)
    total = len(stack)
    count = kept_count(total, method)
    batches = list(calibration) if calibration is not None and method.needs_calibration else []
    if method.needs_calibration and not batches:
        raise DataError(f"select='{method.select}' is measured: drop_layers needs calibration batches for it.")
    if count == total:
        return list(range(total))
    field = layer_count_of(model, stack, range(count))
    kept = _measured(model, stack, method, batches) if batches else layers_to_keep(total, method)

    shorter_config = copy.deepcopy(model.config)
    field.shorten_(shorter_config, total, kept)
    longer, shorter = as_reloaded(model, model.config), as_reloaded(model, shorter_config)
    _refuse_unlike_places(shorter, stack, kept)
    changes = renumbered(longer, shorter, stack.name, kept)
    modules = dict(model.named_modules())
    for one in changes:
        if hasattr(modules.get(one.module), one.attribute):
            setattr(modules[one.module], one.attribute, one.value)
    field.shorten_(model.config, total, kept)
    parent, _, name = stack.name.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(stack.layers[index] for index in kept))
    follow_(model, longer, shorter)
    if has_shapes_recorded(model.config):  # by module names, of which many are other ones now
        record_shapes(model)
    return kept


def _measured(model: PreTrainedModel, stack: LayerStack, method: DropLayers, batches: list[Batch]) -> list[int]:
    count = len(stack) - kept_count(len(stack), method)
    if method.select == "angular":
        dropped = least_angular_block(model, stack, count, batches)
    else:
        dropped = least_loss_layers(model, stack, count, batches, method.greedy)
    return [index for index in range(len(stack)) if index not in dropped]


def find_stack(model: PreTrainedModel, part: str | None = None) -> LayerStack:
    """Return the model's only stack, or the only one with ``part`` in its dotted name.  Raises ModelError else."""
    stacks = layer_stacks(model)
    found = [stack for stack in stacks if part is None or f".{part}." in f".{stack.name}."]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{stack.name} ({len(stack)})" for stack in stacks)
    asked = "" if part is None else f", {len(found)} of them with '{part}' in its name"
    raise ModelError(
        f"{type(model).__name__} has {len(stacks)} layer stacks ({names}){asked}; drop_layers takes one: give stack, "
        "a part of its name that no other has, such as 'decoder'."
    )


def _refuse_unlike_places(shorter: PreTrainedModel, stack: LayerStack, kept: list[int]) -> None:
    """Compare each kept layer's tensor names with those of the layer that a reload will build in its place."""
    places = shorter.get_submodule(stack.name)
    for new, old in enumerate(kept):
        differing = set(places.get_submodule(str(new)).state_dict()) ^ set(stack.layers[old].state_dict())
        if differing:
            raise ModelError(
                f"In {type(shorter).__name__}, layer {old} cannot become layer {new}: only one of the two has "
                f"{', '.join(sorted(differing))}. Keep layer {new} itself."
            )
