"""One class of several for each row, token or choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfcompress.errors import DataError
from hfcompress.outputs.base import IGNORED, Batch, Outputs, label_names, logits_in


class Classes(Outputs):
    """A class for each row (a text, an image) or each token; the model's own loss is the mean over labelled items."""

    what: ClassVar[str] = "a class of several"

    def labels(self, batch: Batch) -> Tensor:
        """Return the labels as they are: (rows,) or (rows, tokens).  Raises DataError for labels with fractions."""
        labels = batch["labels"]
        if labels.is_floating_point():
            raise DataError(
                "The labels are floating point numbers, but the model chooses a class. Set its config's problem_type "
                "to 'regression' or 'multi_label_classification', or give class numbers."
            )
        return labels

    def logits(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the logits as they are: (rows, classes) or (rows, tokens, classes)."""
        return logits_in(output)

    def size(self, model: Any) -> int | None:
        """Return the number of classes, or of tokens for a model that predicts tokens."""
        head = model.get_output_embeddings()
        return int(model.config.num_labels) if head is None else int(head.weight.shape[0])

    def class_names(self, model: Any) -> list[str] | None:
        """Return the names of the classes, None where they are tokens."""
        return label_names(model.config) if model.get_output_embeddings() is None else None


class NextTokens(Classes):
    """The next token at each place of a causal language model."""

    what: ClassVar[str] = "next tokens"

    def labels(self, batch: Batch) -> Tensor:
        """Return the labels moved one place to the left: a slice of the logits would have to be copied."""
        return torch.nn.functional.pad(super().labels(batch)[:, 1:], (0, 1), value=IGNORED)


class Choices(Classes):
    """One of several texts for each row of a multiple-choice model; how many may differ from row to row."""

    what: ClassVar[str] = "a choice among texts"

    def size(self, model: Any) -> int | None:
        """Return None: the choices are the data's, not the model's."""
        return None

    def class_names(self, model: Any) -> list[str] | None:
        """Return None: a choice has no name."""
        return None
