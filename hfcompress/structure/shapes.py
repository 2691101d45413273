"""How a model's shapes differ from those that its config gives, and giving a fresh model such shapes.

A pruned layer may have fewer heads or neurons than its neighbours, which no config of the library can say. The
difference is derived, never noted down along the way: the model is compared with what its class makes of its config.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.formats import METHOD, VERSION

Shapes = dict[str, dict[str, Any]]
_EARLY_SHAPE = "_get_static_cache_init_shape"
_SIZES = (("out_features", "in_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim"))


def meta_twin(model: PreTrainedModel, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Build the model's class from its config, or another, without memory for weights and without any quantization."""
    config = copy.deepcopy(model.config if config is None else config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def uneven_shapes(model: PreTrainedModel) -> Shapes:
    """Return what the config cannot say: by module name, the attributes that differ from the config's own model.

    A number is a size or a count (``out_features``, ``num_heads``); a list is the shape of a parameter.  Numbers other
    than sizes count only where a tensor in or below the module differs: rotary caches grow while a model runs.
    """
    twins = dict(meta_twin(model).named_modules())
    modules = {name: module for name, module in model.named_modules() if name in twins}
    found = {name: _difference(_sizes(module), _sizes(twins[name])) for name, module in modules.items()}
    around = {parent for name, changed in found.items() if changed for parent in _with_parents(name)}
    for name in around & modules.keys():
        found[name] |= _difference(_numbers(modules[name]), _numbers(twins[name]))
    return {name: dict(sorted(changed.items())) for name, changed in found.items() if name and changed}


def _difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name in other and other[name] != value}


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _size_names(module: nn.Module) -> tuple[str, str] | None:
    """Return the attributes that give the two sizes of a linear or embedding layer's weight, rows first."""
    return next((names for names in _SIZES if all(type(getattr(module, name, None)) is int for name in names)), None)


def _sizes(module: nn.Module) -> dict[str, Any]:
    """Return the sizes of a linear or embedding layer, else the shapes of the module's own tensors.

    A dense weight's shape wins over the attributes, which hand-made slices forget; a packed one has only attributes.
    """
    names = _size_names(module)
    if names is None:
        hidden = module._non_persistent_buffers_set
        tensors = {**module._parameters, **{n: b for n, b in module._buffers.items() if n not in hidden}}
        return {name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 2 and weight.is_floating_point():
        return dict(zip(names, weight.shape))
    return {name: getattr(module, name) for name in names}


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Return the plain numbers and tuples of whole numbers among the module's attributes, its sizes aside."""
    sizes = _size_names(module) or ()
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in sizes:
            continue
        if type(value) in (int, float):
            found[name] = value
        elif isinstance(value, tuple) and value and all(type(part) is int for part in value):
            found[name] = list(value)
    return found


def resize_(model: PreTrainedModel, shapes: Shapes) -> None:
    """Give a model the shapes that ``uneven_shapes`` returned for it, or for its class with or without a head.

    Tensors on the meta device get the new shape, others are cut to it.  Modules that this class lacks, such as the
    head of the class that was saved, are passed over.  Raises ModelError when it has none of them.
    """
    found = {name: module for name in shapes if (module := find_module(model, name)) is not None}
    if shapes and not found:
        raise ModelError(
            f"{type(model).__name__} has none of the {len(shapes)} modules whose shapes this checkpoint gives, such "
            f"as '{next(iter(shapes))}'. It was saved by another architecture, or by another version of Transformers."
        )
    for name, module in found.items():
        _resize_module_(module, shapes[name])
    _make_caches_lazily_(model, bool(found))


def find_module(model: PreTrainedModel, name: str) -> nn.Module | None:
    """Return a module by its name in this class, or in the class with or without a head that saved it."""
    for candidate in names_across_heads(model, name):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def names_across_heads(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Return a module's name as it is, without the base model's prefix, and with it."""
    prefix = f"{model.base_model_prefix}."
    return (name,) if prefix == "." else (name, name.removeprefix(prefix), prefix + name)


def _resize_module_(module: nn.Module, values: Mapping[str, Any]) -> None:
    names = _size_names(module)
    sizes = tuple(values.get(name, getattr(module, name)) for name in names) if names else ()
    for name, value in values.items():
        current = getattr(module, name, None)
        if isinstance(current, Tensor):
            _reshape_(module, name, tuple(value))
        else:
            setattr(module, name, tuple(value) if isinstance(current, tuple) else value)
    if names:
        _reshape_(module, "weight", sizes)
        if getattr(module, "bias", None) is not None:
            _reshape_(module, "bias", (sizes[1] if names == ("nx", "nf") else sizes[0],))


def _reshape_(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    old: Tensor = getattr(module, name)
    if old.shape == shape:
        return
    if old.device.type == "meta":
        new = old.detach().new_empty(shape)
    elif all(size <= old_size for size, old_size in zip(shape, old.shape)):
        new = old.detach()[tuple(slice(size) for size in shape)].clone()
    else:
        raise ModelError(f"A {type(module).__name__}'s {name} of shape {tuple(old.shape)} cannot grow to {shape}.")
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def record_shapes(model: PreTrainedModel) -> Shapes:
    """Derive the model's uneven shapes and write them to its config, or remove the record of a model without any.

    Afterwards plain ``model.save_pretrained`` writes a checkpoint that ``from_pretrained`` loads once hfcompress is
    imported.  A quantization that the config already names is kept, inside the record.
    """
    shapes = uneven_shapes(model)
    recorded = getattr(model.config, "quantization_config", None)
    quantization = _values_of(recorded).get("quantization") if _is_ours(recorded) else recorded
    if shapes:
        record: Any = {"quant_method": METHOD, "version": VERSION, "modules": shapes}
        model.config.quantization_config = record | ({"quantization": quantization} if quantization else {})
    elif quantization:
        model.config.quantization_config = quantization
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _make_caches_lazily_(model, bool(shapes))
    return shapes


def _make_caches_lazily_(model: PreTrainedModel, uneven: bool) -> None:
    """Let ``generate`` make static caches at the first call of an uneven model, by the keys that each layer gives.

    Where it fills the cache in chunks it makes them before that, with the config's one head count for all layers,
    unless the model says that it does not know the count.
    """
    vars(model).pop(_EARLY_SHAPE, None)
    if uneven and model.can_generate():
        setattr(model, _EARLY_SHAPE, _no_shape)


def _no_shape() -> None:
    return None


def has_shapes_recorded(config: PreTrainedConfig) -> bool:
    """Tell whether a config holds a record of uneven shapes."""
    recorded = getattr(config, "quantization_config", None)
    return _is_ours(recorded) and bool(_values_of(recorded).get("modules"))


def _is_ours(recorded: Any) -> bool:
    return _values_of(recorded).get("quant_method") == METHOD


def _values_of(recorded: Any) -> dict[str, Any]:
    return (recorded if isinstance(recorded, dict) or recorded is None else recorded.to_dict()) or {}
