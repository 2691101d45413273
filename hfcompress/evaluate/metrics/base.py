"""What a metric is here: a local ``evaluate.Metric``, so that measuring a model needs no network."""

from __future__ import annotations

import os
import uuid
from typing import Any, ClassVar, Literal

import datasets
import evaluate

Form = Literal["classes", "decisions", "likelihood", "numbers", "tags", "answers", "texts", "vectors"]
# What stands in predictions and references of each form; `likelihood` has columns of its own.
_FEATURES: dict[Form, Any] = {
    "classes": datasets.Value("int64"),
    "decisions": datasets.Value("int64"),
    "numbers": datasets.Value("float64"),
    "tags": [datasets.Value("string")],
    "texts": datasets.Value("string"),
    "vectors": [datasets.Value("float64")],
}


class LocalMetric(evaluate.Metric):
    """A metric that keeps its examples in memory and writes nothing to disk.

    takes: the forms in which it takes predictions and references.
    """

    takes: ClassVar[tuple[Form, ...]] = ("classes",)

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": True, "experiment_id": uuid.uuid4().hex, **options})

    def _build_data_dir(self) -> str:
        # The base class makes this folder at once, which fails in a read-only home; nothing is ever put there.
        return os.path.join(self._data_dir_root, self.name, self.config_name)

    def _info(self) -> evaluate.MetricInfo:
        feature = _FEATURES[self.takes[0]]
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").strip().splitlines()[0],
            citation="",
            inputs_description=f"predictions and references: {self.takes[0]}, one for each example.",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )


class Share(LocalMetric):
    """A metric that is the share of the examples that are answered rightly, in [0, 1]."""

    def is_right(self, prediction: Any, reference: Any) -> bool:
        """Tell whether one example is."""
        return bool(prediction == reference)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        hits = [self.is_right(one, other) for one, other in zip(predictions, references)]
        return {self.name: sum(hits) / len(hits)}
