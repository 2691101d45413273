"""How well a model does its task: its answers against the labels, summed up by metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
from torch import nn

from hfcompress.errors import DataError, ModelError
from hfcompress.evaluate.metrics import METRICS, Form, Share, load_metric
from hfcompress.evaluate.modes import measuring
from hfcompress.evaluate.readers import Found, Reader
from hfcompress.outputs import Vectors, outputs_of
from hfcompress.progress import track


@dataclass(frozen=True)
class Scores:
    """Each metric's value and, of those that are a share of right answers, whether each answer was right."""

    values: dict[str, float]
    hits: dict[str, list[bool]]


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    metrics: Sequence[str],
    description: str = "evaluate",
    total: int | None = None,
    reader: Reader | None = None,
) -> dict[str, float]:
    """Return each metric's value over all batches; see ``score_model``."""
    return score_model(model, batches, metrics, description, total, reader).values


def score_model(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    metrics: Sequence[str],
    description: str = "evaluate",
    total: int | None = None,
    reader: Reader | None = None,
) -> Scores:
    """Return each metric's value over all batches, and which examples were right by those that are shares.

    batches: dicts of tensors with labels (-100 is ignored).  metrics: names for ``load_metric``.  total: how many
    batches there are, for the progress.  reader: what makes texts of the answers, for metrics that need some.
    The model is put in eval mode for the time. Raises DataError for no batches, no labels, or a metric that cannot
    read this kind of answers, ModelError for NaN logits.
    """
    reader = reader or Reader()
    kind = reader.kind if reader.kind is not None else outputs_of(model)
    if isinstance(kind, Vectors) and not reader.forms(kind):
        raise ModelError(f"{type(model).__name__} returns no logits. Load the model with a task head.")
    loaded = {name: load_metric(name) for name in metrics}
    forms = {name: _form(name, metric, reader.forms(kind)) for name, metric in loaded.items()}
    hits: dict[str, list[bool]] = {name: [] for name, metric in loaded.items() if isinstance(metric, Share)}
    with measuring(model):
        for batch in track(batches, description, total):
            _add(loaded, forms, reader.read(model, batch, kind, set(forms.values())), hits)
    if reader.items == 0:
        raise DataError(f"There is nothing to {description} on: no batches, or every label is -100.")
    _add(loaded, forms, reader.finish(), hits)
    values: dict[str, float] = {}
    for name, metric in loaded.items():
        result = metric.compute(**({"num_labels": reader.classes} if name == "f1" else {}))
        values.update({key: float(value) for key, value in result.items() if isinstance(value, (int, float))})
    return Scores(values, hits)


def refuse_unreadable(metrics: Sequence[str], forms: Sequence[Form]) -> None:
    """Raise DataError when a local metric takes none of the forms; one from outside is known only when loaded."""
    for name in metrics:
        if name in METRICS:
            _form(name, METRICS[name], forms)


def _form(name: str, metric: Any, forms: Sequence[Form]) -> Form:
    """Return the form that a metric gets; one from outside gets the first."""
    takes = getattr(metric, "takes", forms[:1])
    for form in forms:
        if form in takes:
            return form
    fitting = [one for one, kind in METRICS.items() if set(kind.takes) & set(forms)]
    raise DataError(
        f"Metric '{name}' takes {' or '.join(takes) or 'nothing'}, but this task's answers are "
        f"{' or '.join(forms) or 'compared by no metric'}. Metrics that fit: {', '.join(fitting) or 'none'}."
    )


def _add(
    loaded: Mapping[str, evaluate.EvaluationModule],
    forms: Mapping[str, Form],
    found: Found,
    hits: Mapping[str, list[bool]],
) -> None:
    for name, metric in loaded.items():
        columns = found.get(forms[name])
        if columns and next(iter(columns.values())):
            metric.add_batch(**columns)
            if isinstance(metric, Share):
                pairs = zip(columns["predictions"], columns["references"])
                hits[name].extend(metric.is_right(one, other) for one, other in pairs)
