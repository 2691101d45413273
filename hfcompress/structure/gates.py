"""Gates: one factor per head or neuron on what the next linear layer reads (Michel et al., arXiv 1905.10650)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.packed.weight import PackedWeight
from hfcompress.structure.resize import Edits, input_dim, quantized_error, weight_of
from hfcompress.structure.sites import AttentionSite, FfnSite, Part, units_of


class Gate:
    """Multiplies the input columns of one linear layer by one value per unit; a forward pre-hook.

    values: (units,) float32 leaf on the layer's device, ones at first.  1 leaves a unit as it is, 0 closes it.  After
    a backward pass ``values.grad`` is the derivative of the loss by the gates, whose absolute value at 1 is the
    importance of Michel et al., equation 2.  Gates are no parameters of the model: neither its optimizer nor its
    checkpoints see them.  Set values under ``torch.no_grad()``.
    """

    def __init__(self, module: nn.Module, part: Part) -> None:
        weight = weight_of(module)
        unit_of_column = torch.empty(part.features.numel(), dtype=torch.long)
        unit_of_column[part.features.flatten()] = torch.arange(len(part)).repeat_interleave(part.features.shape[1])
        self.name, self.module = part.name, module
        self.unit_of_column = unit_of_column.to(weight.device)
        self.values = torch.ones(len(part), device=weight.device, requires_grad=True)
        self.attach()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Scale the columns of the layer's input."""
        inputs: Tensor = args[0]
        return (inputs * self.factors().to(inputs.device, inputs.dtype), *args[1:])

    def factors(self) -> Tensor:
        """Return the value of each input column's gate: (in_features,)."""
        return self.values[self.unit_of_column]

    def close_(self, units: Iterable[int] | Tensor) -> None:
        """Set the gates of these units, numbers or a mask, to 0.  Raises ModelError when there are not so many."""
        chosen = units_of(self.name, len(self.values), units)
        with torch.no_grad():
            self.values[torch.tensor(chosen, dtype=torch.long, device=self.values.device)] = 0.0

    def attach(self) -> None:
        """Put the gate on its layer."""
        self._handle = self.module.register_forward_pre_hook(self)

    def remove(self) -> None:
        """Take the gate off its layer, which is then as it was before."""
        self._handle.remove()


@dataclass(frozen=True)
class Gates:
    """The gates on a model, by the name of their site (``AttentionSite.name``, ``FfnSite.name``).

    Usable in a ``with`` statement, which removes them at its end.
    """

    heads: dict[str, Gate] = field(default_factory=dict)
    neurons: dict[str, Gate] = field(default_factory=dict)

    def remove(self) -> None:
        """Take every gate off the model, which is then as it was before."""
        for gate in (*self.heads.values(), *self.neurons.values()):
            gate.remove()

    def __enter__(self) -> Gates:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach_gates(model: nn.Module, attention: Iterable[AttentionSite] = (), ffn: Iterable[FfnSite] = ()) -> Gates:
    """Put an open gate on every query head of the attention sites and every neuron of the feed-forward sites.

    Works with every attention implementation and needs no attention output: a head's gate scales what the output
    projection reads of it.
    """
    return Gates(
        heads={site.name: Gate(model.get_submodule(site.output.name), site.output) for site in attention},
        neurons={site.name: Gate(model.get_submodule(site.down.name), site.down) for site in ffn},
    )


def attached_gates(model: nn.Module) -> list[Gate]:
    """Return every gate that is on the model."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, Gate)]


def fold_gates_(model: nn.Module, edits: Edits) -> None:
    """Multiply each gated layer's weight columns by its gates and take the gates off: the same function, ungated.

    Raises ModelError when one of the layers is packed.
    """
    packed = [gate.name for gate in attached_gates(model) if isinstance(gate.module, PackedWeight)]
    if packed:
        raise quantized_error(packed[0])
    for gate in attached_gates(model):
        weight = weight_of(gate.module)
        factors = gate.factors().detach().to(weight.dtype)
        columns = factors[None, :] if input_dim(gate.module) == 1 else factors[:, None]
        edits.set_data(gate.module, "weight", torch.where(columns == 0, 0, weight.detach() * columns))
        gate.remove()
        edits.done(gate.attach)
