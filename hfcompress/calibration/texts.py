"""Calibration data of every form: batches as they are, and texts of any origin made into rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hfcompress.calibration.checks import calibration_list
from hfcompress.calibration.running import Batch
from hfcompress.errors import DataError, did_you_mean
from hfcompress.progress import meter
from hfcompress.structure.lengths import longest_input

Calibration = str | Path | Iterable[str] | Iterable[Mapping[str, Any]]
ROWS, LENGTH, BATCH_SIZE = 128, 512, 8
_TEXTS_AT_ONCE = 256
_PADDABLE = {"input_ids", "attention_mask", "token_type_ids"}


def pack(
    texts: Iterable[str], tokenizer: Any, length: int, count: int | None = None, special: bool = False
) -> list[list[int]]:
    """Return rows of exactly ``length`` token ids from texts in order, an end token after each text; no padding.

    count: rows that are enough; texts beyond them are not read.  The last, shorter rest is dropped.
    special: each text has the tokenizer's special tokens instead of an end token.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None and not special else []
    waiting, stream = iter(texts), list[int]()
    total = count or (len(texts) if isinstance(texts, Sized) else None)
    with meter(f"packing texts into rows of {length} tokens", total) as shown:
        while (some := list(islice(waiting, _TEXTS_AT_ONCE))) and (count is None or len(stream) < count * length):
            encoded = tokenizer(some, add_special_tokens=special, verbose=False)["input_ids"]
            stream.extend(token for ids in encoded for token in (*ids, *end))
            shown.advance_to(min(count, len(stream) // length) if count else shown.done + len(some))
    rows = [stream[first : first + length] for first in range(0, len(stream) - length + 1, length)]
    return rows[:count]


def calibration_batches(
    data: Any,
    processor: Any = None,
    *,
    rows: int = ROWS,
    length: int = LENGTH,
    packed: bool = True,
    text_column: str = "text",
) -> list[Batch]:
    """Return batches for ``quantize`` and ``prune`` from texts, or from rows of token ids.

    data: texts, a ``datasets.Dataset`` of texts or of token ids, a file (text, jsonl, csv, parquet), or a dataset's
    id, whose ``train`` split is taken.  processor: the tokenizer, for texts.  rows: at most so many.
    length: tokens of a row.  packed: texts fill rows without padding, as language models are trained; otherwise each
    text is a row, cut to ``length`` and padded, and the attention mask says what counts.  Raises DataError when there
    is no text, too little of it, or no such column.
    """
    table = _opened(data, text_column)
    names = getattr(table, "column_names", None)
    if names is not None and text_column not in names and "input_ids" in names:
        return _collated(islice(table.remove_columns(_not_numbers(table)), rows), processor)
    texts = _column(table, text_column) if names is not None else table
    if processor is None:
        raise DataError("Texts need a tokenizer to become calibration data: give processor=tokenizer, or batches.")
    if packed:
        found = pack(_checked(texts), processor, length, rows)
        if not found:
            raise DataError(f"The calibration texts have less than {length} tokens together, which fill no row.")
        return _collated(({"input_ids": one} for one in found), processor)
    cut = [dict(processor(text, truncation=True, max_length=length)) for text in islice(_checked(texts), rows)]
    if not cut:
        raise DataError("calibration holds 0 texts.")
    return _collated(cut, processor)


def batches_for(
    model: PreTrainedModel,
    method: str,
    calibration: Calibration | None,
    processor: Any,
    *,
    rows: int = ROWS,
    length: int = LENGTH,
) -> list[Batch]:
    """Return calibration batches for a model: those given, or those made of texts as ``calibration_batches`` does.

    method: what asks for them, for messages.  processor: the tokenizer for texts; None is the one in the model's
    folder.  rows, length: of texts at most so many rows, of so many tokens or what the model takes.  Raises DataError.
    """
    if isinstance(calibration, Iterator):
        calibration = list(calibration)
    if calibration is None or not _is_raw(calibration):
        return calibration_list(method, calibration)  # type: ignore[arg-type]
    if getattr(model.config, "is_encoder_decoder", False):
        raise DataError(
            f"{type(model).__name__} reads inputs and targets, which texts alone are not: give calibration=batches "
            "with input_ids and labels."
        )
    processor = processor or _tokenizer_of(model)
    limits = (length, longest_input(model.config), getattr(processor, "model_max_length", None))
    length = min(limit for limit in limits if limit)
    return calibration_batches(calibration, processor, rows=rows, length=length, packed=model.can_generate())


def _is_raw(calibration: Any) -> bool:
    """Tell texts, files and datasets from batches."""
    if isinstance(calibration, (str, Path)) or hasattr(calibration, "column_names"):
        return True
    return isinstance(calibration, Sequence) and bool(calibration) and isinstance(calibration[0], str)


def _tokenizer_of(model: PreTrainedModel) -> Any:
    where = model.config.name_or_path
    try:
        if where:
            return AutoTokenizer.from_pretrained(where, revision=getattr(model.config, "_commit_hash", None))
    except (OSError, ValueError):
        pass
    raise DataError(
        f"Texts need a tokenizer to become calibration data, and the model's folder ('{where}') has none: give "
        "processor=tokenizer, or batches."
    )


def _opened(data: Any, text_column: str) -> Any:
    """Open what a name stands for: a file, or the train split of a dataset."""
    if not isinstance(data, (str, Path)):
        return data["train"] if isinstance(data, Mapping) and "train" in data else data
    from hfcompress.reading import open_dataset, read_files

    path = Path(data).expanduser()
    if isinstance(data, Path) or path.is_file():
        return read_files([path])
    splits = open_dataset(data, None, None, text_column)
    if "train" not in splits:
        raise DataError(f"Data '{data}' have no split 'train'; they have {', '.join(splits)}. Give one as a Dataset.")
    return splits["train"]


def _column(table: Any, name: str) -> Iterator[Any]:
    if name not in table.column_names:
        raise DataError(
            f"The calibration data have no column '{name}'. {did_you_mean(name, table.column_names)}"
            f"Their columns: {', '.join(table.column_names)}."
        )
    return (row[name] for row in table.select_columns([name]))


def _checked(texts: Iterable[Any]) -> Iterator[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"calibration text {index} is no text but {type(text).__name__}.")
        yield text


def _not_numbers(table: Any) -> list[str]:
    first: dict[str, Any] = next(iter(table), {})
    return [name for name, value in first.items() if not _is_numbers(value)]


def _is_numbers(value: Any) -> bool:
    while isinstance(value, (list, tuple)):
        value = value[0] if value else 0
    return isinstance(value, (int, float, Tensor))


def _collated(rows: Iterable[Mapping[str, Any]], processor: Any) -> list[Batch]:
    """Stack rows of one length; pad others if a tokenizer can, or else make each a batch."""
    waiting, found = iter(rows), list[Batch]()
    while some := list(islice(waiting, BATCH_SIZE)):
        shapes = {name: {torch.as_tensor(row[name]).shape for row in some} for name in some[0]}
        if all(len(found_shapes) == 1 for found_shapes in shapes.values()):
            found.append({name: torch.stack([torch.as_tensor(row[name]) for row in some]) for name in some[0]})
        elif getattr(processor, "pad_token_id", None) is not None and set(some[0]) <= _PADDABLE:
            found.append(dict(processor.pad(some, return_tensors="pt")))
        else:
            found.extend({name: torch.as_tensor(row[name]).unsqueeze(0) for name in row} for row in some)
    return found
