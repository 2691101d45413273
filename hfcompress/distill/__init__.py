"""Knowledge distillation on the Trainer."""

from __future__ import annotations

from hfcompress.distill.config import DistillationConfig
from hfcompress.distill.trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer"]
