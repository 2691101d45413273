"""How the experts of a packed checkpoint were stored, one by one, though Transformers has merged them since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """How a weight was stored.

    bits: of its codes.  parts: what stands beside them (scale, shape, zero points).  dtype: of codes that are stored
    one by one, as the weight itself; None where they are packed into words.
    """

    bits: int
    parts: dict[str, Tensor]
    dtype: torch.dtype | None = None


def stored_experts(parameter: str, tensors: Mapping[str, Any], bits: int) -> dict[str, Stored]:
    """Return how the matrices that are merged into a parameter were stored, by their names in dense checkpoints.

    parameter: such as ``layers.0.mlp.experts.gate_up_proj``.  tensors: a list with a tensor of each expert by names
    such as ``.experts.*.gate_proj.weight_scale``.  bits: of codes in words.
    """
    home = parameter.rpartition(".")[0]
    found: dict[str, dict[str, Tensor]] = {}
    for pattern, values in tensors.items():
        leaf, _, part = pattern.rpartition("*.")[2].rpartition(".")
        for index, value in enumerate(values):
            found.setdefault(f"{home}.{index}.{leaf}", {})[part] = value
    stored = {}
    for name, parts in found.items():
        codes = parts.pop("weight_packed", None)
        dtype = parts.pop("weight").dtype if codes is None else None
        if "weight_scale" in parts:
            stored[name] = Stored(8 if codes is None else bits, parts, dtype)
    return stored


def with_split_experts(model: Any, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Return a model's state dict, in which experts that were stored one by one are views of what they are now."""
    from hfcompress.structure.experts import fused_experts, stored_matrices

    state: dict[str, Tensor] = dict(model.state_dict())
    homes = {name.rpartition(".")[0].rpartition(".")[0] for name in stored if f"{name}.weight" not in state}
    if not homes:
        return state
    merged = [name for name in fused_experts(model) if name in homes]
    for name, matrices in stored_matrices(model, merged).items():
        for one in matrices:
            state[f"{name}.{one.name}.weight"] = one.of(model.get_submodule(name))
            state.pop(f"{name}.{one.parameter}", None)
    return state
