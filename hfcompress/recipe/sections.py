"""The sections of a recipe that say what is compressed, with which data, and how it is measured."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hfcompress.recipe.values import FROZEN, AtLeastOne, Text


def folder_name(name: str) -> str:
    """Return the name if it can be a folder and a repository, else raise ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"'{name}' must begin with a letter or digit and hold only letters, digits, '.', '_' and '-'")
    return name


@dataclass(frozen=True, config=FROZEN)
class ModelSpec:
    """The model to compress.

    id: a name on the Hub, a local folder, or ``package:<name>`` for an installed package that ships a model.
    revision: a branch, tag or commit on the Hub.  dtype: of the weights; auto is what the checkpoint says.
    trust_remote_code: run code that comes with the model.
    written_by: the command that writes a local model, which the card names, and the error that misses the model.
    """

    id: Text
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    written_by: Text | None = None


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
    new_tokens: length of that continuation.  num_beams: beams of what seq2seq-lm and speech-seq2seq generate.
    benchmark: a registered benchmark that the held-out data are.
    """

    metrics: tuple[Text, ...] | None = None
    max_rows: AtLeastOne | None = None
    batch_size: AtLeastOne = 8
    prompt: str | None = None
    new_tokens: Annotated[int, Field(ge=2)] = 48
    num_beams: AtLeastOne | None = None
    benchmark: Benchmark | None = None
