"""The arguments of a distillation run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hfcompress.errors import HFCompressError


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments with the distillation's own options.

    The loss is ``alpha * KD + (1 - alpha) * task loss``; KD is the forward KL at ``temperature``, times its square.
    """

    temperature: float = field(default=2.0, metadata={"help": "Softens both distributions; above 0."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of the distillation term, from 0 to 1."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise HFCompressError(f"temperature={self.temperature} must be above 0 and finite.")
        if not 0 <= self.alpha <= 1:
            raise HFCompressError(f"alpha={self.alpha} must lie between 0 and 1.")
