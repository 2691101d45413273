"""A Trainer whose student learns from a teacher's logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hfcompress.distillation.config import DistillationConfig
from hfcompress.distillation.losses import forward_kl
from hfcompress.distillation.pairs import label_names, refuse_other_labels, refuse_other_size
from hfcompress.errors import ModelError

IGNORED = -100


class DistillationTrainer(Trainer):
    """Train ``model`` on its task and on the logits of ``teacher_model`` (Hinton et al., arXiv 1503.02531).

    The teacher runs in evaluation mode without gradients, in its own dtype and on its own device, and is not part of
    the student's checkpoints.  Every loss is a sum over the tokens (or rows) that have a label, divided by their
    number in the whole optimizer step, so gradients do not depend on how a batch is split.  ``eval_loss`` is the task
    loss; the two terms are logged as ``kd_loss`` and ``task_loss``.
    Raises ModelError before the first step for a pair of models that cannot be compared.
    """

    args: DistillationConfig
    # compute_loss divides by the items of the whole accumulated batch itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: DistillationConfig | None = None,
        *,
        teacher_model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = DistillationConfig(output_dir="trainer_output")
        if not isinstance(args, DistillationConfig):
            raise ModelError(f"DistillationTrainer takes a DistillationConfig as args, not a {type(args).__name__}.")
        if args.use_liger_kernel:
            raise ModelError("use_liger_kernel leaves no logits to distil from; turn it off for distillation.")
        # The Trainer's own constructor reads the columns that either model takes.
        self.teacher_model = teacher_model
        super().__init__(model=model, args=args, **kwargs)
        assert isinstance(self.model, nn.Module)
        _refuse_mismatch(self.model, teacher_model)
        self._shifts = type(self.accelerator.unwrap_model(self.model)).__name__ in (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        )
        teacher_model.requires_grad_(False)
        teacher_model.eval()
        if getattr(teacher_model, "hf_device_map", None) is None and not getattr(teacher_model, "is_quantized", False):
            nn.Module.to(teacher_model, self.args.device)
        self._terms: dict[str, Tensor] = {}
        self._terms_steps = 0

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = sorted(  # type: ignore[assignment]
            {*(self._signature_columns or []), *self._teacher_only_columns()}
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect one optimizer step's batches and count their labelled items over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._terms_steps += 1
        items = torch.tensor(sum(int(self._has_label(batch).sum()) for batch in batches), device=device)
        return batches, self.accelerator.gather(items).sum().clamp_min(1)

    def _has_label(self, inputs: dict[str, Tensor]) -> Tensor:
        """Mark the logits that count: (rows,) for one label a row, else (rows, tokens); shifted for causal LMs."""
        if "labels" not in inputs:
            raise ModelError(f"The batches hold no 'labels', only {', '.join(inputs)}; distillation needs them.")
        labels = inputs["labels"]
        return (labels[..., 1:] if self._shifts else labels) != IGNORED

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return ``alpha * KD + (1 - alpha) * task loss`` in training, the task loss alone in evaluation."""
        for_student = self._for_student(inputs)
        if not model.training:
            return super().compute_loss(model, for_student, return_outputs)
        counted = self._has_label(inputs)
        # A mean over this micro-batch whatever the head does, then weighted by its share of the whole step.
        task_mean, outputs = super().compute_loss(model, for_student, return_outputs=True)
        # The mean over no labels is 0 / 0.
        task_mean = torch.where(counted.any(), task_mean, 0)
        items = num_items_in_batch if num_items_in_batch is not None else counted.sum()
        # DDP averages gradients over processes, and items are counted over all of them.
        scale = self.accelerator.num_processes / items
        task_loss = task_mean * (counted.sum() * scale)
        kd_loss = self._kd_sum(outputs["logits"], inputs, counted) * scale
        self._add_terms(kd_loss=kd_loss, task_loss=task_loss)
        loss = self.args.alpha * kd_loss + (1 - self.args.alpha) * task_loss
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Evaluate the student on its own columns, as the plain Trainer does."""
        return super().prediction_step(model, self._for_student(inputs), prediction_loss_only, ignore_keys)

    def _for_student(self, inputs: dict[str, Any]) -> dict[str, Any]:
        teacher_only = self._teacher_only_columns()
        return {name: value for name, value in inputs.items() if name not in teacher_only}

    def _teacher_only_columns(self) -> set[str]:
        """Return the input columns that the teacher takes and the student does not."""
        assert isinstance(self.model, nn.Module)
        return _parameters(self.teacher_model) - _parameters(self.model)

    def _kd_sum(self, student_logits: Tensor, inputs: dict[str, Any], counted: Tensor) -> Tensor:
        teacher_device = self.teacher_model.device
        accepted = _parameters(self.teacher_model)
        # An encoder-decoder makes its decoder's inputs from the labels; nobody else needs the teacher's task loss.
        if not self.teacher_model.config.is_encoder_decoder or "decoder_input_ids" in inputs:
            accepted = accepted - {"labels"}
        moved = {k: v.to(teacher_device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k in accepted}
        with torch.no_grad():
            teacher_logits = self.teacher_model(**moved)["logits"]
        if self._shifts:
            student_logits, teacher_logits = student_logits[:, :-1], teacher_logits[:, :-1]
        return forward_kl(
            student_logits[counted],
            teacher_logits[counted.to(teacher_device)].to(student_logits.device),
            self.args.temperature,
        )

    def _add_terms(self, **terms: Tensor) -> None:
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, torch.zeros_like(value.detach())) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the mean of each loss term since the last time."""
        if "loss" in logs and self._terms_steps:
            for name, total in self._terms.items():
                logs[name] = float(self.accelerator.gather(total.reshape(1)).mean()) / self._terms_steps
            self._terms, self._terms_steps = {}, 0
        super().log(logs, start_time)


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _refuse_mismatch(student: Any, teacher: Any) -> None:
    """Refuse a pair whose logits do not mean the same classes."""
    for model, role in ((student, "model"), (teacher, "teacher_model")):
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"{role} must be a transformers PreTrainedModel, not a {type(model).__name__}.")
        problem = getattr(model.config, "problem_type", None) or ("regression" if _classes(model) == 1 else None)
        if problem in ("regression", "multi_label_classification"):
            raise ModelError(
                f"{role} is a {problem} model; the KL of its logits means nothing. Classify or model text."
            )
    refuse_other_size(_classes(student), _classes(teacher))
    if student.get_output_embeddings() is None:
        refuse_other_labels(label_names(student.config), label_names(teacher.config))


def _classes(model: Any) -> int:
    head = model.get_output_embeddings()
    if head is not None:
        return int(head.weight.shape[0])
    return int(model.config.num_labels)
