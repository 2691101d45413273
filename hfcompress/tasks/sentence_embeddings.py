"""Sentence embeddings: a vector for each text, learnt from a teacher without any labels."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedModel

from hfcompress.evaluate import Reader
from hfcompress.evaluate.metrics import Form
from hfcompress.evaluate.modes import measuring
from hfcompress.evaluate.readers import Found, both, refuse_nan, run
from hfcompress.outputs import Outputs, Vectors
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Head, HeldOut, Task, mapped


class SentenceEmbeddings(Task):
    """Embed texts; a compressed model is measured by how near its vectors stay to the original's."""

    name = "sentence-embeddings"
    auto_class = "AutoModel"
    metrics = ("cosine",)
    one_text: ClassVar[bool] = True
    spare: ClassVar[tuple[str, ...]] = ("pooler.",)  # the vectors are pooled from the last hidden state

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the text column."""
        return [str(spec.text_column)]

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Tokenize and cut to ``max_length``; there are no labels."""
        return mapped(
            rows,
            lambda batch: dict(processor(batch[str(spec.text_column)], truncation=True, max_length=spec.max_length)),
        )

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return the collator that pads a batch to its longest row."""
        return DataCollatorWithPadding(processor)

    def outputs(self, spec: DataSpec) -> Outputs:
        """Return vectors, pooled as the data section says."""
        assert spec.pooling is not None
        return Vectors(spec.pooling)

    def forms(self, head: Head | None) -> tuple[Form, ...]:
        """Return the forms in which ``reader`` reads answers."""
        return ("vectors",)

    def reader(self, held_out: HeldOut) -> Reader:
        """Return a reader that compares with the original model's vectors."""
        return VectorReader(held_out.original(), self.outputs(held_out.spec))


class VectorReader(Reader):
    """Reads a model's vectors beside those that the original gives for the same batch."""

    def __init__(self, original: PreTrainedModel, kind: Outputs) -> None:
        super().__init__(kind)
        self.original = original

    def forms(self, kind: Outputs) -> tuple[Form, ...]:
        """Return the one form."""
        return ("vectors",)

    def read(self, model: nn.Module, batch: Mapping[str, Any], kind: Outputs, wanted: Set[Form]) -> Found:
        """Embed the batch twice."""
        own = self._vectors(model, batch, kind)
        with measuring(self.original):
            reference = self._vectors(self.original, batch, kind)
        self.items += len(own)
        return {"vectors": both(own.tolist(), reference.tolist())}

    def _vectors(self, model: nn.Module, batch: Mapping[str, Any], kind: Outputs) -> torch.Tensor:
        output, moved = run(model, batch, kind)
        vectors = kind.logits(output, moved)
        refuse_nan(vectors)
        return vectors.float().cpu()
