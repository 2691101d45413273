"""Distillation: the loss is the one that is written down, whatever the batch split, the padding and the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.conftest import VOCABULARY_SIZE
from tests.distilling import (
    ALPHA,
    TEMPERATURE,
    Rows,
    bert,
    bert_of_unscaled_loss,
    distiller,
    equal,
    llama,
    rows_for,
    spread,
    stack,
    text_rows,
    token_classifier,
    token_rows,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("quick_trainers")
# The whole loss


def _reference_terms(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows, shared: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return KD and task loss of one optimizer step, row by row and token by token in float64.

    shared: how many logits KD compares; the task loss is always of all.
    """
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
            p, q = (F.softmax(one[:shared] / TEMPERATURE, -1) for one in (theirs, mine))
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
    _assert_moved_along(student, before, reference)


def _assert_moved_along(student: PreTrainedModel, before: dict[str, Tensor], reference: PreTrainedModel) -> None:
    """One step of plain SGD at 0.1 followed the reference's gradient."""
    for name, weight in student.named_parameters():
        gradient = reference.get_parameter(name).grad
        moved = (before[name] - weight.detach()) / 0.1
        torch.testing.assert_close(moved, gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("own", "other"), [(64, 72), (72, 64)])
def test_vocabularies_of_two_sizes_are_compared_where_both_have_logits(
    own: int, other: int, tmp_path: Path, tokenizer: Any
) -> None:
    student, teacher = llama(vocab_size=own), llama(vocab_size=other, seed=1)
    rows = text_rows()[:8]
    reference = copy.deepcopy(student)
    kd, task = _reference_terms(reference.eval(), teacher.eval(), rows, shared=64)
    (ALPHA * kd + (1 - ALPHA) * task).backward()
    before = weights_of(student)
    trainer = distiller(
        student, teacher, tmp_path, rows, processing_class=tokenizer, teacher_processing_class=tokenizer
    )
    trainer.train()
    assert trainer.state.log_history[0]["kd_loss"] == pytest.approx(kd.item(), rel=1e-5)
    assert trainer.state.log_history[0]["task_loss"] == pytest.approx(task.item(), rel=1e-5)
    _assert_moved_along(student, before, reference)


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
    _train_and_compare_in_place([token_classifier(seed) for seed in (0, 1)], tmp_path, token_rows(8))


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
