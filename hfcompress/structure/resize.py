"""Cut features out of linear layers and embeddings, in a way that can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError
from hfcompress.packed.weight import PackedWeight

_MISSING = object()


class Edits:
    """A list of changes, each with the way back."""

    def __init__(self) -> None:
        self._ways_back: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, a parameter or a config value."""
        before = getattr(owner, name, _MISSING)
        setattr(owner, name, value)

        def back() -> None:
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._ways_back.append(back)

    def set_data(self, module: nn.Module, name: str, data: Tensor) -> None:
        """Put a new parameter in the place of an old one, frozen if that was."""
        old: nn.Parameter = getattr(module, name)
        self.set(module, name, nn.Parameter(data.clone(), requires_grad=old.requires_grad))

    def done(self, back: Callable[[], None]) -> None:
        """Note the way back of a change that was made elsewhere."""
        self._ways_back.append(back)

    def undo(self) -> None:
        """Take every change back, the last one first."""
        while self._ways_back:
            self._ways_back.pop()()


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer or an embedding."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def output_dim(module: nn.Module) -> int:
    """Return the dimension of a linear or embedding weight that counts output features."""
    return 1 if isinstance(module, (Conv1D, nn.Embedding)) else 0


def input_dim(module: nn.Module) -> int:
    """Return the dimension of a linear weight that counts input features."""
    return 0 if isinstance(module, Conv1D) else 1


def _size_name(module: nn.Module, outputs: bool) -> str:
    if isinstance(module, Conv1D):
        return "nf" if outputs else "nx"
    if isinstance(module, nn.Embedding):
        return "embedding_dim"
    return "out_features" if outputs else "in_features"


def keep_features_(edits: Edits, module: nn.Module, kept: Tensor, outputs: bool) -> None:
    """Keep some output (or input) features of a linear layer or an embedding.  kept: rising indices."""
    weight = weight_of(module)
    dim = output_dim(module) if outputs else input_dim(module)
    kept = kept.to(weight.device)
    edits.set_data(module, "weight", weight.detach().index_select(dim, kept))
    bias = getattr(module, "bias", None)
    if outputs and bias is not None:
        edits.set_data(module, "bias", bias.detach()[kept])
    edits.set(module, _size_name(module, outputs), len(kept))


def refuse_uncuttable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ModelError when one of these modules has a quantized weight, or one that is another module's too."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    for name in names:
        module = model.get_submodule(name)
        weight = weight_of(module)
        if isinstance(module, PackedWeight) or not _is_plain(module, weight):
            raise quantized_error(name)
        others = owners[id(weight)] - {name}
        if others:
            raise ModelError(
                f"{name} shares its weight with {sorted(others)[0]}, so it cannot be cut; untie the two first."
            )


def quantized_error(name: str) -> ModelError:
    """Return the error of a module whose weight is quantized where it would have to be cut."""
    return ModelError(f"{name} is quantized, so it cannot be cut; shrink the model before quantizing it.")


def _is_plain(module: nn.Module, weight: Tensor) -> bool:
    """Tell whether a weight holds numbers in the sizes that its module says."""
    sizes = [getattr(module, _size_name(module, True)), weight.shape[1 - output_dim(module)]]
    return weight.is_floating_point() and sorted(weight.shape) == sorted(sizes)


def all_features(module: nn.Module, outputs: bool) -> Tensor:
    """Return a mask, all true, over the output (or input) features of a module."""
    weight = weight_of(module)
    return torch.ones(weight.shape[output_dim(module) if outputs else input_dim(module)], dtype=torch.bool)
