"""Task metrics by name; a new one is a class and a line here."""

from __future__ import annotations

import os
import uuid

import evaluate

from hfcompress.errors import DataError, MissingDependencyError, did_you_mean
from hfcompress.evaluate.metrics.answers import AnswerF1, ExactMatch
from hfcompress.evaluate.metrics.base import Form, LocalMetric, Share
from hfcompress.evaluate.metrics.classes import F1, Accuracy, MacroF1
from hfcompress.evaluate.metrics.likelihood import Perplexity
from hfcompress.evaluate.metrics.numbers import MSE, Cosine, Pearson, Spearman
from hfcompress.evaluate.metrics.tags import EntityF1
from hfcompress.evaluate.metrics.texts import BLEU, Chrf, RougeL, SameText, Wer

__all__ = ["METRICS", "Form", "LocalMetric", "Share", "load_metric"]

METRICS: dict[str, type[LocalMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "macro_f1": MacroF1,
    "perplexity": Perplexity,
    "mse": MSE,
    "pearson": Pearson,
    "spearman": Spearman,
    "cosine": Cosine,
    "entity_f1": EntityF1,
    "exact_match": ExactMatch,
    "answer_f1": AnswerF1,
    "rouge_l": RougeL,
    "bleu": BLEU,
    "chrf": Chrf,
    "wer": Wer,
    "same_text": SameText,
}


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
