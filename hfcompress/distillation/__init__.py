"""Knowledge distillation on the Trainer."""

from __future__ import annotations

from hfcompress.distillation.config import DistillationConfig
from hfcompress.distillation.on_policy import OnPolicy
from hfcompress.distillation.seq2seq import Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer
from hfcompress.distillation.students import make_student
from hfcompress.distillation.teachers import CachedTeacher, cache_teacher
from hfcompress.distillation.trainer import DistillationTrainer

__all__ = [
    "CachedTeacher",
    "DistillationConfig",
    "DistillationTrainer",
    "OnPolicy",
    "Seq2SeqDistillationConfig",
    "Seq2SeqDistillationTrainer",
    "cache_teacher",
    "make_student",
]
