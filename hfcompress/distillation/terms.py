"""Everything that is computed from a batch's logits: distillation losses and a language model's task loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hfcompress.distillation.head import head_gives_logits
from hfcompress.distillation.losses import LogitLoss
from hfcompress.distillation.losses.cross_entropy import cross_entropy
from hfcompress.distillation.teachers import Answer
from hfcompress.errors import ModelError
from hfcompress.logits.chunks import Term, sum_over_rows
from hfcompress.outputs import NextTokens, Outputs


class LogitTerms:
    """Gathers the terms of one batch, to sum them in one pass over the logits.

    logits: (..., classes).  rows: flat indices of the places that count.  shared: how many classes student and
    teacher have in common, None for all.  progress: share of the training that is done.
    """

    def __init__(self, logits: Tensor, rows: Tensor, shared: int | None, progress: float) -> None:
        self.shape = tuple(logits.shape[:-1])
        self.logits = logits.reshape(-1, logits.shape[-1])
        self.rows = rows.to(logits.device)
        self.shared = shared or logits.shape[-1]
        self.progress = progress
        self.terms: list[tuple[str, float, float, Term]] = []  # name, weight in the sum, share of the name, function
        self.weights: dict[str, float] = {}  # of the losses in KD

    def add_teacher(self, answer: Answer, losses: Mapping[str, LogitLoss], share: float, alpha: float) -> None:
        """Add every loss towards one teacher.  Raises ModelError when it answers at other places or classes."""
        if answer.shape is not None and answer.shape != self.shape:
            raise ModelError(
                f"The teacher answers at places {answer.shape} and the student at {self.shape}; their logits cannot "
                "be compared one by one."
            )
        if isinstance(answer.targets, Tensor) and answer.targets.shape[-1] < self.shared:
            raise ModelError(f"The teacher has {answer.targets.shape[-1]} classes, but the student {self.shared}.")
        answer = answer.within(self.shared)
        for name, loss in losses.items():
            self.weights[name] = loss.weight_at(self.progress)
            self.terms.append((name, alpha * self.weights[name] * share, share, self._term(loss, answer)))

    def _term(self, loss: LogitLoss, answer: Answer) -> Term:
        classes, extra = self.shared, self.logits.shape[-1] - self.shared

        def term(student: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            value, slope = loss.rows(student[:, :classes], answer.part(part, classes, student))
            return value, F.pad(slope, (0, extra)) if extra else slope

        return term

    def add_task(self, labels: Tensor, weight: float) -> None:
        """Add the cross-entropy with the labels of the places that count, (places that count,)."""
        labels = labels.to(self.logits.device)
        self.terms.append(("task", weight, 1.0, lambda student, part: cross_entropy(student, labels[part])))

    def sums(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, with its gradient, and each term's own sum by name."""
        weights, terms = [one[1] for one in self.terms], [one[3] for one in self.terms]
        total, sums = sum_over_rows(self.logits, self.rows, weights, terms)
        by_name: dict[str, Tensor] = {}
        for (name, _, share, _), value in zip(self.terms, sums):
            by_name[name] = by_name.get(name, torch.zeros_like(value)) + share * value
        return total, by_name

    def weighted_kd(self, by_name: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of all distillation losses, each times its weight."""
        zero = torch.zeros((), device=self.logits.device)
        return sum((weight * by_name[name] for name, weight in self.weights.items()), zero)


def takes_own_task_loss(trainer: Trainer, kind: Outputs) -> bool:
    """Tell whether the task loss is the cross-entropy of the next token and nothing more.

    Then it is made with the distillation losses, and the model makes no float32 copies of its logits for it.
    """
    student: Any = trainer.accelerator.unwrap_model(trainer.model)
    plain = LOSS_MAPPING.get(str(getattr(student, "loss_type", None))) is ForCausalLMLoss
    special = getattr(student, "_loss_function", None) is not None
    routed = getattr(student.config.get_text_config(), "output_router_logits", False)
    theirs = trainer.compute_loss_func is not None or trainer.label_smoother is not None
    return (
        isinstance(kind, NextTokens)
        and plain
        and trainer.model_accepts_loss_kwargs
        and not (special or routed or theirs)
    )


def takes_logits(args: TrainingArguments, student: Any) -> bool:
    """Tell whether the student's logits are taken from its head, see ``head``.

    Not in float16, whose small gradients the loss's scale must reach first; and the hook needs a model that runs
    layer by layer in one piece.
    """
    otherwise_run = args.torch_compile or args.fsdp or args.deepspeed
    return not (args.fp16 or otherwise_run) and head_gives_logits(student)
