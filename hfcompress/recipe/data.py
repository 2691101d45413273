"""The data section of a recipe, and which of its options each task has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic.dataclasses import dataclass

from hfcompress.recipe.aliases import ALIASES, CONVERTED
from hfcompress.recipe.faults import not_a, not_one_of
from hfcompress.recipe.values import FROZEN, AtLeastOne, Text

# Each task's options with their defaults.  Those that the example scripts of Transformers call otherwise have these
# names too, see ``aliases``.
TASK_DATA: dict[str, dict[str, Any]] = {
    "causal-lm": {"text_column": "text", "block_size": 256},
    "masked-lm": {"text_column": "text", "max_length": 128, "mlm_probability": 0.15, "line_by_line": False},
    "sequence-classification": {
        "text_column": "text",
        "text_pair_column": None,
        "label_column": "label",
        "max_length": 128,
        "problem_type": None,
    },
    "token-classification": {
        "text_column": "tokens",
        "label_column": "ner_tags",
        "max_length": 128,
        "label_all_tokens": False,
    },
    "question-answering": {
        "question_column": "question",
        "context_column": "context",
        "answer_column": "answers",
        "max_length": 384,
        "doc_stride": 128,
        "max_answer_length": 30,
        "version_2_with_negative": False,
    },
    "multiple-choice": {
        "context_column": "sent1",
        "question_column": "sent2",
        "ending_columns": ("ending0", "ending1", "ending2", "ending3"),
        "label_column": "label",
        "max_length": 128,
    },
    "seq2seq-lm": {
        "text_column": "text",
        "summary_column": "summary",
        "source_lang": None,
        "target_lang": None,
        "forced_bos_token": None,
        "source_prefix": "",
        "max_source_length": 1024,
        "max_target_length": 128,
    },
    "image-classification": {"image_column_name": "image", "label_column": "label"},
    "speech-seq2seq": {
        "audio_column_name": "audio",
        "text_column": "text",
        "max_duration_in_seconds": 20.0,
        "min_duration_in_seconds": 0.0,
        "max_target_length": 448,
        "language": None,
    },
    "speech-ctc": {
        "audio_column_name": "audio",
        "text_column": "text",
        "max_duration_in_seconds": 20.0,
        "min_duration_in_seconds": 0.0,
    },
    "sentence-embeddings": {"text_column": "text", "max_length": 128, "pooling": "mean"},
}
TASKS = tuple(TASK_DATA)
# What the Hub and pipelines call them.
_SAME_TASK = {
    "text-generation": "causal-lm",
    "fill-mask": "masked-lm",
    "text-classification": "sequence-classification",
    "ner": "token-classification",
    "summarization": "seq2seq-lm",
    "translation": "seq2seq-lm",
    "text2text-generation": "seq2seq-lm",
    "automatic-speech-recognition": "speech-seq2seq or speech-ctc",
    "feature-extraction": "sentence-embeddings",
    "sentence-similarity": "sentence-embeddings",
}
_OTHER_TASKS = (
    "zero-shot-classification", "object-detection", "image-segmentation", "image-to-text", "image-text-to-text",
    "depth-estimation", "audio-classification", "text-to-speech", "table-question-answering", "text-ranking",
)  # fmt: skip


def known_task(task: str) -> str:
    """Return the task, or raise ValueError with what it is called here or what there is."""
    if task in _OTHER_TASKS:
        raise ValueError(f"task '{task}' is not there yet; known: {', '.join(TASKS)}")
    if task in _SAME_TASK:
        raise ValueError(f"task '{task}' is called {_SAME_TASK[task]} here")
    if task not in TASKS:
        raise ValueError(not_one_of(task, TASKS))
    return task


def tasks_with(option: str) -> list[str]:
    """Return the tasks that have a data option; none for one that does not depend on the task."""
    return [task for task, options in TASK_DATA.items() if option in options]


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


PATHS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Files = Annotated[
    dict[str, tuple[str, ...]] | tuple[str, ...] | None,
    BeforeValidator(_paths),
    WithJsonSchema({"anyOf": [*PATHS_SCHEMA["anyOf"], {"type": "object", "additionalProperties": PATHS_SCHEMA}]}),
]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True, config=FROZEN)
class Splits:
    """Which splits of the data are trained on and measured on.

    train: name of the split to train on.  held_out: name of the split to measure on.
    """

    train: str | None = None
    held_out: str | None = None


@dataclass(frozen=True, config=FROZEN)
class DataSpec:
    """The data that stages train on and that models are measured on; None stands for the task's usual value.

    id: a dataset on the Hub, a folder of images or sounds, or ``package:<name>``.  name: its configuration.
    revision: a branch, tag or commit.
    files: local files in place of a dataset: a path, a list of paths, or a mapping from split to either.  A folder
    is one of images or sounds.  written_by: the command that writes the data, which the card names, and errors of data
    that cannot be opened.
    splits: names of the splits to use.  held_out_share: share of the rows kept apart when no split is held out.
    text_column, text_pair_column, label_column, question_column, context_column, answer_column, summary_column,
    image_column_name, audio_column_name: names of columns.
    ending_columns: the columns with a multiple-choice row's endings; one column holds a list of them.
    problem_type: what the labels of sequence-classification are; None takes it from the data.
    block_size: tokens of one row for causal-lm.
    max_length: tokens of one row; longer rows are cut, or windows of a context for question-answering.
    doc_stride: tokens that two windows of a context share.  max_answer_length: tokens of the longest answer.
    version_2_with_negative: some questions have no answer.
    label_all_tokens: every token of a word has its label, not the first alone.
    mlm_probability: share of the tokens that are masked.  line_by_line: a text is a row, not packed with others.
    source_lang, target_lang: keys of a ``translation`` column, in place of text_column and summary_column.
    source_prefix: stands before every source text, such as ``"summarize: "``.
    max_source_length, max_target_length: tokens of a source and a target; longer ones are cut.
    forced_bos_token: what every generated text begins with, such as the language of mBART and NLLB.
    max_duration_in_seconds: longer sounds are left out.  min_duration_in_seconds: shorter ones, too.
    language: of the speech, for multilingual Whisper models.
    pooling: how tokens become a sentence's vector.
    max_train_rows: train on the first rows only.
    """

    other_names: ClassVar[tuple[str, ...]] = (*ALIASES, *CONVERTED)

    id: Text | None = None
    name: str | None = None
    revision: str | None = None
    files: Files = None
    written_by: Text | None = None
    splits: Splits = dataclasses.field(default_factory=Splits)
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    text_column: Text | None = None
    text_pair_column: str | None = None
    label_column: Text | None = None
    question_column: Text | None = None
    context_column: Text | None = None
    answer_column: Text | None = None
    ending_columns: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    summary_column: Text | None = None
    source_lang: Text | None = None
    target_lang: Text | None = None
    source_prefix: str | None = None
    forced_bos_token: Text | None = None
    image_column_name: Text | None = None
    audio_column_name: Text | None = None
    language: Text | None = None
    problem_type: Problem | None = None
    block_size: Annotated[int, Field(ge=2)] | None = None
    max_length: AtLeastOne | None = None
    max_source_length: AtLeastOne | None = None
    max_target_length: AtLeastOne | None = None
    max_duration_in_seconds: Annotated[float, Field(gt=0)] | None = None
    min_duration_in_seconds: Annotated[float, Field(ge=0)] | None = None
    doc_stride: AtLeastOne | None = None
    max_answer_length: AtLeastOne | None = None
    version_2_with_negative: bool | None = None
    label_all_tokens: bool | None = None
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] | None = None
    line_by_line: bool | None = None
    pooling: Literal["mean", "cls", "last"] | None = None
    max_train_rows: AtLeastOne | None = None

    def __post_init__(self) -> None:
        if (self.id is None) == (self.files is None):
            raise ValueError("give either id (a dataset) or files (local paths)")
        if self.files is not None and (self.name or self.revision):
            raise ValueError("name and revision belong to an id, not to files")
        if (self.source_lang is None) != (self.target_lang is None):
            raise ValueError("give both source_lang and target_lang, or neither")

    def of(self, task: str) -> DataSpec:
        """Return the options with the task's usual values in place of None; a known task."""
        usual = {name: value for name, value in TASK_DATA[task].items() if getattr(self, name) is None}
        return dataclasses.replace(self, **usual)
