"""What linear layers see while a model trains: sums of squares per input feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.errors import ModelError
from hfcompress.pruning.targets import modules_of
from hfcompress.structure import LINEAR_TYPES, layer_stacks


class InputSquares:
    """Hooks on the modules of some weights; they count only while ``active`` and the module trains."""

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        self.active = False
        self.masks: dict[str, Tensor | None] = {}
        self.sums: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        places = {name: _linears(model, name, weight) for name, weight in weights.items()}
        decoders = _decoder_stacks(model)
        for name, modules in places.items():
            inside_decoder = any(name.startswith(stack + ".") for stack in decoders)
            mask = "decoder_attention_mask" if inside_decoder else "attention_mask"
            width = weights[name].shape[0 if isinstance(modules[0], LINEAR_TYPES[1]) else 1]
            self.sums[name] = torch.zeros(width + 1, dtype=torch.float32, device=weights[name].device)
            hook = self._hook(name, mask)
            self.handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
        self.handles.append(model.register_forward_pre_hook(self._note_masks, with_kwargs=True))

    def _note_masks(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.masks = {name: kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask")}

    def _hook(self, name: str, mask_name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            if self.active and module.training:
                with torch.no_grad():
                    inputs = args[0] if args else kwargs["input"]
                    self.sums[name] += sum_of_squares(inputs.detach(), self.masks.get(mask_name))

        return see

    def take(self) -> dict[str, Tensor]:
        """Return the sums of all processes together since the last call, (inputs + 1,): the tokens come last."""
        taken = {name: one.clone() for name, one in self.sums.items()}
        for one in self.sums.values():
            one.zero_()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for one in taken.values():
                torch.distributed.all_reduce(one)
        return taken

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def sum_of_squares(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum of squares of each feature and the number of tokens, (features + 1,) float32.

    inputs: (..., features).  mask: (batch, tokens), nonzero for tokens that count; one of another shape than the
    inputs' is passed over, and then all tokens count.
    """
    rows = inputs.flatten(0, -2).float()
    if isinstance(mask, Tensor) and mask.dim() == 2 and inputs.shape[:-1] in (mask.shape, (mask.numel(),)):
        weights = (mask.flatten() != 0).to(rows.dtype)
    else:
        weights = rows.new_ones(len(rows))
    # A masked row may hold anything; what is not a number would outlive a factor of zero.
    squares = rows.masked_fill(weights[:, None] == 0, 0).square()
    return torch.cat([squares.sum(0), weights.sum().view(1)])


def _linears(model: nn.Module, name: str, weight: nn.Parameter) -> list[nn.Module]:
    modules: list[nn.Module] = [module for module in modules_of(model, weight) if isinstance(module, LINEAR_TYPES)]
    if not modules:
        raise ModelError(
            f"criterion='activation' weighs inputs of linear layers, and '{name}' is in none. Exclude it, or use "
            "criterion='magnitude'."
        )
    return modules


def _decoder_stacks(model: nn.Module) -> list[str]:
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return []
    return [stack.name for stack in layer_stacks(model)[1:]]
