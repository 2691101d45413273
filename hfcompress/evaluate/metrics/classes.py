"""Metrics of classes: how often the predicted one is the labelled one."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hfcompress.evaluate.metrics.base import Form, LocalMetric, Share


class Accuracy(Share):
    """Share of the examples whose predicted class is the labelled one, in [0, 1]."""

    takes: ClassVar[tuple[Form, ...]] = ("classes", "decisions")


class F1(LocalMetric):
    """F1 in [0, 1]: of class 1 where there are two labels, else the plain mean over the classes (macro).

    num_labels: how many labels the task has; None takes it from the data (two when only 0 and 1 occur). The macro
    mean runs over the classes that occur among predictions or references, as scikit-learn's does; 0/0 counts as 0.
    Of a multi-label task it is the micro F1: every label of every row is a decision, and yes is class 1.
    """

    takes: ClassVar[tuple[Form, ...]] = ("classes", "decisions")

    def _compute(self, predictions: Any, references: Any, num_labels: int | None = None) -> dict[str, float]:
        predicted, labelled = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(predicted, labelled)
        binary = set(classes.tolist()) <= {0, 1} if num_labels is None else num_labels == 2
        scores = [_f1_of(one, predicted, labelled) for one in ([1] if binary else classes)]
        return {"f1": float(np.mean(scores))}


class MacroF1(LocalMetric):
    """Plain mean of the classes' F1, in [0, 1], over the classes that occur among predictions or references."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, labelled = np.asarray(predictions), np.asarray(references)
        scores = [_f1_of(one, predicted, labelled) for one in np.union1d(predicted, labelled)]
        return {"macro_f1": float(np.mean(scores))}


def _f1_of(one: int, predicted: np.ndarray, labelled: np.ndarray) -> float:
    """F1 of one class against the rest: 2 TP / (2 TP + FP + FN)."""
    hits = np.sum((predicted == one) & (labelled == one))
    named = np.sum(predicted == one) + np.sum(labelled == one)
    return float(2 * hits / named) if named else 0.0
