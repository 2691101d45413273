"""What the example scripts of Transformers call options of the data, which a recipe takes under those names too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hfcompress.recipe.faults import Fault, Path, place

# From a name in the data section to the option that it is another name of.
ALIASES: dict[str, Path] = {
    "dataset_name": ("data", "id"),
    "dataset_config_name": ("data", "name"),
    "train_file": ("data", "files", "train"),
    "validation_file": ("data", "files", "validation"),
    "test_file": ("data", "files", "test"),
    "train_dir": ("data", "files", "train"),
    "validation_dir": ("data", "files", "validation"),
    "train_val_split": ("data", "held_out_share"),
    "train_split_name": ("data", "splits", "train"),
    "validation_split_name": ("data", "splits", "held_out"),
    "eval_split_name": ("data", "splits", "held_out"),
    "text_column_name": ("data", "text_column"),
    "label_column_name": ("data", "label_column"),
    "max_seq_length": ("data", "max_length"),
    "max_train_samples": ("data", "max_train_rows"),
    "max_eval_samples": ("evaluate", "max_rows"),
    "num_beams": ("evaluate", "num_beams"),
    "eval_metrics": ("evaluate", "metrics"),
}


@dataclass(frozen=True)
class Converted:
    """A name whose value is written another way than the option that it is another name of.

    value: returns the option's value, None for none.  Raises ValueError for what is said otherwise here.
    """

    target: Path
    schema: Mapping[str, Any]
    value: Callable[[Any], Any]


def _one_column(value: Any) -> Any:
    names = value.split(",") if isinstance(value, str) else value
    if isinstance(names, list) and len(names) > 1:
        raise ValueError("names several columns: give text_column, and as text_pair_column a second one")
    return names[0] if isinstance(names, list) and names else value


def _share(value: Any) -> Any:
    return value / 100 if isinstance(value, (int, float)) and not isinstance(value, bool) else value


CONVERTED: dict[str, Converted] = {
    "text_column_names": Converted(("data", "text_column"), {"type": ["string", "array"]}, _one_column),
    "validation_split_percentage": Converted(("data", "held_out_share"), {"type": "number"}, _share),
    "do_regression": Converted(
        ("data", "problem_type"), {"type": "boolean"}, lambda value: "regression" if value is True else value or None
    ),
    "metric_name": Converted(
        ("evaluate", "metrics"), {"type": "string"}, lambda value: [value] if isinstance(value, str) else value
    ),
}

_PROCESSOR = "comes with the model's processor"
# What else the example scripts have: the value, if any, that says what a recipe does anyway, and what is instead.
NOT_TAKEN: dict[str, tuple[Any, str]] = {
    "task_name": (None, "name the data: id: nyu-mll/glue, name: sst2, text_column: sentence"),
    "test_split_name": (None, "what is measured on is splits.held_out"),
    "max_predict_samples": (None, "nothing is predicted; evaluate.max_rows cuts what is measured on"),
    "pad_to_max_length": (False, "rows are padded to the longest of their batch, which changes no answer"),
    "preprocessing_num_workers": (None, "rows are encoded in one process, whose tokenizer uses all cores"),
    "overwrite_cache": (False, "rows are encoded anew in every run"),
    "streaming": (False, "rows are read before the first stage, to find their faults; max_train_rows limits them"),
    "keep_linebreaks": (True, "a text file is read as it is"),
    "shuffle_train_dataset": (True, "rows are shuffled by the recipe's seed"),
    "shuffle_seed": (None, "is the recipe's seed"),
    "remove_splits": (None, "splits that splits does not name are not used"),
    "remove_columns": (None, "columns that no option names are not used"),
    "text_column_delimiter": (None, "name one column with text_column, and as text_pair_column a second one"),
    "return_entity_level_metrics": (False, "is not there; evaluate.metrics are entity_f1 and others"),
    "null_score_diff_threshold": (0, "no answer is chosen where it is likelier than any"),
    "n_best_size": (20, "20 starts and ends are looked at"),
    "val_max_answer_length": (None, "is max_target_length"),
    "val_max_target_length": (None, "is max_target_length, for what is generated, too"),
    "ignore_pad_token_for_loss": (True, "padding never counts"),
    "lang": (None, "is not there; a translation column has source_lang and target_lang"),
    "chars_to_ignore": (None, "clean the transcripts before"),
    "do_lower_case": (False, "write the transcripts in lower case before"),
    "preprocessing_only": (False, "hfcompress validate checks a recipe without running it"),
    "task": ("transcribe", "speech is written down in its own language"),
    "unk_token": (None, _PROCESSOR),
    "pad_token": (None, _PROCESSOR),
    "word_delimiter_token": (None, _PROCESSOR),
    "phoneme_language": (None, _PROCESSOR),
    "trust_remote_code": (False, "is model.trust_remote_code; datasets run no code"),
    "token": (None, "a token does not belong in a file; log in with 'hf auth login'"),
    "use_auth_token": (None, "a token does not belong in a file; log in with 'hf auth login'"),
}


def take_aliases_(raw: dict[str, Any], faults: list[Fault]) -> dict[Path, Path]:
    """Move what a recipe gives under other names to its place; return from which place each came, by where it is now.

    An option that is given under two names is a fault, and so is a name that a recipe has no option for.
    """
    data = raw.get("data")
    written: dict[Path, Path] = {}
    if not isinstance(data, dict):
        return written
    for name in [name for name in data if name in NOT_TAKEN]:
        value, (harmless, instead) = data.pop(name), NOT_TAKEN[name]
        if value is not None and (value != harmless or isinstance(value, bool) != isinstance(harmless, bool)):
            faults.append(Fault(("data", name), f"is no option of a recipe: {instead}"))
    for alias, target, value in _named_otherwise_(data, faults):
        given = _put_(raw, target, value)
        if given is None:
            written[target] = ("data", alias)
        else:
            other = place(written.get(given, given))
            faults.append(Fault(("data", alias), f"means {place(target)}, but {other} is given too: take one out"))
    return written


def _named_otherwise_(data: dict[str, Any], faults: list[Fault]) -> Iterator[tuple[str, Path, Any]]:
    """Take out what stands under another name; yield that name, the option's place and its value."""
    for alias, target in ALIASES.items():
        if (value := data.pop(alias, None)) is not None:
            yield alias, target, value
    for alias, other in CONVERTED.items():
        try:
            if (value := other.value(data.pop(alias, None))) is not None:
                yield alias, other.target, value
        except ValueError as error:
            faults.append(Fault(("data", alias), str(error)))


def as_written(fault: Fault, written: Mapping[Path, Path]) -> Fault:
    """Return a fault with its place under the name that the recipe gives it.  written: see ``take_aliases_``."""
    line_of = None if fault.line_of is None else _as_written(fault.line_of, written)
    return dataclasses.replace(fault, path=_as_written(fault.path, written), line_of=line_of)


def _as_written(path: Path, written: Mapping[Path, Path]) -> Path:
    for target, alias in written.items():
        if path[: len(target)] == target:
            return alias + path[len(target) :]
    return path


def _put_(raw: dict[str, Any], path: Path, value: Any) -> Path | None:
    """Set what a path names, unless that or what it would lie in is given otherwise: then return where."""
    within: Any = raw
    for depth, key in enumerate(path[:-1], start=1):
        if within.get(key) is None:
            within[key] = {}
        within = within[key]
        if not isinstance(within, dict):
            return path[:depth]
    if within.get(path[-1]) is not None:
        return path
    within[path[-1]] = value
    return None
