"""Knowledge distillation on the Trainer."""

from __future__ import annotations

from hfcompress.distillation.config import DistillationConfig
from hfcompress.distillation.students import make_student
from hfcompress.distillation.teachers import CachedTeacher, cache_teacher
from hfcompress.distillation.trainer import DistillationTrainer

__all__ = ["CachedTeacher", "DistillationConfig", "DistillationTrainer", "cache_teacher", "make_student"]
