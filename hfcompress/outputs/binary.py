"""Any number of classes for each row: multi-label classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfcompress.outputs.base import Batch, Outputs, label_names, logits_in


class Binary(Outputs):
    """A yes or no for each label of each row; the model's own loss is the mean over all of them.

    A logit z stands for the two logits (0, z), whose softmax is the sigmoid of z. So every loss and every metric for
    classes serves here too, and a KL at a temperature is that of the two outcomes.
    """

    what: ClassVar[str] = "a yes or no for each label"

    def labels(self, batch: Batch) -> Tensor:
        """Return (rows, labels) of 0 and 1."""
        return batch["labels"].long()

    def logits(self, output: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return (rows, labels, 2): no, yes."""
        yes = logits_in(output)
        return torch.stack((torch.zeros_like(yes), yes), dim=-1)

    def size(self, model: Any) -> int:
        """Return 2: no and yes."""
        return 2

    def class_names(self, model: Any) -> list[str] | None:
        """Return the names of the labels."""
        return label_names(model.config)
