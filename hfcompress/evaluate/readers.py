"""Reads what a model answers to a batch, in the forms that metrics take."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.errors import DataError, ModelError
from hfcompress.evaluate.metrics import Form
from hfcompress.evaluate.modes import is_encoder_decoder, on_device
from hfcompress.outputs import IGNORED, Binary, Frames, NextTokens, Numbers, Outputs, Spans, Vectors, outputs_of

# Logits are turned to float32 this many at a time (128 MiB): a batch of 8 x 512 x 49,152 would take 800 MB at once.
FLOAT32_AT_ONCE = 2**25

Columns = dict[str, list[Any]]
Found = dict[Form, Columns]


class Reader:
    """Reads batches in order, by the kind of the model's outputs alone; tasks that need texts derive from it.

    items: how many labelled items it has read.  classes: how many there were to choose from.
    kind: of the outputs; None takes it from the model.
    """

    def __init__(self, kind: Outputs | None = None) -> None:
        self.kind = kind
        self.items = 0
        self.classes: int | None = None

    def forms(self, kind: Outputs) -> tuple[Form, ...]:
        """Return the forms that answers of a kind can be read in; a metric from outside gets the first."""
        if isinstance(kind, Numbers):
            return ("numbers",)
        if isinstance(kind, Binary):
            return ("decisions", "likelihood")
        return () if isinstance(kind, (Spans, Frames, Vectors)) else ("classes", "likelihood")

    def read(self, model: nn.Module, batch: Mapping[str, Any], kind: Outputs, wanted: Set[Form]) -> Found:
        """Run one batch and return its predictions and references in the forms that are wanted."""
        logits, labels = aligned_logits(model, batch, kind)
        if isinstance(kind, Numbers):
            self.items += len(labels)
            refuse_nan(logits)
            return {"numbers": both(logits.double().flatten().tolist(), labels.double().flatten().tolist())}
        self.items += int((labels != IGNORED).sum())
        self.classes = logits.shape[-1]
        found: Found = {}
        if "likelihood" in wanted:
            sums, counts = row_losses(logits, labels)
            found["likelihood"] = {"negative_log_likelihood": sums.tolist(), "tokens": counts.tolist()}
        if wanted - {"likelihood"}:
            predictions, references = (values.tolist() for values in predicted_classes(logits, labels))
            found[Reader.forms(self, kind)[0]] = both(predictions, references)
        return found

    def finish(self) -> Found:
        """Return what could only be read when all batches had been seen."""
        return {}


def both(predictions: list[Any], references: list[Any]) -> Columns:
    """Return the two columns of most metrics."""
    return {"predictions": predictions, "references": references}


def run(model: nn.Module, batch: Mapping[str, Any], kind: Outputs) -> tuple[Any, dict[str, Any]]:
    """Return a model's output for a batch, and the batch on the model's device."""
    moved = on_device(model, batch)
    given = {k: v for k, v in moved.items() if k not in kind.label_columns or is_encoder_decoder(model)}
    return model(**given, **({"use_cache": False} if isinstance(kind, NextTokens) else {})), moved


def aligned_logits(model: nn.Module, batch: Mapping[str, Any], kind: Outputs | None = None) -> tuple[Tensor, Tensor]:
    """Run one batch and return logits and labels that stand beside each other.

    batch: tensors on any device, with labels. A causal language model's labels are the tokens themselves and are
    shifted here. Returns (places, classes) and (places). Raises DataError or ModelError where they do not fit.
    """
    kind = kind if kind is not None else outputs_of(model)
    for column in kind.label_columns:
        if column not in batch:
            raise DataError(
                f"A batch to evaluate on needs '{column}'; it has {', '.join(sorted(batch)) or 'nothing'}."
            )
    output, moved = run(model, batch, kind)
    try:
        logits = kind.logits(output, moved)
    except (KeyError, AttributeError):
        raise ModelError(f"{type(model).__name__} returns no logits. Load the model with a task head.") from None
    labels = kind.labels(moved)
    shape = logits.shape if isinstance(kind, Numbers) else logits.shape[:-1]
    if shape != labels.shape:
        raise DataError(
            f"Logits of shape {tuple(logits.shape)} do not belong to labels of shape {tuple(labels.shape)}."
        )
    return logits, labels


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood of each row's labels, in float32 and over few tokens at a time.

    logits: (rows, ..., classes) in any floating dtype, already aligned with labels.  labels: (rows, ...), -100 where
    nothing is predicted.  Returns (rows,) float64 sums and (rows,) int64 counts. Raises ModelError for NaN.
    """
    rows, classes = labels.shape[0], logits.shape[-1]
    flat, wanted = logits.reshape(-1, classes), labels.reshape(-1)
    kept = (wanted != IGNORED).nonzero().squeeze(1)
    places = wanted.numel() // rows
    sums = torch.zeros(rows, dtype=torch.float64, device=logits.device)
    for part in kept.split(max(1, FLOAT32_AT_ONCE // classes)):
        loss = torch.nn.functional.cross_entropy(flat[part].float(), wanted[part], reduction="none")
        refuse_nan(loss)
        sums.index_add_(0, part // places, loss.double())
    return sums, (labels != IGNORED).reshape(rows, -1).sum(dim=1)


def predicted_classes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest class and the label of every labelled place, both (places,) int64.

    logits: (rows, ..., classes), already aligned with labels.  labels: (rows, ...). Raises ModelError for NaN.
    """
    kept = labels != IGNORED
    # The test on the largest value suffices: max() returns NaN where there is one.
    largest, classes = logits.max(dim=-1)
    refuse_nan(largest[kept])
    return classes[kept], labels[kept]


def refuse_nan(values: Tensor) -> None:
    """Raise ModelError when a model's answer holds NaN."""
    if bool(values.isnan().any()):
        raise ModelError(
            "The model's logits hold NaN, so no metric can be computed. Look for overflow in float16 "
            "(load it in bfloat16 or float32) or for a damaged checkpoint."
        )
