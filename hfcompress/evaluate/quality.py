"""How well a model does its task: its logits against the labels, summed up by metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import evaluate
import torch
from torch import Tensor, nn

from hfcompress.errors import DataError, ModelError
from hfcompress.evaluate.metrics import load_metric
from hfcompress.evaluate.modes import is_causal, is_encoder_decoder, measuring, on_device
from hfcompress.progress import track

IGNORED = -100
# Logits are turned to float32 this many at a time (128 MiB): a batch of 8 x 512 x 49,152 would take 800 MB at once.
FLOAT32_AT_ONCE = 2**25


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
        if bool(loss.isnan().any()):
            raise ModelError(_not_a_number())
        sums.index_add_(0, part // places, loss.double())
    return sums, (labels != IGNORED).reshape(rows, -1).sum(dim=1)


def predicted_classes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest class and the label of every labelled place, both (places,) int64.

    logits: (rows, ..., classes), already aligned with labels.  labels: (rows, ...). Raises ModelError for NaN.
    """
    kept = labels != IGNORED
    # The test on the largest value suffices: max() returns NaN where there is one.
    largest, classes = logits.max(dim=-1)
    if bool(largest[kept].isnan().any()):
        raise ModelError(_not_a_number())
    return classes[kept], labels[kept]


def _not_a_number() -> str:
    return (
        "The model's logits hold NaN, so no metric can be computed. Look for overflow in float16 "
        "(load it in bfloat16 or float32) or for a damaged checkpoint."
    )


def aligned_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run one batch and return logits and labels that stand beside each other.

    batch: tensors on any device, with ``labels``. A causal language model's labels are the tokens themselves and are
    shifted here. Returns (rows, ..., classes) and (rows, ...). Raises DataError or ModelError where they do not fit.
    """
    moved = on_device(model, batch)
    if "labels" not in moved:
        raise DataError(f"A batch to evaluate on needs 'labels'; it has {', '.join(sorted(moved)) or 'nothing'}.")
    labels = moved["labels"] if is_encoder_decoder(model) else moved.pop("labels")
    if labels.is_floating_point():
        raise DataError("The labels are floating point numbers; only classes and tokens can be evaluated.")
    causal = is_causal(model)
    output = model(**moved, **({"use_cache": False} if causal else {}))
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ModelError(f"{type(model).__name__} returns no logits. Load the model with a task head.")
    if causal and logits.dim() == labels.dim() + 1 and labels.dim() == 2:
        # The labels are moved rather than the logits, whose slice would have to be copied.
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if logits.shape[:-1] != labels.shape:
        raise DataError(
            f"Logits of shape {tuple(logits.shape)} do not belong to labels of shape {tuple(labels.shape)}."
        )
    if logits.shape[-1] < 2:
        raise DataError("The model has a single output (regression); only classes and tokens can be evaluated.")
    return logits, labels


@dataclass(frozen=True)
class Scores:
    """Each metric's value and, where accuracy is one of them, whether each labelled place was answered rightly."""

    values: dict[str, float]
    hits: list[bool] | None


def _add(loaded: Mapping[str, evaluate.EvaluationModule], logits: Tensor, labels: Tensor, hits: list[bool]) -> None:
    """Give one batch to every metric: sums of losses to perplexity, classes to all others."""
    if "perplexity" in loaded:
        sums, counts = row_losses(logits, labels)
        loaded["perplexity"].add_batch(negative_log_likelihood=sums.tolist(), tokens=counts.tolist())
    if set(loaded) - {"perplexity"}:
        predictions, references = (values.tolist() for values in predicted_classes(logits, labels))
        hits += [one == other for one, other in zip(predictions, references)]
        for name, metric in loaded.items():
            if name != "perplexity" and references:
                metric.add_batch(predictions=predictions, references=references)


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    metrics: Sequence[str],
    description: str = "evaluate",
    total: int | None = None,
) -> dict[str, float]:
    """Return each metric's value over all batches; see ``score_model``."""
    return score_model(model, batches, metrics, description, total).values


def score_model(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    metrics: Sequence[str],
    description: str = "evaluate",
    total: int | None = None,
) -> Scores:
    """Return each metric's value over all batches, and which examples were right where accuracy is a metric.

    batches: dicts of tensors with ``labels`` (-100 is ignored).  metrics: names for ``load_metric``.  total: how many
    batches there are, for the progress. The model is put in eval mode for the time. Raises DataError for no batches or
    no labels, ModelError for NaN logits.
    """
    loaded = {name: load_metric(name) for name in metrics}
    hits: list[bool] = []
    classes, labelled = 0, 0
    with measuring(model):
        for batch in track(batches, description, total):
            logits, labels = aligned_logits(model, batch)
            classes, labelled = logits.shape[-1], labelled + int((labels != IGNORED).sum())
            _add(loaded, logits, labels, hits)
            del logits
    if labelled == 0:
        raise DataError(f"There is nothing to {description} on: no batches, or every label is {IGNORED}.")
    values: dict[str, float] = {}
    for name, metric in loaded.items():
        found = metric.compute(**({"num_labels": classes} if name == "f1" else {}))
        values.update({key: float(value) for key, value in found.items() if isinstance(value, (int, float))})
    return Scores(values, hits if "accuracy" in loaded else None)
