"""Metrics of numbers (regression) and of vectors (embeddings)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hfcompress.evaluate.metrics.base import Form, LocalMetric

_NUMBERS: tuple[Form, ...] = ("numbers",)


class MSE(LocalMetric):
    """Mean squared difference of prediction and label."""

    takes: ClassVar[tuple[Form, ...]] = _NUMBERS

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"mse": float(np.mean((np.asarray(predictions) - np.asarray(references)) ** 2))}


class Pearson(LocalMetric):
    """Pearson's correlation of predictions and labels, in [-1, 1]; NaN where either is constant."""

    takes: ClassVar[tuple[Form, ...]] = _NUMBERS

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"pearson": _correlation(np.asarray(predictions), np.asarray(references))}


class Spearman(LocalMetric):
    """Correlation of the ranks of predictions and labels, in [-1, 1]; equal values share their mean rank."""

    takes: ClassVar[tuple[Form, ...]] = _NUMBERS

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"spearman": _correlation(_ranks(predictions), _ranks(references))}


class Cosine(LocalMetric):
    """Mean cosine similarity of each vector to its reference, in [-1, 1]."""

    takes: ClassVar[tuple[Form, ...]] = ("vectors",)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        one, other = np.asarray(predictions, float), np.asarray(references, float)
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        return {"cosine": float(np.mean((one * other).sum(axis=1) / np.maximum(lengths, 1e-12)))}


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    spread = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / spread) if spread else float("nan")


def _ranks(values: Any) -> np.ndarray:
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
