"""Knowledge distillation on the Trainer."""

from __future__ import annotations

from hfcompress.distillation.config import DistillationConfig
from hfcompress.distillation.trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer"]
