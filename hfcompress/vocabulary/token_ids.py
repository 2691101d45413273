"""The token ids in a model's configs: which there are, and what they become."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError

_ONE_OR_MORE = re.compile(r"(^|_)token_(id|ids|index)$")
_BY_NAME = {"lang_to_id", "task_to_id"}  # whisper: from a language's or task's token to its id
# Lists that only matter for tokens that can be generated; a token that is gone is left out of them.
_FORBIDDEN = {"suppress_tokens", "begin_suppress_tokens"}
_SEQUENCES = {"bad_words_ids", "force_words_ids"}
_PLACED = "forced_decoder_ids"
_BIASED = "sequence_bias"


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig | GenerationConfig]:
    """Return every config object of a model once: its modules' configs, those inside them, and generation's."""
    roots = [config for module in model.modules() if (config := _config_of(module)) is not None]
    found: dict[int, PreTrainedConfig | GenerationConfig] = {}
    for root in roots:
        found.update({id(config): config for config in nested(root)})
    generation = getattr(model, "generation_config", None)
    if isinstance(generation, GenerationConfig):
        found[id(generation)] = generation
    return list(found.values())


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


def nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and the configs inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from nested(value)


def refuse_several_vocabularies(config: PreTrainedConfig, rows: int) -> None:
    """Raise ModelError when a config names a vocabulary of another size than ``rows``: whose ids are whose?"""
    for part in nested(config):
        for name, value in vars(part).items():
            if "vocab_size" in name and not name.startswith("type_") and isinstance(value, int) and value != rows:
                raise ModelError(
                    f"The model has more than one vocabulary: {type(part).__name__}.{name} is {value}, but its token "
                    f"embedding has {rows} rows. prune_vocabulary takes models with one vocabulary."
                )


def named_ids(config: PreTrainedConfig | GenerationConfig) -> set[int]:
    """Return the ids of the tokens that a config needs: padding, start, end, images, forced tokens, languages."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if _ONE_OR_MORE.search(name):
            found.update(_flat(value))
        elif name in _BY_NAME and isinstance(value, Mapping):
            found.update(_flat(list(value.values())))
        elif name == _PLACED and value:
            found.update(_flat([token for _, token in value]))
    return found


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _flat(one)


def remap_(config: PreTrainedConfig | GenerationConfig, new_ids: Mapping[int, int], rows: int) -> None:
    """Replace the vocabulary's size (old: ``rows``) and every token id in a config, in place.

    new_ids: from old id to new, for every kept row.  Ids that never named a row (-1, 50256 of 300) stay.
    """
    for name, value in list(vars(config).items()):
        new = _remapped(name, value, new_ids, rows)
        if new is not value:
            setattr(config, name, new)


def _remapped(name: str, value: Any, new_ids: Mapping[int, int], rows: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if "vocab_size" in name and not name.startswith("type_"):
        return len(new_ids) if value == rows else value
    if _ONE_OR_MORE.search(name):
        return _mapped(value, new_ids)
    if name in _BY_NAME:
        return {key: _mapped(one, new_ids) for key, one in value.items()}
    if name in _FORBIDDEN:
        return [_mapped(one, new_ids) for one in value if _can_occur(one, new_ids, rows)]
    if name in _SEQUENCES:
        return [_mapped(one, new_ids) for one in value if _can_occur(one, new_ids, rows)]
    if name == _PLACED:
        return [[place, _mapped(token, new_ids)] for place, token in value]
    if name == _BIASED:
        pairs = value.items() if isinstance(value, Mapping) else value
        left = [(_mapped(ids, new_ids), bias) for ids, bias in pairs if _can_occur(ids, new_ids, rows)]
        return dict(left) if isinstance(value, Mapping) else [list(pair) for pair in left]
    return value


def _mapped(value: Any, new_ids: Mapping[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, new_ids) for one in value)
    return new_ids.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _can_occur(value: Any, new_ids: Mapping[int, int], rows: int) -> bool:
    return all(one in new_ids or not 0 <= one < rows for one in _flat(value))
