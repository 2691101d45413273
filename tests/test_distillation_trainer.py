"""A DistillationTrainer is a Trainer: evaluation, prediction, smoothing, compiling, searching, resuming."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hfcompress.distillation import DistillationTrainer, cache_teacher
from hfcompress.errors import HFCompressError
from hfcompress.pruning import PruneCallback
from tests.distilling import (
    StopAt,
    bert,
    class_rows,
    distiller,
    equal,
    llama,
    rows_for,
    stack,
    text_rows,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("quick_trainers")


@pytest.mark.parametrize("make", [llama, bert])
def test_evaluation_is_the_plain_trainers(make: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    student = make()
    rows = rows_for(student)
    calls: list[int] = []
    teacher = make(seed=1)
    teacher.register_forward_hook(lambda *_: calls.append(1))
    plain = Trainer(
        student, TrainingArguments(tmp_path, use_cpu=True, report_to="none", disable_tqdm=True), eval_dataset=rows
    )
    metrics = {"compute_metrics": lambda prediction: {"mean": float(prediction.predictions.mean())}}
    ours = distiller(student, teacher, tmp_path, rows, **metrics)
    plain.compute_metrics = metrics["compute_metrics"]
    expected, found = plain.evaluate(), ours.evaluate()
    assert found["eval_loss"] == expected["eval_loss"]
    assert found["eval_mean"] == expected["eval_mean"]
    assert (ours.predict(rows).predictions == plain.predict(rows).predictions).all()
    assert not calls


def test_label_smoothing_smooths_the_task_loss(tmp_path: Path) -> None:
    student, teacher = bert(), bert(seed=1)
    rows = class_rows()[:8]
    batch = stack(rows)
    with torch.no_grad():
        logits = student.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    # the Trainer's own smoother: (1 - e) * NLL + e * mean over the classes
    log = F.log_softmax(logits, -1)
    expected = 0.8 * F.nll_loss(log, batch["labels"]) - 0.2 * log.mean()
    trainer = distiller(
        student, teacher, tmp_path, rows, label_smoothing_factor=0.2, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["task_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("teachers", ["kept answers", "several"])
def test_runs_with_other_teachers_resume_bit_for_bit(teachers: str, tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    given: Any = [bert(seed=1), bert(seed=2)]
    if teachers == "kept answers":
        given = tmp_path / "answers"
        cache_teacher(bert(seed=1), class_rows(), given)
    whole = distiller(bert(), given, tmp_path, **{**options, "save_strategy": "steps"})
    whole.train()
    resumed = distiller(bert(seed=3), given, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(weights_of(resumed.model), weights_of(whole.model))
    terms = [{e["step"]: e["kd_loss"] for e in run.state.log_history if "kd_loss" in e} for run in (whole, resumed)]
    assert terms[0] == terms[1]
    assert len(terms[0]) == 6


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("make", [llama, bert])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    make: Callable[..., PreTrainedModel], prune: bool, tmp_path: Path
) -> None:
    options = {
        "max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "optim": "adamw_torch", "learning_rate": 1e-2, "logging_steps": 1,
    }  # fmt: skip

    def callbacks() -> list[TrainerCallback]:
        return [PruneCallback(sparsity=0.6, end=0.8)] if prune else []

    whole = distiller(make(), make(seed=1), tmp_path / "whole", callbacks=callbacks(), **options)
    whole.train()
    stopped = distiller(
        make(), make(seed=1), tmp_path, callbacks=[*callbacks(), StopAt(4)], **{**options, "save_strategy": "steps"}
    )
    stopped.train()
    resumed = distiller(make(seed=2), make(seed=1), tmp_path, callbacks=callbacks(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not equal(weights_of(stopped.model), weights_of(whole.model))
    assert equal(weights_of(resumed.model), weights_of(whole.model))
    for one, other in zip(whole.optimizer.state.values(), resumed.optimizer.state.values()):
        assert equal(one, other)
    terms = [[(e["step"], e["kd_loss"]) for e in run.state.log_history if "kd_loss" in e] for run in (whole, resumed)]
    assert terms[0] == terms[1]
    if prune:
        weights = [w for n, w in resumed.model.named_parameters() if ".layer" in n and w.dim() == 2]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert zeros == int(0.6 * sum(weight.numel() for weight in weights))


# Compiling, model_init and searching


@pytest.mark.parametrize("make", [llama, bert])
def test_a_compiled_student_learns_the_same_from_logits(make: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    results = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        student = make()
        trainer = distiller(student, make(seed=1), tmp_path, max_steps=2, **options)
        trainer.train()
        results.append((weights_of(student), trainer.state.log_history[1]["kd_loss"]))
    for name, weight in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], weight, rtol=1e-4, atol=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


NARROW = {"hidden_size": 16, "intermediate_size": 32, "layers": 1}
FEATURES: dict[str, Any] = {"temperature": None, "losses": ["forward_kl", "hidden_states"]}


def state_of(trainer: DistillationTrainer) -> dict[str, Tensor]:
    return {**weights_of(trainer.model), **{f"projection {k}": v for k, v in weights_of(trainer.projections).items()}}


def test_each_training_of_model_init_is_a_fresh_one(tmp_path: Path) -> None:
    rows = class_rows()[:8]  # one batch, whose order does not matter
    alone = distiller(bert(**NARROW), bert(seed=1), tmp_path, rows, max_steps=3, logging_steps=2, **FEATURES)
    alone.train()
    several = distiller(
        None, bert(seed=1), tmp_path, rows, max_steps=3, logging_steps=2, model_init=lambda: bert(**NARROW),
        **FEATURES,
    )  # fmt: skip
    for _ in range(2):
        several.train()
        for name, value in state_of(alone).items():
            torch.testing.assert_close(state_of(several)[name], value, rtol=1e-5, atol=1e-6)
        terms = [[(entry["step"], entry["kd_loss"]) for entry in one.state.log_history if "kd_loss" in entry]
                 for one in (alone, several)]  # fmt: skip
        assert [step for step, _ in terms[0]] == [step for step, _ in terms[1]] == [2]
        assert terms[0][0][1] == pytest.approx(terms[1][0][1], rel=1e-5)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 2.0), (1.0, 2.0), (1.0, 4.0)])
def test_each_trial_of_a_search_reads_its_options(alpha: float, temperature: float, tmp_path: Path) -> None:
    """A search sets the arguments of one trainer and trains it again (Trainer._hp_search_setup)."""
    rows = text_rows()[:8]
    searched = distiller(None, llama(seed=1), tmp_path, rows, alpha=0.5, temperature=1.0, model_init=lambda: llama())
    searched.train()
    searched.args.alpha, searched.args.temperature = alpha, temperature
    searched.train()
    alone = distiller(llama(), llama(seed=1), tmp_path, rows, alpha=alpha, temperature=temperature)
    alone.train()
    for name in ("loss", "kd_loss", "task_loss"):
        found, expected = (one.state.log_history[0][name] for one in (searched, alone))
        assert found == pytest.approx(expected, rel=1e-5)
    for name, value in weights_of(alone.model).items():
        torch.testing.assert_close(weights_of(searched.model)[name], value, rtol=1e-4, atol=1e-6)


class Ended(TrainerCallback):
    """Keeps of each training the options that it ended with and its student's weights."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, float], dict[str, Tensor]]] = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        options = {name: getattr(args, name) for name in ("learning_rate", "temperature")}
        self.found.append((options, weights_of(kwargs["model"])))


def test_a_search_trains_a_student_per_trial_and_names_the_best(tmp_path: Path) -> None:
    import optuna

    rows, ended = class_rows()[:8], Ended()
    space = {"learning_rate": [0.3, 0.01], "temperature": [1.0, 4.0]}
    trainer = distiller(None, bert(seed=1), tmp_path, rows, max_steps=3, model_init=lambda: bert(), callbacks=[ended])
    best = trainer.hyperparameter_search(
        backend="optuna", n_trials=4, direction="minimize", sampler=optuna.samplers.GridSampler(space, seed=0),
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
    )  # fmt: skip
    assert {tuple(options.values()) for options, _ in ended.found} == set(itertools.product(*space.values()))
    objectives = []
    for options, weights in ended.found:
        alone = distiller(bert(), bert(seed=1), tmp_path, rows, max_steps=3, **options)
        alone.train()
        for name, value in weights_of(alone.model).items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
        objectives.append(alone.evaluate()["eval_loss"])
    first = min(range(4), key=objectives.__getitem__)
    assert len({round(one, 4) for one in objectives}) == 4
    assert best.run_id == str(first)
    assert best.hyperparameters == ended.found[first][0]
    assert best.objective == pytest.approx(objectives[first], rel=1e-5)


def test_a_search_does_not_train_with_options_that_no_config_takes(tmp_path: Path) -> None:
    trainer = distiller(None, bert(seed=1), tmp_path, class_rows()[:8], model_init=lambda: bert(), temperature=None)
    for options, fault in (
        ({"alpha": 1.5}, r"alpha=1\.5 must lie between 0 and 1"),
        ({"alpha": 0.5, "temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        ({"temperature": 2.0, "losses": ["reverse_kl"]}, r"temperature=2\.0 is an option of the losses"),
    ):
        for name, value in options.items():
            setattr(trainer.args, name, value)
        with pytest.raises(HFCompressError, match=fault):
            trainer.train()
