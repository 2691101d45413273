"""Tiny training runs that tests of pruning share: models, rows, trainers and callbacks that watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.conftest import VOCABULARY_SIZE, tiny_llama

Rows = list[dict[str, Tensor]]


def small_llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return tiny_llama(seed=seed, **{"hidden_size": 32, "intermediate_size": 64, **changes})


def small_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        eos_token_id=5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return AutoModelForCausalLM.from_config(config)


def text_rows(count: int = 32, length: int = 8) -> Rows:
    """Rows for a causal LM whose numbers of labels differ."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(6, VOCABULARY_SIZE, (length,), generator=generator)
        labels = ids.clone()
        labels[: index % (length - 1)] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def class_rows(count: int = 32, length: int = 8) -> Rows:
    rows = text_rows(count, length)
    return [{**row, "labels": row["input_ids"].sum() % 2} for row in rows]


def trainer_for(
    model: PreTrainedModel, folder: Path, callbacks: list[Any], rows: Rows | None = None, **options: Any
) -> Trainer:
    extra = {
        name: options.pop(name) for name in ("optimizers", "compute_metrics", "compute_loss_func") if name in options
    }
    defaults = {
        "max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
        "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    if rows is None:
        rows = class_rows() if "Bert" in type(model).__name__ else text_rows()
    return Trainer(
        model=model,
        args=TrainingArguments(folder, **{**defaults, **options}),
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=callbacks,
        **extra,
    )


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices of the layers by name, found by name alone."""
    inside = (".layers.", ".encoder.layer.", ".h.")
    return {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and any(part in name for part in inside)
    }


def zeros_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in weights.items()}


def count_zeros(zeros: dict[str, Tensor]) -> int:
    return sum(int(one.sum()) for one in zeros.values())


def share_of(zeros: dict[str, Tensor]) -> float:
    return count_zeros(zeros) / sum(one.numel() for one in zeros.values())


def half_of(model: nn.Module) -> int:
    return sum(weight.numel() for weight in matrices(model).values()) // 2


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return every weight and every tensor of the optimizer's state."""
    found = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for index, values in trainer.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{kind}": value for kind, value in values.items() if isinstance(value, Tensor)}
    return found


class Watch(TrainerCallback):
    """Keep the zeros after every step and at every evaluation."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}
        self.evaluated: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = zeros_of(matrices(kwargs["model"]))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated[state.global_step] = zeros_of(matrices(kwargs["model"]))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


class MovesEverything(torch.optim.Optimizer):
    """Add noise to every weight, whatever its gradient, as optimizers that mix coordinates do."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(0.01 * torch.randn_like(weight))
