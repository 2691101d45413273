"""On-policy distillation: what the student writes, which of it counts, and that runs repeat exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hfcompress.distillation import OnPolicy
from hfcompress.distillation.losses.jensen_shannon import jensen_shannon
from hfcompress.distillation.on_policy import joined, lengths_of, padded_left, prompts_of, write_completions
from hfcompress.errors import DataError, HFCompressError, ModelError
from tests.checkpointing import checkpoint_activations
from tests.conftest import VOCABULARY_SIZE, tiny_bert
from tests.distilling import ALPHA, StopAt, distiller, equal, llama, stack, weights_of

pytestmark = pytest.mark.usefixtures("quick_trainers")
CPU = torch.device("cpu")
ALWAYS = OnPolicy(fraction=1.0, max_new_tokens=6)


def prompt_rows(count: int = 16) -> list[dict[str, Tensor]]:
    """Rows of prompts of 2 to 4 tokens and completions, padded on either side."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(6, VOCABULARY_SIZE, (9,), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        prompt = 2 + index % 3
        if index % 2:  # on the left
            ids[:2], mask[:2] = 0, 0
            labels[: 2 + prompt] = -100
        else:
            ids[-2:], mask[-2:], labels[-2:] = 0, 0, -100
            labels[:prompt] = -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def dropping_llama(**changes: Any) -> PreTrainedModel:
    return llama(seed=1, attention_dropout=0.5, **changes)


def test_prompts_are_what_stands_before_the_first_label() -> None:
    batch = stack(prompt_rows(4))
    batch["labels"][3] = -100
    found = prompts_of(batch, None)
    ids = batch["input_ids"]
    assert [None if one is None else one.tolist() for one in found] == [
        ids[0, :2].tolist(), ids[1, 2:5].tolist(), ids[2, :4].tolist(), None,
    ]  # fmt: skip
    short = prompts_of(batch, 1)
    assert [None if one is None else one.tolist() for one in short] == [[ids[0, 0]], [ids[1, 2]], [ids[2, 0]], None]


def test_only_completions_up_to_their_end_count() -> None:
    completions = torch.tensor([[7, 8, 5, 9], [5, 5, 5, 5], [7, 8, 9, 6]])
    assert lengths_of(completions, [5]).tolist() == [3, 1, 4]
    assert lengths_of(completions, [5, 8]).tolist() == [2, 1, 4 - 2]
    assert lengths_of(completions, []).tolist() == [4, 4, 4]
    prompts = [torch.tensor([11, 12]), None, torch.tensor([13])]
    batch = joined(prompts, [torch.tensor([7, 5]), torch.tensor([8, 9, 6])], padding=0)
    assert batch["input_ids"].tolist() == [[11, 12, 7, 5], [0, 0, 0, 0], [13, 8, 9, 6]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 5], [-100] * 4, [-100, 8, 9, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    ids, mask = padded_left([torch.tensor([1, 2]), torch.tensor([3])], padding=9)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2], [9, 3]], [[1, 1], [0, 1]])


def test_samples_follow_the_students_own_distribution() -> None:
    student = dropping_llama().train()
    student.generation_config = GenerationConfig(top_p=0.1, repetition_penalty=5.0, eos_token_id=5)
    checkpoint_activations(student)
    ids = torch.tensor([[6, 7, 8]])
    batch = {"input_ids": ids.repeat(4000, 1), "labels": torch.tensor([[-100, -100, 8]]).repeat(4000, 1)}
    before = torch.get_rng_state()
    written = write_completions(student, batch, OnPolicy(max_new_tokens=1, temperature=1.5), CPU, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training
    assert student.generation_config.top_p == 0.1
    counts = torch.bincount(written["input_ids"][:, 2], minlength=VOCABULARY_SIZE) / 4000
    student.eval()
    with torch.no_grad():
        expected = (student(ids[:, :2]).logits[0, -1] / 1.5).softmax(-1)
    assert float((counts - expected).abs().sum()) < 0.12
    assert float(expected.max()) < 0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_does_not_change_what_is_written(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    student = llama() if kind == "llama" else GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=5, bos_token_id=4))
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(4)  # sure of itself: sampling is then nearly greedy, whatever the draw
    rows = prompt_rows(6)
    almost_greedy = OnPolicy(max_new_tokens=5, temperature=1e-3)
    together = write_completions(student, stack(rows), almost_greedy, CPU, 0)
    for index, row in enumerate(rows):
        alone = write_completions(student, stack([row]), almost_greedy, CPU, 1)
        real = together["attention_mask"][index].bool()
        assert torch.equal(together["input_ids"][index][real], alone["input_ids"][0])
        assert torch.equal(together["labels"][index][real], alone["labels"][0])


def test_gradient_is_the_divergence_over_the_completions_alone(tmp_path: Path) -> None:
    """A plain loop in float64 over what the student writes, without any term of the task."""
    student, teacher, rows = llama(seed=1).double(), llama().double(), prompt_rows(8)
    before = weights_of(student)
    reference = llama(seed=1).double()
    losses = [{"jensen_shannon": {"beta": 0.3}}]
    trainer = distiller(
        student, teacher, tmp_path, rows, on_policy=ALWAYS, losses=losses, temperature=None,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, dataloader_drop_last=True,
    )  # fmt: skip
    seen: list[dict[str, Tensor]] = []
    original = trainer.training_step
    trainer.training_step = lambda model, inputs, items=None: (seen.append(inputs), original(model, inputs, items))[1]  # type: ignore[method-assign]
    trainer.train()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in seen:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
            ids, labels = ids[mask.bool()][None], labels[mask.bool()][None]
            own, told = reference(ids).logits[0, :-1], teacher(ids).logits[0, :-1].detach()
            counted = labels[0, 1:] != -100
            total = total + jensen_shannon(own[counted], told[counted], 0.3, 1.0)[0].sum()
            loss_slope = jensen_shannon(own[counted].detach(), told[counted], 0.3, 1.0)[1]
            (own[counted] * loss_slope).sum().backward()
            count += int(counted.sum())
    assert len(seen) == 2
    for name, weight in reference.named_parameters():
        assert torch.allclose(student.get_parameter(name), before[name] - 0.1 * 0.3 * weight.grad / count, atol=1e-9)
    logs = trainer.state.log_history[0]
    assert logs["kd_loss"] == pytest.approx(float(total.detach()) / count)
    assert logs["on_policy"] == 1.0
    assert "task_loss" not in logs


def test_smoothed_labels_are_no_task_of_what_the_student_wrote(tmp_path: Path) -> None:
    trainer = distiller(llama(seed=1), llama(), tmp_path, prompt_rows(8), on_policy=ALWAYS, label_smoothing_factor=0.1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(ALPHA * logs["kd_loss"], rel=1e-5)
    assert "task_loss" not in logs


def test_fraction_says_how_many_steps_are_the_students(tmp_path: Path) -> None:
    told = OnPolicy(fraction=0.3)
    shares = [sum(told.is_due(seed, step) for step in range(1000)) / 1000 for seed in (0, 1)]
    assert all(abs(share - 0.3) < 0.05 for share in shares)
    assert [told.is_due(0, step) for step in range(50)] != [told.is_due(1, step) for step in range(50)]
    never = distiller(llama(seed=1), llama(), tmp_path, prompt_rows(), max_steps=3)
    off = distiller(llama(seed=1), llama(), tmp_path, prompt_rows(), max_steps=3, on_policy={"fraction": 0})
    for one in (never, off):
        one.train()
    assert equal(weights_of(never.model), weights_of(off.model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(checkpointing: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "on_policy": OnPolicy(0.5, max_new_tokens=4),
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 2, "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }  # fmt: skip

    def student(seed: int = 1) -> PreTrainedModel:
        model = dropping_llama()
        if checkpointing:
            checkpoint_activations(model)
        return model

    due = [OnPolicy(0.5).is_due(2, step) for step in range(6)]
    assert any(due[3:])
    assert not all(due)
    whole = distiller(student(), llama(), tmp_path / "whole", prompt_rows(), **options)
    whole.train()
    distiller(student(), llama(), tmp_path, prompt_rows(), callbacks=[StopAt(3)], **options).train()
    fresh = student()
    nn.init.zeros_(next(fresh.parameters()))
    torch.manual_seed(99)
    resumed = distiller(fresh, llama(), tmp_path, prompt_rows(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights_of(resumed.model), weights_of(whole.model))


# Faults


def test_cache_of_answers_is_refused(tmp_path: Path) -> None:
    from hfcompress.distillation import cache_teacher

    rows = prompt_rows(4)
    cache_teacher(llama(), rows, tmp_path / "cache")
    with pytest.raises(ModelError, match=r"on_policy.*holds answers to texts that were there before"):
        distiller(llama(seed=1), tmp_path / "cache", tmp_path, rows, on_policy=ALWAYS, temperature=None)  # type: ignore[arg-type]


def test_models_that_write_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"on_policy.*BertForSequenceClassification"):
        distiller(tiny_bert(), tiny_bert(), tmp_path, on_policy=ALWAYS)


@pytest.mark.parametrize("given", [{"fraktion": 1}, {"fraction": 1.5}, {"max_new_tokens": 0}, {"temperature": 0}, 3])
def test_wrong_options_are_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(HFCompressError, match="on_policy"):
        distiller(llama(), llama(), tmp_path, on_policy=given)


def test_rows_without_a_prompt_and_other_columns_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "labels": row["input_ids"].clone()} for row in prompt_rows(8)[::2]]
    trainer = distiller(llama(), llama(), tmp_path, rows, on_policy=ALWAYS)
    with pytest.raises(DataError, match=r"no prompt to complete. Give on_policy.prompt_tokens"):
        trainer.train()
    positions = [{**row, "position_ids": torch.arange(9)} for row in prompt_rows(8)]
    trainer = distiller(llama(), llama(), tmp_path, positions, on_policy=ALWAYS)
    with pytest.raises(DataError, match=r"not of .*position_ids"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "no prompt to complete"), ({"prompt_tokens": 4, "max_new_tokens": 125}, "A prompt of 4 tokens")],
)
def test_rows_are_looked_at_before_the_first_step_though_the_student_writes_later(
    options: dict[str, int], message: str, tmp_path: Path
) -> None:
    late = OnPolicy(fraction=0.3, **options)  # type: ignore[arg-type]
    assert not late.is_due(42, 0)
    rows = [{**row, "labels": row["input_ids"].clone()} for row in prompt_rows(8)[::2]]
    trainer = distiller(llama(), llama(seed=1), tmp_path, rows, on_policy=late, max_steps=20)
    with pytest.raises(HFCompressError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_completions_longer_than_the_student_takes_are_refused(tmp_path: Path) -> None:
    trainer = distiller(llama(), llama(), tmp_path, prompt_rows(8), on_policy={"max_new_tokens": 125})
    with pytest.raises(
        ModelError, match=r"A prompt of 4 tokens with on_policy.max_new_tokens=125 is longer than the 128"
    ):
        write_completions(trainer.model, stack(prompt_rows(3)), trainer.args.on_policy, CPU, 0)
