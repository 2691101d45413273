"""The sections of a recipe that say what is compressed, with which data, and how it is measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.dataclasses import dataclass

from hfcompress.recipe.faults import not_a, not_one_of

TASKS = ("causal-lm", "sequence-classification")
_SAME_TASK = {"text-generation": "causal-lm", "text-classification": "sequence-classification"}
_OTHER_TASKS = (
    "token-classification", "question-answering", "multiple-choice", "masked-lm", "fill-mask", "seq2seq-lm",
    "summarization", "translation", "feature-extraction", "sentence-similarity", "zero-shot-classification",
    "image-classification", "object-detection", "image-segmentation", "image-to-text", "image-text-to-text",
    "depth-estimation", "audio-classification", "automatic-speech-recognition", "text-to-speech",
)  # fmt: skip
FROZEN = ConfigDict(extra="forbid")
AtLeastOne = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


def known_task(task: str) -> str:
    """Return the task, or raise ValueError with what it is called here or what there is."""
    if task in _OTHER_TASKS:
        raise ValueError(f"task '{task}' is not there yet; known: {', '.join(TASKS)}")
    if task in _SAME_TASK:
        raise ValueError(f"task '{task}' is called {_SAME_TASK[task]} here")
    if task not in TASKS:
        raise ValueError(not_one_of(task, TASKS))
    return task


def folder_name(name: str) -> str:
    """Return the name if it can be a folder and a repository, else raise ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"'{name}' must begin with a letter or digit and hold only letters, digits, '.', '_' and '-'")
    return name


def _one_or_more_paths(value: Any, what: str = "a path or a list of paths") -> tuple[str, ...]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise ValueError(not_a(what, value))
    if not paths or not all(paths):
        raise ValueError("names no file")
    return tuple(paths)


def _paths(value: Any) -> dict[str, tuple[str, ...]] | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("names no file")
        return {str(split): _one_or_more_paths(paths) for split, paths in value.items()}
    return _one_or_more_paths(value, "a path, a list of paths, or a mapping from split to paths")


_PATHS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Files = Annotated[
    dict[str, tuple[str, ...]] | tuple[str, ...] | None,
    BeforeValidator(_paths),
    WithJsonSchema({"anyOf": [*_PATHS_SCHEMA["anyOf"], {"type": "object", "additionalProperties": _PATHS_SCHEMA}]}),
]


@dataclass(frozen=True, config=FROZEN)
class ModelSpec:
    """The model to compress.

    id: a name on the Hub, a local folder, or ``package:<name>`` for an installed package that ships a model.
    revision: a branch, tag or commit on the Hub.  dtype: of the weights; auto is what the checkpoint says.
    trust_remote_code: run code that comes with the model.
    """

    id: Text
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, config=FROZEN)
class Splits:
    """Which splits of the data are trained on and measured on.

    train: name of the split to train on.  held_out: name of the split to measure on.
    """

    train: str | None = None
    held_out: str | None = None


@dataclass(frozen=True, config=FROZEN)
class DataSpec:
    """The data that stages train on and that models are measured on.

    id: a dataset on the Hub, or ``package:<name>``.  name: its configuration.  revision: a branch, tag or commit.
    files: local files in place of a dataset: a path, a list of paths, or a mapping from split to either.
    splits: names of the splits to use.  held_out_share: share of the rows kept apart when no split is held out.
    text_column, text_pair_column, label_column: names of columns.
    block_size: tokens of one row for causal-lm; None is 256.
    max_length: tokens of one row for sequence-classification; longer rows are cut.
    max_train_rows: train on the first rows only.
    """

    id: Text | None = None
    name: str | None = None
    revision: str | None = None
    files: Files = None
    splits: Splits = dataclasses.field(default_factory=Splits)
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    text_column: Text = "text"
    text_pair_column: str | None = None
    label_column: Text = "label"
    block_size: Annotated[int, Field(ge=2)] | None = None
    max_length: AtLeastOne = 128
    max_train_rows: AtLeastOne | None = None

    def __post_init__(self) -> None:
        if (self.id is None) == (self.files is None):
            raise ValueError("give either id (a dataset) or files (local paths)")
        if self.files is not None and (self.name or self.revision):
            raise ValueError("name and revision belong to an id, not to files")


@dataclass(frozen=True, config=FROZEN)
class Benchmark:
    """A benchmark that is registered on the Hub, whose leaderboard shall show the result.

    id: the dataset that the benchmark is registered with.  task: its task there, such as ``sst2``.
    metric: which of the metrics is its figure; None is the first.
    """

    id: Text
    task: Text
    metric: str | None = None


@dataclass(frozen=True, config=FROZEN)
class EvaluateSpec:
    """What is measured before, between and after the stages.

    metrics: names of metrics; None is the task's own choice.  max_rows: measure on the first held-out rows only.
    batch_size: rows of one forward pass.  prompt: text that a causal-lm continues, to show what it writes.
    new_tokens: length of that continuation.  benchmark: a registered benchmark that the held-out data are.
    """

    metrics: tuple[Text, ...] | None = None
    max_rows: AtLeastOne | None = None
    batch_size: AtLeastOne = 8
    prompt: str | None = None
    new_tokens: Annotated[int, Field(ge=2)] = 48
    benchmark: Benchmark | None = None
