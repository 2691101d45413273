"""A Trainer whose student learns from a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import IntervalStrategy, PreTrainedModel

from hfcompress.distillation.checks import check_pair, check_run, check_sharding, losses_of, teachers_of
from hfcompress.distillation.config import DistillationConfig
from hfcompress.distillation.crossing import crossing_loss, reading_texts
from hfcompress.distillation.head import run_for_logits
from hfcompress.distillation.logged import LoggedTerms, last_terms
from hfcompress.distillation.losses import FeatureLoss, named
from hfcompress.distillation.losses.taps import tapped
from hfcompress.distillation.matching import FeatureMatcher
from hfcompress.distillation.on_policy import OnPolicy, write_completions
from hfcompress.distillation.pairs import tokenizer_of
from hfcompress.distillation.projections import ProjectionTrainer
from hfcompress.distillation.rows import refuse_rows
from hfcompress.distillation.teachers import AcrossTokenizers, Answer, LiveTeacher, forward_arguments
from hfcompress.distillation.terms import LogitTerms, takes_logits, takes_own_task_loss
from hfcompress.distillation.tokens import real_tokens
from hfcompress.outputs import refuse_other_places, require_columns, row_count
from hfcompress.outputs.trainer import PerItemTrainer
from hfcompress.publish.mixin import ModelCardMixin
from hfcompress.publish.reporters import draw_losses_over_steps, send_picture, show_in_notebook


class DistillationTrainer(ModelCardMixin, ProjectionTrainer, PerItemTrainer):
    """Train ``model`` on its task and on what ``teacher_model`` answers (Hinton et al., arXiv 1503.02531).

    A teacher runs in evaluation mode without gradients, in its own dtype and on its own device, and is not part of
    the student's checkpoints.  Losses of logits are sums over the answers that have a label, divided by their number
    in the whole optimizer step; losses of features are means over a row's tokens and then over the step's rows.  So
    gradients do not depend on how a batch is split, and padding never counts.  ``eval_loss`` is the task loss; the two
    terms are logged as ``kd_loss`` and ``task_loss``, and each of several losses by its name.  A model without a head
    has no task loss, and ``alpha`` counts as 1.

    teacher_model: a model, a cache that ``cache_teacher`` wrote (its folder), or a list of models.
    teacher_weights: shares of several teachers; equal unless given.
    teacher_processing_class: the teacher's tokenizer, refused unless it is the student's, which it shows where
    vocabularies differ in size; or, with ``losses=["universal_logit"]``, one of its own, and of several teachers a
    list.
    Raises ModelError before the first step for models that cannot be compared.
    """

    args: DistillationConfig

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
        self.teachers = teachers_of(teacher_model, teacher_weights, model)
        if (crossing := crossing_loss(named(args.chosen))) is not None:
            self.teachers = reading_texts(
                crossing, self.teachers, kwargs.get("processing_class"), teacher_processing_class
            )
        super().__init__(model=model, args=args, **kwargs)
        self.sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        check_sharding(args, self.sharded)
        self._bind()
        for teacher, _ in self.teachers:
            teacher.place_on(self.args.device)
        self._logged = LoggedTerms()
        self._written = False  # the student wrote the texts of this step

    def _bind(self) -> None:
        """Find out how the student and its teachers compare; again for each model that ``model_init`` makes."""
        self.args.check()
        student = self._student
        self.kind = self._kind()
        self.shared_classes = check_pair(
            student,
            self.kind,
            self.teachers,
            self.args,
            *(tokenizer_of(one) for one in (self.processing_class, self.teacher_processing_class)),
        )
        self.alpha = self.args.alpha if self.kind.label_columns else 1.0
        self.own_task_loss = takes_own_task_loss(self, self.kind)
        self.takes_logits = self.own_task_loss and not self.sharded and takes_logits(self.args, student)
        self.logit_losses = losses_of(self.args, self.kind, self.teachers)
        features = {name: loss for name, loss in named(self.args.chosen).items() if isinstance(loss, FeatureLoss)}
        self.matcher: FeatureMatcher | None = None
        if features:
            first = self.teachers[0][0]
            assert isinstance(first, LiveTeacher)
            self.matcher = FeatureMatcher(features, student, first.model, self.args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer; what an earlier training has not logged is none of this one's."""
        self._logged = LoggedTerms()
        return super().create_optimizer(model)

    @property
    def _student(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = sorted(  # type: ignore[assignment]
            {*(self._signature_columns or []), *self._teacher_only_columns()}
        )

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's batches; data that nothing can be learned from are refused before the first."""
        loader: Any = super().get_train_dataloader()
        if hasattr(loader.dataset, "__len__"):
            refuse_rows(
                loader.dataset, loader.collate_fn, self._student, self.kind, self.teachers, self.args.on_policy
            )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect one optimizer step's batches and count what their losses are means of, over all processes."""
        self.zero_projections()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._logged.steps += bool(batches)  # none: a stream of unknown length ended with the step before
        options, step = self.args.on_policy, self.state.global_step
        self._written = False
        if isinstance(options, OnPolicy) and batches and options.is_due(self.args.seed, step):
            self._written = True
            self._logged.written += 1
            place = self.args.seed, step, self.args.process_index
            batches = [
                write_completions(self._student, batch, options, self.args.device, *place, index)
                for index, batch in enumerate(batches)
            ]
            self.count_step(batches, device)
            items = self.counts.get("items")
        return batches, items

    def counted_in(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Return how much of a batch the losses are means of: labelled items, compared places, rows."""
        if self.alpha == 1:
            require_columns(self.kind, batch, "training (with alpha=1 too: they say which places count)")
        found = super().counted_in(batch)
        found |= {
            f"places of teacher {index}": teacher.comparable(batch, self.kind)
            for index, (teacher, _) in enumerate(self.teachers)
            if isinstance(teacher, AcrossTokenizers)
        }
        return {**found, "places": int(self.kind.compared(batch).sum()), "rows": row_count(batch)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return ``alpha * KD + (1 - alpha) * task loss`` in training, the task loss alone in evaluation.

        Tokens that the student wrote itself are no labels of the task: there it is ``alpha * KD``.
        """
        for_student = self._for_student(inputs)
        if not model.training:
            return super().compute_loss(model, for_student, return_outputs)
        if num_items_in_batch is None:
            self.count_step([inputs], self.args.device)
        taps = self.matcher.student_taps if self.matcher else []
        with tapped(self._student, taps) as features:
            task_mean, outputs = self._forward(model, for_student)
        own = {tap: features[tap] for tap in taps}
        compared = self.kind.compared(inputs)
        rows = compared.reshape(-1).nonzero().squeeze(-1)
        told = [
            (teacher.answer(inputs, self.kind, rows, self.matcher.teacher_taps if self.matcher else ()), weight)
            for teacher, weight in self.teachers
        ]
        loss, kd, task = self._logit_loss(outputs, inputs, compared, rows, told)
        loss, kd, task = (self.scale("places") * one for one in (loss, kd, task))
        if task_mean is not None and not self._written:
            task = self.task_sum(task_mean, inputs) * self.scale("items")
            # Not 0 times it: a task loss may be infinite.
            loss = loss + (1 - self.alpha) * task if self.alpha < 1 else loss
        if self.matcher is not None:
            more = self.scale("rows") * self._feature_loss(own, told[0][0], inputs)
            loss, kd = loss + self.alpha * more, kd + more
        self._logged.add(kd_loss=kd, **({} if self._written else {"task_loss": task}))
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, Any]:
        """Return the batch's mean task loss, unless there is none or the logits give it, and the student's outputs."""
        if not self.own_task_loss and self.kind.label_columns:
            return self.task_mean(model, inputs)
        unlabelled = {name: value for name, value in inputs.items() if name not in self.kind.label_columns}
        if self.takes_logits:
            return None, run_for_logits(model, self._student, unlabelled)
        return None, model(**unlabelled)

    def _logit_loss(
        self, outputs: Any, inputs: dict[str, Any], compared: Tensor, rows: Tensor, told: list[tuple[Answer, float]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums over the compared places: what the logits add to the loss, KD of it, and the task loss."""
        zero = torch.zeros((), device=self.args.device)
        if not self.logit_losses and not self.own_task_loss:
            return zero, zero, zero
        logits = self.kind.logits(outputs, inputs)
        refuse_other_places(compared, logits.shape[:-1])
        terms = LogitTerms(logits, rows, self.shared_classes, self._progress)
        for index, (answer, share) in enumerate(told):
            if (own := self.counts.get(f"places of teacher {index}")) is not None:
                share *= float(self.counts["places"] / own)  # a mean over the places that this teacher knows
            terms.add_teacher(answer, self.logit_losses, share, self.alpha)
        if self.own_task_loss and not self._written:
            terms.add_task(self.kind.labels(inputs).reshape(-1)[rows], 1 - self.alpha)
        total, by_name = terms.sums()
        if len(self.logit_losses) + (self.matcher is not None) > 1:
            for name in self.logit_losses:
                self._logged.add(**{name: by_name[name] * self.scale("places")})
        return total, terms.weighted_kd(by_name), by_name.get("task", zero)

    def _feature_loss(self, own: Any, answer: Answer, inputs: dict[str, Any]) -> Tensor:
        """Return the weighted sum over the batch's rows of all losses of features."""
        assert self.matcher is not None

        def counted(features: Tensor, decoder: bool) -> Tensor:
            return real_tokens(self._student, inputs, features, decoder, self.kind)

        total = torch.zeros((), device=self.args.device)
        for name, loss in self.matcher.row_losses(own, answer.features, counted).items():
            share = loss.sum() * row_count(inputs) / len(loss)  # rows of several choices are one row
            total = total + self.matcher.losses[name].weight_at(self._progress) * share
            self._logged.add(**{name: share * self.scale("rows")})
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
        **generation: Any,
    ) -> Any:
        """Evaluate the student on its own columns, as the plain Trainer does."""
        own = self._for_student(inputs)
        return super().prediction_step(model, own, prediction_loss_only, ignore_keys, **generation)

    def _for_student(self, inputs: dict[str, Any]) -> dict[str, Any]:
        teacher_only = self._teacher_only_columns()
        return {name: value for name, value in inputs.items() if name not in teacher_only}

    def _teacher_only_columns(self) -> set[str]:
        """Return the input columns that a teacher takes and the student does not."""
        assert isinstance(self.model, nn.Module)
        return set().union(*(teacher.columns for teacher, _ in self.teachers)) - forward_arguments(self._student)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the mean of each loss term since the last time."""
        if "loss" in logs and self._logged.steps:
            logs |= self._logged.means(self.accelerator.gather)
            if self.args.on_policy is not None:
                logs["on_policy"] = self._logged.written / self._logged.steps
            self._logged = LoggedTerms()
        by = self.args.eval_strategy
        # A notebook's table gets a line with every evaluation; where there is none, with every log.
        if "eval_loss" in logs or ("loss" in logs and by == IntervalStrategy.NO):
            show_in_notebook(
                self.callback_handler.callbacks, last_terms([*self.state.log_history, logs], self._terms),
                int(self.state.epoch or 0) if by == IntervalStrategy.EPOCH else self.state.global_step,
            )  # fmt: skip
        super().log(logs, start_time)
        if "eval_loss" in logs or "train_runtime" in logs:
            self._send_losses()

    @property
    def _terms(self) -> list[str]:
        return ["kd_loss", "task_loss", *named(self.args.chosen)]

    def _send_losses(self) -> None:
        """Give reporting callbacks the picture of the losses so far; once for a step, and none before the first."""
        *earlier, _ = history = self.state.log_history
        drawn = any("eval_loss" in logs and logs["step"] == self.state.global_step for logs in earlier)
        terms = last_terms(history, self._terms)
        if terms and not drawn and self.is_world_process_zero():
            draw = partial(draw_losses_over_steps, history, ["loss", *terms])
            send_picture(self.callback_handler.callbacks, "distillation_losses", self.state.global_step, draw)
