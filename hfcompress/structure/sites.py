"""What the probe finds: where heads and neurons live, as index sets of linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hfcompress.errors import ModelError
from hfcompress.structure.influence import NONE, SEVERAL
from hfcompress.structure.probe import LinearCall
from hfcompress.structure.stack import layer_stacks


@dataclass(frozen=True)
class Part:
    """The features of one module that belong to each unit (head, key/value head or neuron).

    name: full name of a linear layer or an embedding.  features: (units, features per unit) integers, rising in each
    row: output features of a producer (rows of a linear weight), input features of a consumer (columns).
    """

    name: str
    features: Tensor

    def __len__(self) -> int:
        return len(self.features)


def units_of(name: str, count: int, units: Iterable[int] | Tensor) -> list[int]:
    """Return the numbers of units in rising order.

    units: numbers, or a mask of all, (count,) bool, whatever holds them.  Raises ModelError when what is called
    ``name`` has not all.
    """
    given = units.flatten().tolist() if isinstance(units, (Tensor, np.ndarray)) else list(units)
    if given and all(isinstance(unit, bool) for unit in given):
        if len(given) != count:
            raise ModelError(f"{name} has {count} units, and the mask says something of {len(given)}.")
        return [unit for unit, chosen in enumerate(given) if chosen]
    chosen = sorted(given)
    beyond = [unit for unit in chosen if not 0 <= unit < count]
    if beyond:
        raise ModelError(f"{name} has {count} units, numbered 0 to {count - 1}, no {', '.join(map(str, beyond))}.")
    return chosen


@dataclass(frozen=True)
class AttentionSite:
    """One attention: its heads, and the linear layers they are cut from.

    name: the attention module.  layer: (name of the layer stack, index in it).  query and extra have one unit per
    query head, key and value one per key/value head; a fused projection is named by several parts.  extra: further
    producers with one unit per head (keys and queries of positions in DeBERTa, the position bias table in T5).
    output: the linear layer that reads the heads, with its input columns per head.  cached: generation keeps its keys
    and values.  same_heads_as: an attention that must keep the same heads, because both add one position bias.
    config_counts: head counts that the forward reads from the model's config instead of from the module.
    """

    name: str
    layer: tuple[str, int] | None
    query: Part
    key: Part
    value: Part
    output: Part
    extra: tuple[Part, ...] = ()
    cached: bool = False
    same_heads_as: str | None = None
    config_counts: tuple[str, ...] = ()

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.query)

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads; query head ``i`` reads number ``i // group_size``."""
        return len(self.key)

    @property
    def head_dim(self) -> int:
        """Features per query and key head; 0 where no head is left."""
        return self.query.features.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.heads // max(1, self.key_value_heads)

    @property
    def layout(self) -> str:
        """How queries, keys and values are projected: separate, concatenated or interleaved (per head)."""
        if len({self.query.name, self.key.name, self.value.name}) == 3:
            return "separate"
        fused = self.query if self.query.name in (self.key.name, self.value.name) else self.key
        rows = fused.features.flatten()
        in_one_block = torch.equal(rows, rows[0] + torch.arange(len(rows)))
        return "concatenated" if in_one_block else "interleaved"


@dataclass(frozen=True)
class FfnSite:
    """One feed-forward block: neuron ``j`` is a row of each producer and a column of ``down``, elementwise between.

    name: the linear layer ``down``.  ups: the producers with their rows per neuron (two in one for a fused gate).
    """

    name: str
    layer: tuple[str, int]
    ups: tuple[Part, ...]
    down: Part

    @property
    def width(self) -> int:
        """Number of neurons."""
        return len(self.down)


def part_of(name: str, unit_of_feature: Tensor, units: int, what: str) -> Part:
    """Gather the features of each unit; refuse features that act on several units, and units of unequal size."""
    if bool((unit_of_feature == SEVERAL).any()):
        raise ModelError(f"{name} cannot be cut by {what}: one of its features acts on several of them.")
    if units == 0:  # an earlier shrink took them all
        return Part(name, torch.empty((0, 0), dtype=torch.long))
    counts = torch.bincount(unit_of_feature[unit_of_feature != NONE], minlength=units)
    if len(counts) != units or int(counts.min()) != int(counts.max()) or int(counts.min()) == 0:
        raise ModelError(f"{name} cannot be cut by {what}: they have {sorted(set(counts.tolist()))} features each.")
    order = torch.argsort(torch.where(unit_of_feature == NONE, units, unit_of_feature), stable=True)
    return Part(name, order[: int(counts.sum())].reshape(units, -1))


def only_source(calls: Iterable[LinearCall], what: str) -> LinearCall:
    """Return the one module that a tensor comes from; refuse when there are none or several."""
    found = list(calls)
    if len({call.module for call in found}) != 1:
        names = ", ".join(call.name for call in found) or "no linear layer"
        raise ModelError(f"{what} come from {names}; one linear layer is needed to cut heads from.")
    return found[0]


def layer_of(model: nn.Module, name: str) -> tuple[str, int] | None:
    """Return the layer stack and the index in it that a module's name lies under."""
    for stack in layer_stacks(model):
        if name.startswith(stack.name + "."):
            return stack.name, int(name.removeprefix(stack.name + ".").split(".")[0])
    return None
