"""What layers are made with because of their place: seen by building the model with all of them and with some."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.structure.layer_count import skeleton

# Rates that act in training alone and rise from layer to layer (stochastic depth): a kept layer keeps its own.
_TRAINING_ALONE = "drop"
_PLAIN = (bool, int, float, str, type(None))
Values = dict[tuple[str, str], Any]


class Renumbered(NamedTuple):
    """A number that changes when layers go: its module, by its name before that, its own name, and its new value."""

    module: str
    attribute: str
    value: int


def as_reloaded(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build, without memory for weights, what ``from_pretrained`` builds from this config after it was saved.

    Raises ModelError when the config cannot be saved and read.
    """
    try:
        return skeleton(model, type(config).from_dict(json.loads(copy.deepcopy(config).to_json_string())))
    except Exception as error:  # each architecture refuses in its own way what it cannot express
        raise ModelError(
            f"The config of {type(model).__name__} cannot say which layers stay, so that a model without the others "
            f"could not be reloaded ({type(error).__name__}: {error})."
        ) from error


def renumbered(longer: nn.Module, shorter: nn.Module, stack: str, kept: Sequence[int]) -> list[Renumbered]:
    """Return the layers' numbers, the counts of layers and what sums them up, where they change when layers go.

    longer, shorter: as their configs build them.  stack: the name of the list of layers.  kept: which of them stay.
    Raises ModelError when anything else changes, since a reloaded model would then compute something else.
    """
    layers, places = (cast(nn.ModuleList, model.get_submodule(stack)) for model in (longer, shorter))
    counts = {len(layers): len(kept)}
    before, after = _around(longer, stack), _around(shorter, stack)
    shared = before.keys() & after.keys()
    # A flag out here, such as whether any layer has a sliding window, sums up the layers that there are.
    flags = {key for key in shared if isinstance(before[key], bool)}
    found = [Renumbered(*key, after[key]) for key in sorted(flags) if before[key] != after[key]]
    rest = shared - flags
    numbers, others = _compared({key: before[key] for key in rest}, {key: after[key] for key in rest}, counts)
    if others:
        raise ModelError(f"{type(longer).__name__} cannot lose layers, since more depends on their number: {others}.")
    found += numbers
    for new, old in enumerate(kept):
        numbers, others = _compared(_values("", layers[old]), _values("", places[new]), {**counts, old: new})
        if others:
            way_out = f" Keep layer {new} itself." if new != old else ""
            raise ModelError(
                f"In {type(longer).__name__}, layer {old} of {len(layers)} cannot become layer {new} of {len(kept)}, "
                f"which a reload makes another one: {others}.{way_out}"
            )
        found += [one._replace(module=f"{stack}.{old}.{one.module}".rstrip(".")) for one in numbers]
    return found


def _compared(before: Values, after: Values, numbers: Mapping[int, int]) -> tuple[list[Renumbered], str]:
    """Return the values that changed as ``numbers`` say, and in words those that changed otherwise."""
    found: list[Renumbered] = []
    others: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, "absent"), after.get(key, "absent")
        if (type(old), old) == (type(new), new):
            continue
        if type(old) is int and type(new) is int and numbers.get(old) == new:
            found.append(Renumbered(*key, new))
        else:
            others.append(f"{'.'.join(filter(None, key))} is {old} and would be {new}")
    return found, ", ".join(others)


def _values(name: str, module: nn.Module) -> Values:
    """Return the kind of each module in a module, and its plain values, by the module's name and theirs."""
    found: Values = {}
    for inner, part in module.named_modules(prefix=name, remove_duplicate=False):
        values = {"": type(part).__name__, **{key: value for key, value in vars(part).items() if key[0] != "_"}}
        found |= {(inner, key): value for key, value in values.items() if isinstance(value, _PLAIN)}
    return {key: value for key, value in found.items() if not any(_TRAINING_ALONE in one for one in key)}


def _around(model: nn.Module, stack: str) -> Values:
    """Return the same of all that lies outside a list of layers."""
    return {key: value for key, value in _values("", model).items() if not f"{key[0]}.".startswith(f"{stack}.")}
