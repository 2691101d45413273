"""Which dimensions of a model's tensors are its vocabulary, and cutting them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.vocabulary.token_ids import nested


@dataclass(frozen=True)
class VocabularyPlan:
    """What has to change: ``dimensions`` of tensors by name, and whole-number ``attributes`` of modules by name."""

    dimensions: dict[str, tuple[int, ...]]
    attributes: dict[tuple[str, str], int]


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of the token embedding.  Raises ModelError when there is none with a weight."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        weight = None
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelError(f"{type(model).__name__} has no token embedding, so it has no vocabulary to prune.")
    return weight.shape[0]


def first_movable_id(model: PreTrainedModel) -> int:
    """Return the lowest token id that may become another id.

    RoBERTa, M2M100 and others count positions from the id of the padding token, which their position embedding keeps
    as ``padding_idx``.  There, that id and those below it must stay what they are.
    """
    counted_from = [
        module.padding_idx
        for name, module in model.named_modules()
        if "position" in name.rpartition(".")[2] and isinstance(getattr(module, "padding_idx", None), int)
    ]
    return max((place + 1 for place in counted_from if isinstance(place, int)), default=0)


def plan_vocabulary(model: PreTrainedModel, smaller: PreTrainedConfig) -> VocabularyPlan:
    """Find the vocabulary's dimensions by building the model's class without weights from its config and ``smaller``.

    What differs between the two is what a reload will expect, so nothing depends on a table of architectures.
    Raises ModelError, naming the tensor, for one that depends on the vocabulary in another way (an adaptive softmax),
    that is as long as the vocabulary but does not follow the config, or that is not what the config describes.
    """
    rows, kept = embedding_rows(model), smaller.get_text_config().vocab_size
    before, after = _skeleton(model, copy.deepcopy(model.config)), _skeleton(model, smaller)
    own, old, new = (dict(_tensors(one)) for one in (model, before, after))
    dimensions: dict[str, tuple[int, ...]] = {}
    for name in sorted(old.keys() | new.keys()):
        if name in old and name in new and old[name].shape == new[name].shape:
            continue
        changed = _changed(old.get(name), new.get(name), rows, kept)
        if not changed:
            raise ModelError(
                f"{name} of {type(model).__name__} depends on the vocabulary in a way that is not known here "
                "(one dimension per token is), so this model's vocabulary cannot be pruned."
            )
        if name not in own or any(dim >= own[name].dim() or own[name].shape[dim] != rows for dim in changed):
            raise ModelError(
                f"{name} of {type(model).__name__} is not as its config describes it (packed or replaced?). Prune "
                "the vocabulary of the plain model, before anything else is done to these weights."
            )
        dimensions[name] = changed
    if not dimensions:
        raise ModelError(f"No weight of {type(model).__name__} follows the vocab_size of its config.")
    _refuse_unexplained(model, own, dimensions, rows)
    return VocabularyPlan(dimensions, dict(_attributes(before, after)))


def _skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return type(model)(config)
    except Exception as error:  # a class can refuse a config in any way; each means that it could not be reloaded
        raise ModelError(
            f"{type(model).__name__} cannot be built from its config with a vocabulary of "
            f"{config.get_text_config().vocab_size} tokens: {error}"
        ) from error


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _changed(old: Tensor | None, new: Tensor | None, rows: int, kept: int) -> tuple[int, ...]:
    """Return the dimensions that went from ``rows`` to ``kept``, none when anything else changed."""
    if old is None or new is None or old.dim() != new.dim():
        return ()
    differing = [dim for dim in range(old.dim()) if old.shape[dim] != new.shape[dim]]
    known = all((old.shape[dim], new.shape[dim]) == (rows, kept) for dim in differing)
    return tuple(differing) if known else ()


def _refuse_unexplained(
    model: PreTrainedModel, own: dict[str, Tensor], dimensions: dict[str, tuple[int, ...]], rows: int
) -> None:
    numbers = [
        value
        for config in nested(model.config)
        for name, value in vars(config).items()
        if "vocab_size" not in name and isinstance(value, int)
    ]
    if rows in numbers:  # a hidden size, say: such tensors are as long as the vocabulary by chance
        return
    for name, tensor in own.items():
        if name not in dimensions and rows in tensor.shape:
            raise ModelError(
                f"{name} of {type(model).__name__} has a dimension of {rows}, the size of the vocabulary, but does "
                "not follow the config's vocab_size, so whether it holds one entry per token is not known."
            )


def _attributes(before: nn.Module, after: nn.Module) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield the whole numbers that modules keep of the config (vocab_size, padding_idx) and that differ."""
    others = dict(after.named_modules(remove_duplicate=False))
    for name, module in before.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            new = getattr(others[name], attribute, value)
            if type(value) is int and type(new) is int and value != new:
                yield (name, attribute), new


def apply_(model: PreTrainedModel, plan: VocabularyPlan, old_ids: Tensor) -> None:
    """Keep the rows ``old_ids`` (kept,) of every planned tensor, in place; tied tensors stay tied."""
    done: set[int] = set()
    own = dict(_tensors(model))
    for name, dims in plan.dimensions.items():
        tensor = own[name]
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        with torch.no_grad():
            rows = tensor.data
            for dim in dims:
                rows = rows.index_select(dim, old_ids.to(rows.device))
        tensor.grad = None
        tensor.data = rows.contiguous()
    for (name, attribute), value in plan.attributes.items():
        module = model.get_submodule(name)
        if isinstance(getattr(module, attribute, None), int):
            setattr(module, attribute, value)
