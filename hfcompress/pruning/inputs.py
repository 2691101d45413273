"""What linear layers see while a model trains: sums of a statistic of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.pruning.targets import modules_of
from hfcompress.structure import LINEAR_TYPES, layer_stacks
from hfcompress.structure.inputs import dummy_inputs
from hfcompress.structure.modes import eval_mode

Statistic = Callable[[str, Tensor, Tensor | None, Tensor | None], Tensor]
BATCH = ("attention_mask", "decoder_attention_mask", "labels")


@runtime_checkable
class Watch(Protocol):
    """Sums evidence for some weights, by their names, in the forwards of training steps while ``active``."""

    active: bool

    def take(self) -> dict[str, Tensor]:
        """Return the sums of all processes together since the last call."""
        ...

    def remove(self) -> None:
        """Take the hooks off."""
        ...


class InputSums:
    """Hooks on the modules of some weights; they count only while ``active`` and the module trains.

    statistic: from a weight's name, its module's inputs (..., features), their padding mask and the batch's labels,
    each None where there is none, to the tensor that is summed; of no inputs, (0, features), it returns zeros.
    check: is shown the labels of the first training batch, also where that is not counted, and may raise.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        statistic: Statistic,
        check: Callable[[Tensor | None], None] | None = None,
    ) -> None:
        self.active = False
        self.check = check
        self.batch: dict[str, Tensor | None] = {}
        self.sums: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        self.statistic = statistic
        places = {name: _linears(model, name, weight) for name, weight in weights.items()}
        masks = mask_names(model, weights) | dict.fromkeys(_readers_of_encoder(model, places), "attention_mask")
        for name, modules in places.items():
            width = weights[name].shape[0 if isinstance(modules[0], LINEAR_TYPES[1]) else 1]
            none = torch.zeros(0, width, device=weights[name].device)
            self.sums[name] = statistic(name, none, None, None)
            hook = self._hook(name, masks[name])
            self.handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
        self.handles.append(model.register_forward_pre_hook(self._note_batch, with_kwargs=True))

    def _note_batch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.batch = {name: kwargs.get(name) for name in BATCH}
        if self.check is not None and module.training:
            self.check(self.batch["labels"])
            self.check = None

    def _hook(self, name: str, mask_name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            if self.active and module.training:
                with torch.no_grad():
                    inputs = args[0] if args else kwargs["input"]
                    mask, labels = self.batch.get(mask_name), self.batch.get("labels")
                    self.sums[name] += self.statistic(name, inputs.detach(), mask, labels)

        return see

    def take(self) -> dict[str, Tensor]:
        """Return the sums of all processes together since the last call."""
        return take_sums(self.sums)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def take_sums(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return these sums over all processes, and set them to zero here."""
    taken = {name: one.clone() for name, one in sums.items()}
    for one in sums.values():
        one.zero_()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for one in taken.values():
            torch.distributed.all_reduce(one)
    return taken


def mask_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return which of the model's arguments masks the padding that each of these modules or weights sees."""
    stacks = layer_stacks(model)[1:] if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else []
    inside = tuple(f"{stack.name}." for stack in stacks)
    return {name: "decoder_attention_mask" if name.startswith(inside) else "attention_mask" for name in names}


def _readers_of_encoder(model: nn.Module, places: Mapping[str, Sequence[nn.Module]]) -> set[str]:
    """Return which weights read an encoder's states, as keys and values of cross-attention do.

    places: the modules of each weight.  The model is run once on inputs made up for it; where it has none, no weight.
    """
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        return set()
    context: set[int] = set()
    readers: set[str] = set()

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = list(args if "hidden_states" in kwargs else args[1:])
        given += [value for name, value in kwargs.items() if name != "hidden_states"]
        context.clear()
        context.update(one.data_ptr() for one in given if isinstance(one, Tensor))

    def read(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            if (args[0] if args else kwargs["input"]).data_ptr() in context:
                readers.add(name)

        return see

    layers = [layer for stack in layer_stacks(model)[1:] for layer in stack.layers]
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    for name, modules in places.items():
        handles += [module.register_forward_pre_hook(read(name), with_kwargs=True) for module in modules]
    try:
        with torch.no_grad(), eval_mode(model):
            model(**dummy_inputs(model))
    except ModelError:  # no inputs are known for this kind of model
        return set()
    finally:
        for handle in handles:
            handle.remove()
    return readers


def counted(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return which rows of the inputs, (rows,) bool, are no padding.

    inputs: (..., features).  mask: (batch, tokens), nonzero for tokens that count; one of another shape than the
    inputs' is passed over, and then all tokens count.
    """
    shape = inputs.shape[:-1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and shape in (mask.shape, (mask.numel(),)):
        return mask.flatten() != 0
    return torch.ones(shape.numel(), dtype=torch.bool, device=inputs.device)


def sum_of_squares(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum of squares of each feature and the number of tokens, (features + 1,) float32.

    inputs: (..., features).  mask: see ``counted``.
    """
    rows, weights = inputs.flatten(0, -2).float(), counted(inputs, mask)
    # A masked row may hold anything; what is not a number would outlive a factor of zero.
    squares = rows.masked_fill(~weights[:, None], 0).square()
    return torch.cat([squares.sum(0), weights.sum(dtype=rows.dtype).view(1)])


def _linears(model: nn.Module, name: str, weight: nn.Parameter) -> list[nn.Module]:
    modules: list[nn.Module] = [module for module in modules_of(model, weight) if isinstance(module, LINEAR_TYPES)]
    if not modules:
        raise ModelError(
            f"criterion='activation' weighs inputs of linear layers, and '{name}' is in none. Exclude it, or use "
            "criterion='magnitude'."
        )
    return modules
