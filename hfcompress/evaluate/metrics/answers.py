"""Metrics of extracted answers, as SQuAD defines them (Rajpurkar et al., arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any, ClassVar

import datasets
import evaluate

from hfcompress.evaluate.metrics.base import Form, LocalMetric, Share

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _Answers(LocalMetric):
    """A metric over answers: for each question the best score over its right answers; none is right as ``""``."""

    takes: ClassVar[tuple[Form, ...]] = ("answers",)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").splitlines()[0],
            citation="",
            inputs_description="predictions: a text for each question.  references: its right answers, maybe none.",
            features=datasets.Features({"predictions": text, "references": [text]}),
        )


class ExactMatch(_Answers, Share):
    """Share of the questions whose answer is a right one but for case, articles, punctuation and spaces."""

    def is_right(self, prediction: Any, reference: Any) -> bool:
        """Tell whether an answer is one of the right ones."""
        return any(_words(prediction) == _words(right) for right in (reference or [""]))


class AnswerF1(_Answers):
    """Mean F1 of the words that an answer shares with the nearest right one, in [0, 1]."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        best = [
            max(_word_f1(one, right) for right in (answers or [""])) for one, answers in zip(predictions, references)
        ]
        return {"answer_f1": float(sum(best) / len(best))}


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _word_f1(one: str, other: str) -> float:
    found, wanted = _words(one), _words(other)
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))
