"""Teachers behind one interface: models in this process, and their answers on disk."""

from __future__ import annotations

from hfcompress.distillation.teachers.across import AcrossTokenizers
from hfcompress.distillation.teachers.base import Answer, Teacher
from hfcompress.distillation.teachers.cache import (
    INDEX,
    CacheReport,
    cache_teacher,
    is_cache,
    refuse_k,
    refuse_other_files,
)
from hfcompress.distillation.teachers.cached import CachedTeacher
from hfcompress.distillation.teachers.live import LiveTeacher, forward_arguments

__all__ = [
    "INDEX",
    "AcrossTokenizers",
    "Answer",
    "CacheReport",
    "CachedTeacher",
    "LiveTeacher",
    "Teacher",
    "cache_teacher",
    "forward_arguments",
    "is_cache",
    "refuse_k",
    "refuse_other_files",
]
