"""What a task knows: its Auto class, its columns, its batches and how its answers are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.evaluate import Reader
from hfcompress.evaluate.metrics import Form
from hfcompress.outputs import Outputs
from hfcompress.progress import quiet_bars
from hfcompress.recipe import DataSpec


@dataclass(frozen=True)
class Head:
    """What the data ask of a model's head.

    names: of its classes; none for a regression.  problem: the config's ``problem_type`` where it is not a plain class
    for each row or token.
    """

    names: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def size(self) -> int:
        """Return how many outputs the head has."""
        return len(self.names) or 1


@dataclass(frozen=True)
class HeldOut:
    """What answers are read against.  rows: as they were, in the order of the batches.

    original: opens the recipe's model, for tasks that are measured against it.  num_beams: of what is generated.
    """

    rows: Dataset
    processor: Any
    spec: DataSpec
    labels: list[str] | None
    original: Callable[[], PreTrainedModel]
    num_beams: int = 1


class Task(ABC):
    """A kind of model; one subclass in one file each.

    head_name: stands in the names of model classes that have this task's head; a model without it gets a new head,
    which the recipe has to train first.  None where every model has to come with its weights.
    packs: rows are texts packed one after the other, not one row of the data each.
    one_text: calibration needs a column of text and nothing else.  spare: weights that a checkpoint may lack.
    draws_anew: the collator draws what the model sees of a row, each time.  predicts_tokens: the classes are tokens.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    auto_processor: ClassVar[str] = "AutoTokenizer"
    head_name: ClassVar[str | None] = None
    packs: ClassVar[bool] = False
    pads: ClassVar[bool] = True
    one_text: ClassVar[bool] = False
    draws_anew: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = False
    spare: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def columns(self, spec: DataSpec) -> list[str]:
        """Return the columns that the data must have."""

    def texts(self, rows: Dataset, spec: DataSpec) -> Iterator[str]:
        """Yield everything that rows show a model as text, labels and answers apart."""
        if spec.source_prefix:
            yield spec.source_prefix
        for column in self.columns(spec):
            if column not in (spec.label_column, spec.answer_column):
                for value in rows[column]:
                    yield from _strings(value)

    def kept(self, rows: Dataset, spec: DataSpec) -> Dataset:
        """Return the rows that are used: all of them, unless a task leaves some out."""
        return rows

    def head(self, rows: Dataset, spec: DataSpec) -> Head | None:
        """Return the head that the training rows ask for; None where the data say nothing about it."""
        return None

    @abstractmethod
    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Any:
        """Return rows as the model takes them, labels included.  labels: class names in the head's order, if any.

        Raises DataError for labels or contents that do not fit, with the row's number.
        """

    def unlabelled(self, rows: Dataset, processor: Any, spec: DataSpec) -> Any:
        """Return rows as the model takes them, without labels where the collator does not need them."""
        return self.encode(rows, processor, spec, None)

    @abstractmethod
    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return the function that makes a batch of encoded rows.  seed: of what is random in it, else torch's own."""

    def row_length(self, spec: DataSpec) -> tuple[str, int] | None:
        """Return the option that sets how many tokens a row may have, and its value; None where rows are no tokens."""
        assert spec.max_length is not None
        return "data.max_length", spec.max_length

    def check(self, config: PreTrainedConfig, processor: Any, spec: DataSpec) -> None:  # noqa: B027 - few need it
        """Raise ModelError or DataError for what does not fit together, before any data are encoded."""

    def prepare_(self, model: PreTrainedModel, processor: Any, head: Head | None) -> None:  # noqa: B027 - few need it
        """Fit a model that was just opened to how this task's batches are made."""

    def outputs(self, spec: DataSpec) -> Outputs | None:
        """Return the kind of the model's outputs where the model's class does not say it."""
        return None

    def calibration_rows(self, rows: Dataset, processor: Any, spec: DataSpec, count: int, length: int) -> Any:
        """Return at most ``count`` encoded rows, of at most ``length`` tokens where a row is cut by ``max_length``."""
        first = rows.select(range(min(count, len(rows))))
        shorter = spec if spec.max_length is None else replace(spec, max_length=min(length, spec.max_length))
        return self.unlabelled(first, processor, shorter)

    def metrics_for(self, head: Head | None) -> tuple[str, ...]:
        """Return the metrics that are taken unless a recipe names some."""
        return self.metrics

    def forms(self, head: Head | None) -> tuple[Form, ...]:
        """Return the forms in which ``reader`` reads answers."""
        return "classes", "likelihood"

    def reader(self, held_out: HeldOut) -> Reader:
        """Return what reads the model's answers."""
        return Reader(self.outputs(held_out.spec))


def batches(rows: Any, collator: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """Return the encoded rows as batches of tensors, in order."""
    return [
        dict(collator([rows[index] for index in range(first, min(first + batch_size, len(rows)))]))
        for first in range(0, len(rows), batch_size)
    ]


def _strings(value: Any) -> Iterator[str]:
    """Yield the text in a cell: itself, the words of a list as one text, or each text of a mapping or nested list."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(one, str) for one in value):
        yield " ".join(value)
    elif isinstance(value, (list, dict)):
        for one in value if isinstance(value, list) else value.values():
            yield from _strings(one)


def mapped(rows: Dataset, function: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> Dataset:
    """Return new rows that a function makes of batches of columns; the old columns are dropped."""
    with quiet_bars(len(rows) < 10_000):
        return rows.map(function, batched=True, remove_columns=rows.column_names, keep_in_memory=True)


class LazyRows(torch.utils.data.Dataset):
    """Rows that are opened when they are used: images and sounds, of which memory does not hold many."""

    def __init__(self, rows: Dataset, encode: Callable[[dict[str, Any], int], dict[str, Any]]) -> None:
        self.rows = rows
        self.encode = encode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.encode(self.rows[index], index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Any) -> LazyRows:
        """Return some of the rows, as ``datasets.Dataset.select`` does."""
        return LazyRows(self.rows.select(indices), self.encode)


def refuse_slow_tokenizer(processor: Any, task: str) -> None:
    """Raise ModelError for a tokenizer that cannot say where in the text a token stands."""
    if not getattr(processor, "is_fast", False):
        raise ModelError(f"{task} needs a fast tokenizer (tokenizer.json), which {type(processor).__name__} is not.")
