"""The tasks that recipes can name."""

from __future__ import annotations

from hfcompress.tasks.base import Task, batches
from hfcompress.tasks.causal_lm import CausalLM
from hfcompress.tasks.sequence_classification import SequenceClassification

TASKS: dict[str, Task] = {task.name: task for task in (CausalLM(), SequenceClassification())}

__all__ = ["TASKS", "Task", "batches"]
