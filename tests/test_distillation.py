"""Distillation: the loss is the one that is written down, whatever the batch split, the padding and the teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hfcompress.distillation import DistillationConfig, DistillationTrainer
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.pruning import PruneCallback
from tests.conftest import VOCABULARY_SIZE, tiny_bert
from tests.distilling import (
    ALPHA,
    TEMPERATURE,
    Rows,
    StopAt,
    bert,
    bert_of_unscaled_loss,
    class_rows,
    distiller,
    equal,
    llama,
    rows_for,
    spread,
    stack,
    text_rows,
    weights_of,
)
from tests.distributed import WORLD_SIZE, run_in_two_processes

pytestmark = pytest.mark.usefixtures("quick_trainers")
# The whole loss


def _reference_terms(student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return KD and task loss of one optimizer step, row by row and token by token in float64."""
    causal = "Llama" in type(student).__name__
    kd, task, items = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        inputs = {name: row[name][None] for name in ("input_ids", "attention_mask")}
        own = student(**inputs).logits[0].double()
        with torch.no_grad():
            guide = teacher(**inputs).logits[0].double()
        if causal:
            pairs = [(own[at], guide[at], int(row["labels"][at + 1])) for at in range(len(own) - 1)]
        else:
            pairs = [(own, guide, int(row["labels"]))]
        for mine, theirs, label in pairs:
            if label == -100:
                continue
            items += 1
            task = task - F.log_softmax(mine, -1)[label]
            p, q = F.softmax(theirs / TEMPERATURE, -1), F.softmax(mine / TEMPERATURE, -1)
            kd = kd + TEMPERATURE**2 * (p * (p.log() - q.log())).sum()
    return kd / items, task / items


@pytest.mark.parametrize(("size", "steps"), [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("make", [llama, bert, bert_of_unscaled_loss])
def test_loss_and_gradient_equal_a_plain_loop_for_every_split(
    make: Callable[..., PreTrainedModel], size: int, steps: int, tmp_path: Path
) -> None:
    student, teacher = make(), make(seed=1)
    rows = rows_for(student)[:8]
    reference = copy.deepcopy(student)
    kd, task = _reference_terms(reference.eval(), teacher.eval(), rows)
    loss = ALPHA * kd + (1 - ALPHA) * task
    loss.backward()

    before = weights_of(student)
    trainer = distiller(
        student, teacher, tmp_path, rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["kd_loss"] == pytest.approx(kd.item(), rel=1e-5)
    assert logs["task_loss"] == pytest.approx(task.item(), rel=1e-5)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert kd.item() > 0.1
    for name, weight in student.named_parameters():
        gradient = dict(reference.named_parameters())[name].grad
        moved = (before[name] - weight.detach()) / 0.1
        torch.testing.assert_close(moved, gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("make", [llama, bert])
def test_terms_are_logged_apart_and_add_up(make: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    trainer = distiller(
        make(), make(seed=1), tmp_path, max_steps=6, logging_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]
    for entry in logged:
        assert entry["loss"] == pytest.approx(ALPHA * entry["kd_loss"] + (1 - ALPHA) * entry["task_loss"], rel=1e-5)
        assert min(entry["kd_loss"], entry["task_loss"]) > 0
    assert logged[0]["kd_loss"] != logged[1]["kd_loss"]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_at_its_ends_leaves_one_term(alpha: float, tmp_path: Path) -> None:
    student, teacher = llama(), llama(seed=1)
    rows = text_rows()[:8]
    terms = _reference_terms(copy.deepcopy(student).eval(), teacher.eval(), rows)
    trainer = distiller(student, teacher, tmp_path, rows, alpha=alpha)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(terms[0 if alpha else 1].item(), rel=1e-5)


# Positions without a label


def _disturb(teacher: PreTrainedModel, where: Callable[[dict[str, Tensor]], Tensor], rows: Rows) -> list[int]:
    """Shout at the positions that ``where`` marks in each row; returns the list of how many that were."""
    labels = {tuple(row["input_ids"].tolist()): row for row in rows}
    counts: list[int] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        for place, ids in enumerate(kwargs["input_ids"]):
            marked = where(labels[tuple(ids.tolist())])
            counts.append(int(marked.sum()))
            output.logits[place, marked] += 50 * torch.randn(int(marked.sum()), VOCABULARY_SIZE)
        return output

    teacher.register_forward_hook(hook, with_kwargs=True)
    return counts


def _unlabelled(row: dict[str, Tensor]) -> Tensor:
    return torch.cat([row["labels"][1:] == -100, torch.tensor([True])])


def _one_labelled(row: dict[str, Tensor]) -> Tensor:
    marked = torch.zeros(len(row["labels"]), dtype=torch.bool)
    marked[(~_unlabelled(row)).nonzero()[:1]] = True
    return marked


def test_only_labelled_positions_of_the_teacher_count(tmp_path: Path) -> None:
    rows = text_rows()[:8]
    results = []
    for where in (None, _unlabelled, _one_labelled):
        student, teacher = llama(), llama(seed=1)
        if where:
            counts = _disturb(teacher, where, rows)
        distiller(student, teacher, tmp_path, rows).train()
        assert where is None or sum(counts) >= 6
        results.append(weights_of(student))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_padding_tokens_do_not_matter(tmp_path: Path) -> None:
    results = []
    for filler in (0, 33):
        rows = text_rows()[:8]
        for row in rows:
            row["input_ids"][row["attention_mask"] == 0] = filler
        student = llama(pad_token_id=None)
        distiller(student, llama(seed=1), tmp_path, rows).train()
        results.append(weights_of(student))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-6)


def _reference_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def _train_and_compare_in_place(models: list[PreTrainedModel], folder: Path, rows: Rows) -> None:
    """One step of student and teacher logs the reference's loss, with labels that are not shifted."""
    with torch.no_grad():
        own, guide = (model.eval()(**stack(rows)).logits.double() for model in models)
    counted = stack(rows)["labels"] != -100
    kd = _reference_kl(own[counted], guide[counted], TEMPERATURE) / counted.sum()
    trainer = distiller(*models, folder, rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.state.log_history[0]["kd_loss"] == pytest.approx(kd.item(), rel=1e-5)


def test_token_classifier_counts_its_labels_in_place(tmp_path: Path) -> None:
    # not shifted: the first position has a label, too
    config = tiny_bert().config
    config.num_labels = 3
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(spread(hf.BertForTokenClassification(config), seed))
    rows = [{**row, "labels": row["labels"].where(row["labels"] == -100, row["labels"] % 3)} for row in text_rows(8)]
    _train_and_compare_in_place(models, tmp_path, rows)


def test_sequence_to_sequence_teacher_sees_the_decoder_inputs(tmp_path: Path) -> None:
    # T5 makes its decoder's inputs from the labels
    config = hf.T5Config(
        vocab_size=VOCABULARY_SIZE, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=5, decoder_start_token_id=0,
    )  # fmt: skip
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(spread(hf.T5ForConditionalGeneration(config), seed))
    rows = [row for row in text_rows(16) if (row["labels"] != -100).any()][:8]
    _train_and_compare_in_place(models, tmp_path, rows)


# Evaluation and prediction


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


# The teacher


def test_teacher_is_untouched_and_stays_out(tmp_path: Path) -> None:
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    student, teacher = bert(), bert(seed=1, **dropout)
    teacher.train()
    before = weights_of(teacher)
    modes = []
    teacher.register_forward_hook(
        lambda module, args, output: modes.append(
            (any(one.training for one in module.modules()), output.logits.requires_grad)
        )
    )
    trainer = distiller(
        student, teacher, tmp_path, max_steps=3, save_strategy="steps", save_steps=3, optim="adamw_torch"
    )
    trainer.train()
    assert modes == [(False, False)] * 3
    assert equal(weights_of(teacher), before)
    assert all(weight.grad is None for weight in teacher.parameters())
    optimized = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert optimized == {id(weight) for weight in student.parameters()}
    assert load_file(tmp_path / "checkpoint-3" / "model.safetensors").keys() == student.state_dict().keys()


def _distilbert() -> PreTrainedModel:
    torch.manual_seed(0)
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY_SIZE, dim=32, hidden_dim=64, n_layers=1, n_heads=4, num_labels=3, pad_token_id=0
        )
    )


def test_columns_that_only_the_teacher_takes_reach_it(tmp_path: Path) -> None:
    columns = {name: value.tolist() for name, value in stack(class_rows()).items()}
    columns["token_type_ids"] = [[index % 2] * 8 for index in range(16)]
    data = Dataset.from_dict({**columns, "text": ["nobody takes this"] * 16})
    teacher = bert(seed=1)
    seen: list[dict] = []
    teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    student = _distilbert()
    got: list[set[str]] = []
    student.register_forward_pre_hook(lambda module, args, kwargs: got.append(set(kwargs)), with_kwargs=True)
    trainer = distiller(student, teacher, tmp_path, data)
    trainer.train()
    types = {
        tuple(ids.tolist()): segment.tolist() for ids, segment in zip(seen[0]["input_ids"], seen[0]["token_type_ids"])
    }
    assert types == {ids: columns["token_type_ids"][columns["input_ids"].index(list(ids))] for ids in types}
    assert {0, 1} <= {segment[0] for segment in types.values()}
    assert "labels" not in seen[0]
    assert "text" not in seen[0]
    # none of it breaks the student, with labels or without
    trainer.evaluate()
    assert trainer.predict(data.remove_columns("labels")).predictions.shape == (16, 3)
    assert all("token_type_ids" not in names for names in got)


# Resuming


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


# Refusals


def headless_bert() -> PreTrainedModel:
    return hf.BertModel(tiny_bert().config)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (lambda: llama(), lambda: llama(vocab_size=72), "student has 64 classes or tokens and the teacher 72"),
        (lambda: bert(), lambda: bert(num_labels=4), "student has 3 classes or tokens and the teacher 4"),
        (
            lambda: bert(id2label={0: "bad", 1: "fair", 2: "good"}),
            lambda: bert(id2label={0: "bad", 1: "good", 2: "fair"}),
            "Class 1 is 'fair' for the student and 'good' for the teacher",
        ),
        (lambda: bert(problem_type="regression"), lambda: bert(), "gives a class of several, the other numbers"),
        (lambda: bert(), lambda: bert(problem_type="regression"), "gives numbers .*, the other a class of several"),
        (
            lambda: bert(problem_type="multi_label_classification"),
            lambda: bert(),
            "gives a class of several, the other a yes or no for each label",
        ),
        (lambda: bert(), lambda: headless_bert(), "BertModel and cannot answer what a BertForSequenceClassification"),
        (lambda: llama(), lambda: bert(), "BertForSequenceClassification and cannot answer what a LlamaForCausalLM"),
        (lambda: bert(), lambda: [], "teacher_model is an empty list"),
        (lambda: bert(), lambda: nn.Linear(2, 2), "teacher_model must be a transformers PreTrainedModel"),
    ],
    ids=[
        "vocabulary",
        "labels",
        "order",
        "regression",
        "regression teacher",
        "multi-label",
        "no head",
        "other head",
        "none",
        "module",
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(
    student: Callable[[], Any], teacher: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        distiller(student(), teacher(), tmp_path)


def test_liger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="use_liger_kernel leaves no logits"):
        distiller(llama(), llama(), tmp_path, use_liger_kernel=True)


def test_plain_training_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes a DistillationConfig as args, not a TrainingArguments"):
        DistillationTrainer(llama(), TrainingArguments(tmp_path, use_cpu=True), teacher_model=llama())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"alpha": -0.1}, "alpha=-0.1 must lie between 0 and 1"),
        ({"alpha": 1.1}, "alpha=1.1 must lie between 0 and 1"),
        ({"alpha": math.nan}, "alpha=nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(HFCompressError, match=message.replace(".", r"\.")):
        DistillationConfig(tmp_path, use_cpu=True, **options)


def test_batches_without_labels_are_refused(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in text_rows()]
    with pytest.raises(ModelError, match=r"The batches hold no 'labels', only .*input_ids"):
        distiller(llama(), llama(seed=1), tmp_path, rows).train()


# Two processes


def _distil_in_one_process(folder: str) -> None:
    student = llama()
    trainer = distiller(
        student, llama(seed=1), Path(folder), max_steps=2, per_device_train_batch_size=2, ddp_backend="gloo",
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    logs = [{k: e[k] for k in ("loss", "kd_loss", "task_loss")} for e in trainer.state.log_history if "loss" in e]
    result = (trainer.args.world_size, weights_of(student), logs)
    torch.save(result, Path(folder) / f"{trainer.args.process_index}.pt")


@pytest.mark.distributed
def test_two_processes_learn_what_one_learns_from_the_joint_batch(tmp_path: Path) -> None:
    run_in_two_processes(_distil_in_one_process, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE)]
    assert [size for size, *_ in results] == [WORLD_SIZE] * WORLD_SIZE
    (_, weights, logs), (_, other_weights, _) = results
    assert equal(weights, other_weights)

    student = llama()
    initial = weights_of(student)
    trainer = distiller(student, llama(seed=1), tmp_path, max_steps=2, per_device_train_batch_size=8)
    trainer.train()
    for name, weight in weights_of(student).items():
        torch.testing.assert_close(weights[name] - initial[name], weight - initial[name], rtol=1e-3, atol=1e-6)
    for entry, expected in zip(logs, trainer.state.log_history):
        for term, value in entry.items():
            assert value == pytest.approx(expected[term], rel=1e-5)
