"""How likely a model finds the labels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from hfcompress.errors import DataError
from hfcompress.evaluate.metrics.base import Form, LocalMetric


class Perplexity(LocalMetric):
    """exp of the mean negative log-likelihood (natural logarithm) of a token, over all tokens of all rows."""

    takes: ClassVar[tuple[Form, ...]] = ("likelihood",)

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
