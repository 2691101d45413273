"""Fill an unevenly pruned model up with zeros to the shapes of its config, which any Transformers loads.

A removed head or neuron comes back as one that gives zero and whose output nobody reads; where it stood among the
others does not matter.  What does matter is how a fused layer orders its outputs (queries, keys and values one after
another, say).  No table of architectures says so: the orders are tried, and the one that gives the same logits is it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from hfcompress.errors import CheckpointError, ModelError
from hfcompress.packed import packed_layers
from hfcompress.packed.bytes import byte_layers
from hfcompress.structure.inputs import dummy_inputs
from hfcompress.structure.running import float_outputs
from hfcompress.structure.shapes import uneven_shapes

# One after another: gate and up, or queries, keys and values.  Grouped: query heads that share a key/value head.
ORDERS = {"plain": 1, "two parts": 2, "three parts": 3, "grouped": 1}
MOST_UNUSUAL = 2  # kinds of layers with an order other than plain, in one architecture
TOLERANCE = 1e-5  # of the largest value of an output, in float32
Kind = tuple[str, str, str]


class _Axis(NamedTuple):
    """One axis of a parameter that has to grow from old to new entries.

    kind: what shares an order, such as all outputs of all ``c_attn``.  groups: how many entries one group of query
    heads has and will have; 0 where there are no groups.
    """

    parameter: str
    axis: int
    old: int
    new: int
    kind: Kind
    groups: tuple[int, int]

    def allows(self, order: str) -> bool:
        if order == "grouped":
            return 0 not in self.groups and self.old % self.groups[0] == 0 == self.new % self.groups[1]
        return self.old % ORDERS[order] == 0 == self.new % ORDERS[order]

    def fill_up(self, tensor: Tensor, order: str) -> Tensor:
        """Return the tensor with zeros in the places of what was removed."""
        if self.old == 0:  # an earlier shrink took them all, of every part
            return self._pad(tensor, self.new)
        parts = ORDERS[order]
        chunks = tensor.split(max(1, self.old // parts), dim=self.axis)
        if order == "grouped":
            groups = [self._pad(group, self.groups[1]) for group in tensor.split(self.groups[0], dim=self.axis)]
            chunks = (torch.cat(groups, dim=self.axis),)
        return torch.cat([self._pad(chunk, self.new // parts) for chunk in chunks], dim=self.axis)

    def _pad(self, tensor: Tensor, size: int) -> Tensor:
        shape = list(tensor.shape)
        shape[self.axis] = size - shape[self.axis]
        return torch.cat([tensor, tensor.new_zeros(shape)], dim=self.axis)


def to_dense(model: PreTrainedModel, inputs: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """Return a copy of an unevenly pruned model in the dense shapes of its config, which computes the same logits.

    inputs: what the two are compared on, a random row unless given.  Raises ModelError for packed models and where
    no order of filling up gives the same outputs.  The model itself is left as it is.
    """
    if packed_layers(model) or byte_layers(model):
        raise ModelError("Codes cannot be filled up with zeros; make the model dense first, then quantize it.")
    dense = _fresh(model)
    if not uneven_shapes(model):
        dense.load_state_dict(model.state_dict())
        return dense
    axes = _growing_axes(model, dense)
    twin = _in_float32(model)
    inputs = inputs if inputs is not None else dummy_inputs(twin)
    expected = _answers(twin, inputs)
    for orders in _candidates(axes):
        dense.load_state_dict(_filled_up(model, axes, orders))
        if all(_same(*pair) for pair in zip(_answers(_in_float32(dense), inputs), expected, strict=True)):
            return dense
    kinds = ", ".join(sorted({".".join(one.kind) for one in axes}))
    raise ModelError(
        f"{type(model).__name__} cannot be filled up with zeros: no order of {kinds} gives the same outputs. "
        "Save it as it is; it loads after `import hfcompress`."
    )


def _fresh(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(model)(config)
    # What a class makes of its config alone lacks what was set for generation since, such as several end tokens.
    if isinstance(getattr(model, "generation_config", None), GenerationConfig):
        fresh.generation_config = copy.deepcopy(model.generation_config)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, parameter in fresh.named_parameters():  # not .to(): rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    return fresh.train(model.training)


def _answers(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return float_outputs(model, inputs)


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    twin = copy.deepcopy(model).cpu()
    for parameter in twin.parameters():
        parameter.data = parameter.data.float()
    return twin


def _growing_axes(model: PreTrainedModel, dense: PreTrainedModel) -> list[_Axis]:
    found = []
    own = dict(model.named_parameters())
    for name, target in dense.named_parameters():
        if name not in own or own[name].ndim != target.ndim:
            raise CheckpointError(f"'{name}' is not the same kind of parameter in the model and in its dense twin.")
        for axis, (old, new) in enumerate(zip(own[name].shape, target.shape)):
            if old > new:
                raise ModelError(f"'{name}' has {old} entries where its config says {new}; zeros can only be added.")
            if old < new:
                module, _, leaf = name.rpartition(".")
                kind = _kind(model, module, leaf, axis)
                found.append(_Axis(name, axis, old, new, kind, _groups(model, dense, module)))
    return found


def _kind(model: nn.Module, module: str, leaf: str, axis: int) -> Kind:
    """Return the class around a layer, the layer's name, and whether the axis is its outputs or its inputs."""
    parent, _, name = module.rpartition(".")
    is_output = leaf == "bias" or axis == int(hasattr(model.get_submodule(module), "nf"))
    return type(model.get_submodule(parent)).__name__, name, "outputs" if is_output else "inputs"


def _groups(model: nn.Module, dense: nn.Module, module: str) -> tuple[int, int]:
    parents = [one.get_submodule(module.rpartition(".")[0]) for one in (model, dense)]
    own, new = (getattr(p, "num_key_value_groups", 0) * getattr(p, "head_dim", 0) for p in parents)
    return own, new


def _candidates(axes: list[_Axis]) -> Iterator[dict[Kind, str]]:
    """Return an order for each kind: plain ones first, then others for one kind, then for two."""
    kinds = {one.kind: [axis for axis in axes if axis.kind == one.kind] for one in axes}
    unusual = {
        kind: [order for order in ORDERS if order != "plain" and all(axis.allows(order) for axis in members)]
        for kind, members in kinds.items()
    }
    for changed in range(MOST_UNUSUAL + 1):
        for chosen in combinations(unusual, changed):
            for orders in product(*(unusual[kind] for kind in chosen)):
                yield dict.fromkeys(kinds, "plain") | dict(zip(chosen, orders))


def _filled_up(model: PreTrainedModel, axes: list[_Axis], orders: Mapping[Kind, str]) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for one in axes:
        state[one.parameter] = one.fill_up(state[one.parameter], orders[one.kind])
    return state
