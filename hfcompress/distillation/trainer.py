"""A Trainer whose student learns from a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hfcompress.distillation.answers import Answers, answers_of, real_tokens, rows_of
from hfcompress.distillation.checks import check_pair, check_run, logit_losses_of, teachers_of
from hfcompress.distillation.config import DistillationConfig
from hfcompress.distillation.losses import FeatureLoss, named
from hfcompress.distillation.losses.taps import tapped
from hfcompress.distillation.matching import FeatureMatcher
from hfcompress.distillation.projections import ProjectionTrainer
from hfcompress.distillation.teachers import Answer, CachedTeacher, LiveTeacher, forward_arguments
from hfcompress.distillation.terms import LogitTerms, takes_own_task_loss
from hfcompress.publish.trained import ModelCardMixin


class DistillationTrainer(ModelCardMixin, ProjectionTrainer, Trainer):
    """Train ``model`` on its task and on what ``teacher_model`` answers (Hinton et al., arXiv 1503.02531).

    A teacher runs in evaluation mode without gradients, in its own dtype and on its own device, and is not part of
    the student's checkpoints.  Losses of logits are sums over the answers that have a label, divided by their number
    in the whole optimizer step; losses of features are means over a row's tokens and then over the step's rows.  So
    gradients do not depend on how a batch is split, and padding never counts.  ``eval_loss`` is the task loss; the two
    terms are logged as ``kd_loss`` and ``task_loss``, and each of several losses by its name.

    teacher_model: a model, a cache that ``cache_teacher`` wrote (its folder), or a list of models.
    teacher_weights: shares of several teachers; equal unless given.
    teacher_processing_class: the teacher's tokenizer, to show that it is the student's where vocabularies differ in
    size.  Raises ModelError before the first step for models that cannot be compared.
    """

    args: DistillationConfig
    # compute_loss divides by the items of the whole accumulated batch itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: DistillationConfig | None = None,
        *,
        teacher_model: Any,
        teacher_weights: Sequence[float] | None = None,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = DistillationConfig(output_dir="trainer_output")
        check_run(args, kwargs)
        self.teacher_model = teacher_model
        self.teacher_processing_class = teacher_processing_class
        # The Trainer's own constructor reads the columns that either model takes.
        self.teachers = teachers_of(teacher_model, teacher_weights)
        super().__init__(model=model, args=args, **kwargs)
        self._bind()
        for teacher, _ in self.teachers:
            teacher.place_on(self.args.device)
        self._terms: dict[str, Tensor] = {}
        self._terms_steps = 0
        self._counts: dict[str, Tensor] = {}

    def _bind(self) -> None:
        """Find out how the student and its teachers compare; again for each model that ``model_init`` makes."""
        student = self._student
        self.shared_classes = check_pair(
            student, self.teachers, self.args, self.processing_class, self.teacher_processing_class
        )
        self.answers: Answers = answers_of(student)
        self.own_task_loss = takes_own_task_loss(self, student)
        self.logit_losses = logit_losses_of(self.args, student, self.teachers)
        features = {name: loss for name, loss in named(self.args.chosen).items() if isinstance(loss, FeatureLoss)}
        self.matcher: FeatureMatcher | None = None
        if features:
            first = self.teachers[0][0]
            assert isinstance(first, LiveTeacher)
            self.matcher = FeatureMatcher(features, student, first.model, self.args.seed)

    @property
    def _student(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = sorted(  # type: ignore[assignment]
            {*(self._signature_columns or []), *self._teacher_only_columns()}
        )

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's batches; a cache that was made from other data is refused before the first."""
        loader: Any = super().get_train_dataloader()
        caches = [teacher for teacher, _ in self.teachers if isinstance(teacher, CachedTeacher)]
        if caches and hasattr(loader.dataset, "__len__"):
            last = len(loader.dataset) - 1
            for row in sorted({0, last // 2, last}):
                batch = loader.collate_fn([loader.dataset[row]])
                for cache in caches:
                    cache.refuse_other_data(batch)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect one optimizer step's batches and count what their losses are means of, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._terms_steps += 1
        self.zero_projections()
        self._counts = self._count(batches, device)
        return batches, self._counts["answers"]

    def _count(self, batches: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Tensor]:
        counts = {
            "answers": sum(int(self.answers.counted(batch).sum()) for batch in batches),
            "task": sum(int(self.answers.task_items(batch)) for batch in batches),
            "rows": sum(rows_of(batch) for batch in batches),
        }
        local = torch.tensor([list(counts.values())], device=device)
        joint = self.accelerator.gather(local).sum(0).clamp_min(1)
        return dict(zip(counts, joint))

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
        if num_items_in_batch is None:
            self._counts = self._count([inputs], self.args.device)
        # DDP averages gradients over processes, and items are counted over all of them.
        scale = {name: self.accelerator.num_processes / count for name, count in self._counts.items()}
        taps = self.matcher.student_taps if self.matcher else []
        with tapped(self._student, taps) as features:
            task_mean, outputs = self._forward(model, for_student)
        own = {tap: features[tap] for tap in taps}
        rows = self.answers.counted(inputs).reshape(-1).nonzero().squeeze(-1)
        told = [
            (teacher.answer(inputs, self.answers, rows, self.matcher.teacher_taps if self.matcher else ()), weight)
            for teacher, weight in self.teachers
        ]
        loss, kd, task = self._logit_loss(outputs, inputs, rows, told)
        loss, kd, task = (scale["answers"] * one for one in (loss, kd, task))
        if task_mean is not None:
            # A mean over this micro-batch, weighted by its share of the step.  The mean over no labels is 0 / 0.
            weight = self.answers.task_weight(inputs) * scale["task"]
            task = torch.where(self.answers.counted(inputs).any(), task_mean, 0) * weight
            loss = loss + (1 - self.args.alpha) * task
        if self.matcher is not None:
            more = scale["rows"] * self._feature_loss(own, told[0][0], inputs)
            loss, kd = loss + self.args.alpha * more, kd + more
        self._add_terms(kd_loss=kd, task_loss=task)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, Any]:
        """Return the batch's mean task loss, unless it is made from the logits, and the student's outputs."""
        if self.own_task_loss or not self.answers.has_logits:
            return None, model(**{name: value for name, value in inputs.items() if name not in self.answers.labels})
        self.answers.require_labels(inputs)
        task_mean, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return task_mean, outputs

    def _logit_loss(
        self, outputs: Any, inputs: dict[str, Any], rows: Tensor, told: list[tuple[Answer, float]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums over the counted answers: what the logits add to the loss, KD of it, and the task loss."""
        zero = torch.zeros((), device=self.args.device)
        if not self.answers.has_logits:
            return zero, zero, zero
        logits = self.answers.logits(outputs, inputs)
        terms = LogitTerms(logits, rows, self.shared_classes, self._progress)
        for answer, share in told:
            terms.add_teacher(answer, self.logit_losses, share, self.args.alpha)
        if self.own_task_loss:
            labels = self.answers.targets(inputs["labels"]).reshape(-1)  # type: ignore[attr-defined]
            terms.add_task(labels[rows], 1 - self.args.alpha)
        total, by_name = terms.sums()
        if len(self.logit_losses) + (self.matcher is not None) > 1:
            for name in self.logit_losses:
                self._add_terms(**{name: by_name[name] * self.accelerator.num_processes / self._counts["answers"]})
        return total, terms.weighted_kd(by_name), by_name.get("task", zero)

    def _feature_loss(self, own: Any, answer: Answer, inputs: dict[str, Any]) -> Tensor:
        """Return the weighted sum over the batch's rows of all losses of features."""
        assert self.matcher is not None

        def counted(features: Tensor, decoder: bool) -> Tensor:
            return real_tokens(self._student, inputs, features, decoder, self.answers)

        total = torch.zeros((), device=self.args.device)
        for name, loss in self.matcher.row_losses(own, answer.features, counted).items():
            share = loss.sum() * rows_of(inputs) / len(loss)  # rows of several choices are one row
            total = total + self.matcher.losses[name].weight_at(self._progress) * share
            self._add_terms(**{name: share * self.accelerator.num_processes / self._counts["rows"]})
        return total

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps)

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
        """Return the input columns that a teacher takes and the student does not."""
        assert isinstance(self.model, nn.Module)
        return set().union(*(teacher.columns for teacher, _ in self.teachers)) - forward_arguments(self._student)

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
