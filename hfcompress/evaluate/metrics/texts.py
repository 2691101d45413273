"""Metrics of generated texts against one reference each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from hfcompress.errors import DataError, MissingDependencyError
from hfcompress.evaluate.metrics.base import Form, LocalMetric, Share

_TEXTS: tuple[Form, ...] = ("texts",)
_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


class RougeL(LocalMetric):
    """ROUGE-L: mean F1 of the longest common subsequence of words, in [0, 1] (Lin, 2004, W04-1013).

    Words are runs of letters a-z and digits in lower case, as in the reference implementation without its stemmer.
    """

    takes: ClassVar[tuple[Form, ...]] = _TEXTS

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        scores = [_rouge_l(_rouge_words(one), _rouge_words(other)) for one, other in zip(predictions, references)]
        return {"rouge_l": sum(scores) / len(scores)}


class Wer(LocalMetric):
    """Words to change, insert or delete for each word of the references; 0 is best, and it can exceed 1."""

    takes: ClassVar[tuple[Form, ...]] = _TEXTS

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pairs = [(one.split(), other.split()) for one, other in zip(predictions, references)]
        words = sum(len(wanted) for _, wanted in pairs)
        if words == 0:
            raise DataError("The word error rate needs references with words; all of them are empty.")
        return {"wer": sum(edit_distance(found, wanted) for found, wanted in pairs) / words}


class SameText(Share):
    """Share of the texts that are the reference, character for character."""

    takes: ClassVar[tuple[Form, ...]] = _TEXTS


class _SacreBLEU(LocalMetric):
    """A score of the package sacrebleu over the whole corpus, from 0 to 100."""

    takes: ClassVar[tuple[Form, ...]] = _TEXTS

    def _score(self, function: str, predictions: Any, references: Any) -> float:
        try:
            import sacrebleu
        except ImportError as error:
            raise MissingDependencyError(
                f"Metric '{self.name}' needs sacrebleu: pip install 'hfcompress[metrics]'"
            ) from error
        return float(getattr(sacrebleu, function)(list(predictions), [list(references)]).score)


class BLEU(_SacreBLEU):
    """BLEU of the corpus from 0 to 100, as sacrebleu computes it (tokenizer 13a; Post, arXiv 1804.08771)."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"bleu": self._score("corpus_bleu", predictions, references)}


class Chrf(_SacreBLEU):
    """chrF of the corpus from 0 to 100, as sacrebleu computes it (Popovic, W15-3049)."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"chrf": self._score("corpus_chrf", predictions, references)}


def _rouge_words(text: str) -> list[str]:
    return [word for word in _NOT_ALPHANUMERIC.split(text.lower()) if word]


def _rouge_l(found: Sequence[str], wanted: Sequence[str]) -> float:
    if not found or not wanted:
        return 0.0
    above = [0] * (len(wanted) + 1)
    for word in found:
        row = [0]
        for place, other in enumerate(wanted):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
        above = row
    return 2 * above[-1] / (len(found) + len(wanted))


def edit_distance(found: Sequence[str], wanted: Sequence[str]) -> int:
    """Return how many words must be changed, inserted or deleted to get from one to the other (Levenshtein)."""
    above = list(range(len(wanted) + 1))
    for count, word in enumerate(found, start=1):
        row = [count]
        for place, other in enumerate(wanted):
            row.append(min(above[place] + (word != other), above[place + 1] + 1, row[place] + 1))
        above = row
    return above[-1]
