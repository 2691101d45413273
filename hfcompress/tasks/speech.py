"""What both ways to recognize speech share: columns, sounds and padded transcripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig

from hfcompress.errors import ModelError
from hfcompress.outputs import IGNORED
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import LazyRows, Task
from hfcompress.tasks.sounds import of_length, read_sound, undecoded


class Speech(Task):
    """Write down what is said."""

    auto_processor = "AutoProcessor"
    pads: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = True

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the columns of sounds and transcripts."""
        return [str(spec.audio_column_name), str(spec.text_column)]

    def kept(self, rows: Dataset, spec: DataSpec) -> Dataset:
        """Return the rows whose sound is as long as the options of its duration say, each of which can be read."""
        assert spec.max_duration_in_seconds is not None
        column = str(spec.audio_column_name)
        shortest, longest = spec.min_duration_in_seconds or 0.0, spec.max_duration_in_seconds
        return of_length(undecoded(rows, column), column, shortest, longest)

    def row_length(self, spec: DataSpec) -> tuple[str, int] | None:
        """Return None: a sound is no row of tokens."""
        return None

    def check(self, config: PreTrainedConfig, processor: Any, spec: DataSpec) -> None:
        """Raise ModelError for a processor that lacks a part, or more tokens than the model knows."""
        for part in ("feature_extractor", "tokenizer"):
            if getattr(processor, part, None) is None:
                raise ModelError(f"{self.name} needs a processor with a {part}; {type(processor).__name__} has none.")
        tokens, size = len(processor.tokenizer), config.get_text_config().vocab_size
        if tokens > size:
            raise ModelError(f"The tokenizer has {tokens} tokens, but the model knows only {size}.")

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> LazyRows:
        """Return rows whose sounds are read when they are used."""
        column, extractor = str(spec.audio_column_name), processor.feature_extractor
        transcripts = transcribed(rows, processor, spec)
        numbered = rows.select_columns([column]).add_column("labels", transcripts)

        def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
            sound = read_sound(row[column], column, index, extractor.sampling_rate)
            features = extractor(sound, sampling_rate=extractor.sampling_rate)
            name = extractor.model_input_names[0]
            return {name: features[name][0], "labels": row["labels"]}

        return LazyRows(numbered, encode)

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return the collator that pads sounds, and transcripts by -100."""
        return SpeechCollator(processor.feature_extractor, processor.tokenizer)


def transcribed(rows: Dataset, processor: Any, spec: DataSpec) -> list[list[int]]:
    """Return the tokens of every transcript, cut to ``max_target_length`` where there is one."""
    cut: dict[str, Any] = {}
    if spec.max_target_length is not None:
        cut = {"truncation": True, "max_length": spec.max_target_length}
    return processor.tokenizer(list(rows[str(spec.text_column)]), **cut)["input_ids"]


@dataclass(frozen=True)
class SpeechCollator:
    """Pads sounds as their extractor does and transcripts by -100."""

    extractor: Any
    tokenizer: Any
    before_labels: Callable[[Tensor], Tensor] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return one batch."""
        name = self.extractor.model_input_names[0]
        batch = dict(self.extractor.pad([{name: row[name]} for row in rows], return_tensors="pt"))
        longest = max(len(row["labels"]) for row in rows)
        labels = torch.full((len(rows), longest), IGNORED)
        for place, row in zip(labels, rows):
            place[: len(row["labels"])] = torch.tensor(row["labels"])
        return {**batch, "labels": self.before_labels(labels) if self.before_labels else labels}
