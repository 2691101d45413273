"""Tiny students, teachers, rows and trainers that the tests of distillation share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForTokenClassification, PreTrainedModel, TrainerCallback

from hfcompress.distillation import DistillationConfig, DistillationTrainer
from tests.conftest import VOCABULARY_SIZE, tiny_bert, tiny_llama

Rows = list[dict[str, Tensor]]
TEMPERATURE, ALPHA = 1.7, 0.3


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return spread(tiny_llama(seed=seed, **{"hidden_size": 32, "intermediate_size": 64, **changes}), seed)


def bert(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return spread(tiny_bert(seed=seed, **{"num_labels": 3, **changes}), seed)


def token_classifier(seed: int = 0) -> PreTrainedModel:
    config = tiny_bert(num_labels=3).config
    torch.manual_seed(seed)
    return spread(BertForTokenClassification(config), seed)


def bert_of_unscaled_loss(seed: int = 0) -> PreTrainedModel:
    """A model for whose loss the Trainer would divide by the accumulation steps itself."""
    model = bert(seed)
    model.accepts_loss_kwargs = False
    return model


def spread(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Add noise, so that predictions are far from uniform and teachers far from students."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text_rows(count: int = 16, length: int = 8) -> Rows:
    """Rows whose numbers of labels and of padding tokens differ; the second row in eight has no label at all."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(6, VOCABULARY_SIZE, (length,), generator=generator)
        attention, labels = torch.ones_like(ids), ids.clone()
        labels[: index * 3 % (length - 1)] = -100
        padding = index % 3
        if padding:
            ids[-padding:], attention[-padding:], labels[-padding:] = 0, 0, -100
        if index % 8 == 1:
            labels[:] = -100
        rows.append({"input_ids": ids, "attention_mask": attention, "labels": labels})
    return rows


def class_rows(count: int = 16, length: int = 8) -> Rows:
    return [{**row, "labels": row["input_ids"].sum() % 3} for row in text_rows(count, length)]


def token_rows(count: int) -> Rows:
    """Rows for ``token_classifier``; they are not shifted, so the first position may have a label, too."""
    kept = [row["labels"] == -100 for row in text_rows(count)]
    return [{**r, "labels": r["labels"].where(ignored, r["labels"] % 3)} for r, ignored in zip(text_rows(count), kept)]


def rows_for(model: PreTrainedModel) -> Rows:
    return text_rows() if "Llama" in type(model).__name__ else class_rows()


def stack(rows: Rows) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def distiller(
    student: PreTrainedModel | None, teacher: Any, folder: Path, rows: Any = None, **options: Any
) -> DistillationTrainer:
    others = (
        "callbacks", "compute_metrics", "data_collator", "model_init", "teacher_weights", "processing_class",
        "teacher_processing_class",
    )  # fmt: skip
    extra = {name: options.pop(name) for name in others if name in options}
    defaults = {
        "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "temperature": TEMPERATURE, "alpha": ALPHA,
    }  # fmt: skip
    rows = rows_for(student) if rows is None else rows
    return DistillationTrainer(
        model=student,
        args=DistillationConfig(folder, **{**defaults, **options}),
        teacher_model=teacher,
        train_dataset=rows,
        eval_dataset=rows,
        **extra,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step
