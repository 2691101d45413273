"""Models whose layers stay on disk until it is their turn, as ``from_pretrained(..., device_map=...)`` may leave them.

Transformers leaves such weights on the meta device, and hooks of accelerate read them from the checkpoint's own files
for each call. Here a layer is brought in for good, so that it can be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from hfcompress.errors import ModelError

T = TypeVar("T")


def places_on_disk(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return a ``device_map`` that leaves some modules on disk and puts everything else of the model on the CPU."""
    places = dict.fromkeys(names, "disk")
    above = {name[:end] for name in places for end, letter in enumerate(name) if letter == "."} | {""}
    for parent in above:
        prefix = f"{parent}." if parent else ""
        module = model.get_submodule(parent)
        own = [*module._parameters, *module._buffers, *(name for name, _ in module.named_children())]
        places |= {f"{prefix}{name}": "cpu" for name in own if prefix + name not in above | places.keys()}
    return places


def is_offloaded(module: nn.Module) -> bool:
    """Tell whether weights of a module, or of one inside it, lie on disk and are read for each call."""
    return any(True for part in module.modules() if hasattr(part, "_hf_hook") and _lacks_weights(part))


def _lacks_weights(module: nn.Module) -> bool:
    return any(one.is_meta for one in (*module._parameters.values(), *module._buffers.values()) if one is not None)


def bring_in_(module: nn.Module) -> None:
    """Load the weights of a module and of those inside it that lie on disk, for good; others are left alone.

    Raises ModelError, naming the tensor, when one holds NaN or infinite values.
    """
    for name, part in module.named_modules():
        if hasattr(part, "_hf_hook") and _lacks_weights(part):
            part._hf_hook.pre_forward(part)
            _unhook_(part)
            for leaf, tensor in part.named_parameters(recurse=False):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise ModelError(f"{name}.{leaf} holds NaN or infinite values; the checkpoint is damaged.")


def lent_layers(model: nn.Module, visits: Iterable[T], layer_of: Callable[[T], nn.Module]) -> Iterator[T]:
    """Yield visits of layers that are left as they are; weights that lay on disk go back there after each.

    visits: each brings its layer in, see ``bring_in_``.
    """
    hooks = {part: part._hf_hook for part in model.modules() if hasattr(part, "_hf_hook") and _lacks_weights(part)}
    lent: nn.Module | None = None

    def give_back_() -> None:
        for part in () if lent is None else lent.modules():
            if part in hooks and not _lacks_weights(part):
                add_hook_to_module(part, hooks[part])

    try:
        for visit in visits:
            give_back_()  # not before the next one has come, as the walk runs the layer for its inputs
            lent = layer_of(visit)
            yield visit
    finally:
        give_back_()


def settle_(model: nn.Module) -> None:
    """Load what is left on disk and make the model one like any other, without hooks and device map."""
    bring_in_(model)
    for part in model.modules():
        if hasattr(part, "_hf_hook"):
            _unhook_(part)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map


def _unhook_(module: nn.Module) -> None:
    remove_hook_from_module(module)
    module.__dict__.pop("forward", None)  # the class's own, bound; it stands in the way of nothing but copies


def release_(module: nn.Module) -> None:
    """Give up the weight of a module that has been replaced, but not its bias, which its successor shares."""
    assert isinstance(module.weight, Tensor)
    module._parameters["weight"] = nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's state dict, those on disk one at a time."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        home, _, leaf = name.rpartition(".")
        on_disk = tensor.is_meta and hasattr(modules[home], "_hf_hook")
        yield name, stored_tensor(modules[home], leaf) if on_disk else tensor


def stored_tensor(module: nn.Module, leaf: str) -> Tensor:
    """Return a tensor of a module on disk, read from there."""
    hook: Any = module._hf_hook
    maps = [one.weights_map for one in getattr(hook, "hooks", (hook,)) if getattr(one, "weights_map", None)]
    tensor: Tensor = maps[0][leaf]
    return tensor
