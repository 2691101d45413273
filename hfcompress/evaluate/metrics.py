"""Task metrics as local ``evaluate.Metric`` modules, so that measuring a model needs no network."""

from __future__ import annotations

import math
import os
import uuid
from typing import Any

import datasets
import evaluate
import numpy as np

from hfcompress.errors import DataError, MissingDependencyError, did_you_mean


class LocalMetric(evaluate.Metric):
    """A metric that keeps its examples in memory and writes nothing to disk."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": True, "experiment_id": uuid.uuid4().hex, **options})

    def _build_data_dir(self) -> str:
        # The base class makes this folder at once, which fails in a read-only home; nothing is ever put there.
        return os.path.join(self._data_dir_root, self.name, self.config_name)


def _label_info(description: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions and references: class indices, one for each example.",
        features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
    )


class Accuracy(LocalMetric):
    """Share of the examples whose predicted class is the labelled one, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return _label_info("Share of the examples whose predicted class is the labelled one.")

    def _compute(self, predictions: Any, references: Any, num_labels: int | None = None) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class F1(LocalMetric):
    """F1 in [0, 1]: of class 1 where there are two labels, else the plain mean over the classes (macro).

    num_labels: how many labels the task has; None takes it from the data (two when only 0 and 1 occur). The macro
    mean runs over the classes that occur among predictions or references, as scikit-learn's does; 0/0 counts as 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _label_info("F1 of class 1 where there are two labels, else the mean over classes.")

    def _compute(self, predictions: Any, references: Any, num_labels: int | None = None) -> dict[str, float]:
        predicted, labelled = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(predicted, labelled)
        binary = set(classes.tolist()) <= {0, 1} if num_labels is None else num_labels == 2
        scores = [_f1_of(one, predicted, labelled) for one in ([1] if binary else classes)]
        return {"f1": float(np.mean(scores))}


def _f1_of(one: int, predicted: np.ndarray, labelled: np.ndarray) -> float:
    """F1 of one class against the rest: 2 TP / (2 TP + FP + FN)."""
    hits = np.sum((predicted == one) & (labelled == one))
    named = np.sum(predicted == one) + np.sum(labelled == one)
    return float(2 * hits / named) if named else 0.0


class Perplexity(LocalMetric):
    """exp of the mean negative log-likelihood (natural logarithm) of a token, over all tokens of all rows."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood of a token.",
            citation="",
            inputs_description="negative_log_likelihood: summed over a row's tokens.  tokens: how many there were.",
            features=datasets.Features(
                {"negative_log_likelihood": datasets.Value("float64"), "tokens": datasets.Value("int64")}
            ),
        )

    def _compute(self, negative_log_likelihood: Any, tokens: Any) -> dict[str, float]:
        count = int(np.sum(tokens))
        if count == 0:
            raise DataError(
                "Perplexity needs at least one predicted token; every label is -100 or the rows are short."
            )
        mean = math.fsum(negative_log_likelihood) / count
        # A ruined model can be worse than the largest float; infinity is the honest figure then.
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}


METRICS: dict[str, type[LocalMetric]] = {"accuracy": Accuracy, "f1": F1, "perplexity": Perplexity}


def load_metric(name: str, trust_remote_code: bool = False) -> evaluate.EvaluationModule:
    """Return a metric: a local one when it is in ``METRICS``, otherwise ``evaluate.load(name)``.

    A name with a slash runs a stranger's code and needs ``trust_remote_code``. Raises DataError when the metric
    cannot be had, MissingDependencyError when it needs a package that is not installed.
    """
    if name in METRICS:
        return METRICS[name]()
    known = f"{did_you_mean(name, METRICS)}Known without the network: {', '.join(sorted(METRICS))}."
    if ("/" in name or os.path.exists(name)) and not trust_remote_code:
        raise DataError(f"Metric '{name}' would run code from outside; pass trust_remote_code=True if you trust it.")
    try:
        return evaluate.load(name, keep_in_memory=True, experiment_id=uuid.uuid4().hex)
    except ImportError as error:
        raise MissingDependencyError(f"Metric '{name}' cannot be loaded: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"Metric '{name}' is neither local nor could it be loaded from the Hub. {known}") from error
