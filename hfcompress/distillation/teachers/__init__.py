"""Teachers behind one interface: models in this process, and their answers on disk."""

from __future__ import annotations

from hfcompress.distillation.teachers.base import Answer, Teacher
from hfcompress.distillation.teachers.live import LiveTeacher, forward_arguments

__all__ = ["Answer", "LiveTeacher", "Teacher", "forward_arguments"]
