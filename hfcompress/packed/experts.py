"""The experts of a layer as linear layers of their own, which may be packed like any other."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SplitExperts(nn.Module):
    """Experts with a linear layer per matrix, dense or packed; only those run that tokens are routed to.

    It takes the place of a module of Transformers that holds all experts as slices of 3-D parameters, which is its
    plain twin. The children have the names of dense checkpoints, such as ``3.gate_proj``, so with packed layers in it
    the state dict is what stock Transformers reads.  on_disk: answers while the layers' weights are not in memory.
    fused: the module that is replaced, without buffers; its activation and gate are used on.  linears: by name.
    first: the last parts of the names of the layers that see the tokens, in the order in which their outputs stand
    side by side; last: of the one that sees what the gate leaves of them.
    """

    on_disk: nn.Module | None

    def __init__(self, fused: nn.Module, linears: Mapping[str, nn.Module], first: Sequence[str], last: str) -> None:
        super().__init__()
        self.first, self.last = tuple(first), last
        self.shapes = {name: tuple(one.shape) for name, one in fused._parameters.items() if one is not None}
        self.count = next(iter(self.shapes.values()))[0]
        for index in range(self.count):
            parts = {leaf: linears[f"{index}.{leaf}"] for leaf in (*self.first, last)}
            self.add_module(str(index), nn.ModuleDict(parts))
        between: Any = copy.copy(fused)
        between._parameters = {}
        # Not among the children: the one holds no weights, the other those of layers that are not brought in yet.
        self.__dict__["between"], self.__dict__["on_disk"] = between, None
        self.train(fused.training)

    def run(self, index: int, tokens: Tensor) -> Tensor:
        """Return what one expert makes of tokens (n, hidden), not yet weighted: (n, hidden)."""
        expert: Any = self._modules[str(index)]
        between: Any = self.between
        outputs = [expert[leaf](tokens) for leaf in self.first]
        states = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        gated = between._apply_gate(states) if between.has_gate else between.act_fn(states)
        result: Tensor = expert[self.last](gated)
        return result

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add up what each token's experts make of it.

        hidden_states: (tokens, hidden).  top_k_index, top_k_weights: (tokens, k); an index beyond the experts is none.
        Returns (tokens, hidden).
        """
        if self.on_disk is not None and self.on_disk._parameters:
            values: Tensor = self.on_disk(hidden_states, top_k_index, top_k_weights)
            return values
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index < self.count:
                tokens, places = torch.where(top_k_index == index)
                values = self.run(index, hidden_states[tokens]) * top_k_weights[tokens, places, None]
                output.index_add_(0, tokens, values.to(output.dtype))
        return output

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"experts={self.count}"


def split_experts(model: nn.Module) -> dict[str, SplitExperts]:
    """Return the modules of a model whose experts are linear layers of their own, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}


def expert_linears(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the linear layers, dense or packed, of each module of ``split_experts``."""
    return {
        name: [f"{name}.{index}.{leaf}".lstrip(".") for index in range(one.count) for leaf in (*one.first, one.last)]
        for name, one in split_experts(model).items()
    }


def with_fused_experts(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors by name, those of experts as the 3-D parameters that they came from."""
    hidden = {f"{linear}.weight" for linears in expert_linears(model).values() for linear in linears}
    fused = {
        f"{name}.{leaf}": shape for name, one in split_experts(model).items() for leaf, shape in one.shapes.items()
    }
    return {**{name: shape for name, shape in shapes.items() if name not in hidden}, **fused}


def routers(model: nn.Module) -> list[str]:
    """Return the layers that decide over experts, which always stay dense: the router, the gate of a shared expert.

    Beside the experts stands a module with one matrix, which has at most as many rows as there are experts.
    """
    found = []
    for name, experts in split_experts(model).items():
        parent = name.rpartition(".")[0]
        for leaf, beside in model.get_submodule(parent).named_children():
            matrices = [(inner, one) for inner, one in beside.named_parameters() if one.dim() == 2]
            if beside is not experts and len(matrices) == 1 and len(matrices[0][1]) <= experts.count:
                found.append(f"{parent}.{leaf}.{matrices[0][0]}".lstrip(".").rpartition(".")[0])
    return found
