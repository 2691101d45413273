"""Distillation losses: pure functions of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS_PER_CHUNK = 512


class _ForwardKL(torch.autograd.Function):
    """Sum of row-wise KL(teacher || student), whose gradient is made in the forward pass, chunk by chunk.

    Only one chunk of probabilities is ever held in float32, so a vocabulary of any size costs no more memory than
    the logits and their gradient in their own dtype.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        exact = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=student.device)
        gradient = torch.empty_like(student)
        for first in range(0, len(student), ROWS_PER_CHUNK):
            rows = slice(first, first + ROWS_PER_CHUNK)
            log_student = torch.log_softmax(student[rows].to(exact) / temperature, dim=-1)
            log_teacher = torch.log_softmax(teacher[rows].to(exact) / temperature, dim=-1)
            probabilities = log_teacher.exp()
            total += (probabilities * (log_teacher - log_student)).sum()
            gradient[rows] = (log_student.exp() - probabilities) / temperature
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the sum over rows of T^2 * KL(softmax(teacher / T) || softmax(student / T)).

    student, teacher: (rows, classes) logits.  The factor T^2 keeps the gradient's size independent of the temperature
    (Hinton et al., arXiv 1503.02531, section 2).  Natural logarithms; a scalar in float32 or better.
    """
    return temperature**2 * _ForwardKL.apply(student, teacher.detach(), temperature)
