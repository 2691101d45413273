"""A teacher's answers on disk: small, exact, whole after a kill, and never those of other data or another teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, PreTrainedModel

from hfcompress.distillation import CachedTeacher, cache_teacher
from hfcompress.distillation.losses.targets import TopK, top_k_of
from hfcompress.distillation.teachers import cache
from hfcompress.distillation.teachers.keys import keys_of
from hfcompress.distillation.teachers.shards import Shard, write_shard
from hfcompress.errors import CheckpointError, DataError, HFCompressError, ModelError, OutputError
from tests.distilling import bert, class_rows, distiller, llama, rows_for, stack, text_rows, weights_of

pytestmark = pytest.mark.usefixtures("quick_trainers")


def trained(teacher: Any, folder: Path, student: PreTrainedModel, losses: list, **options: Any) -> dict[str, Tensor]:
    trainer = distiller(student, teacher, folder, temperature=None, losses=losses, max_steps=2, **options)
    trainer.train()
    return weights_of(trainer.model)


def test_training_from_a_cache_equals_training_with_the_teacher(tmp_path: Path) -> None:
    losses = [{"top_k_kl": {"k": 8, "temperature": 2.0}}]
    live = trained(llama(seed=1), tmp_path, llama(), losses)
    report = cache_teacher(llama(seed=1), text_rows(), tmp_path / "cache", k=8, temperature=2.0)
    assert (report.examples, report.found) == (16, 0)
    cached = trained(str(tmp_path / "cache"), tmp_path, llama(), losses)
    for name, weight in live.items():
        torch.testing.assert_close(cached[name], weight, rtol=1e-3, atol=1e-4)


def test_training_from_a_cache_needs_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_teacher(bert(seed=1), class_rows(), tmp_path / "cache")
    live = trained(bert(seed=1), tmp_path, bert(), ["forward_kl"])
    student = bert()
    ran: list[str] = []
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: ran.append("opened"))
    monkeypatch.setattr(
        "hfcompress.distillation.teachers.live.LiveTeacher.answer", lambda *_, **__: ran.append("answered")
    )
    cached = trained(tmp_path / "cache", tmp_path, student, ["forward_kl"])
    assert not ran
    # all logits of a classifier are kept as they are
    for name, weight in live.items():
        torch.testing.assert_close(cached[name], weight, rtol=0, atol=1e-6)


def test_cached_top_k_is_the_default_loss_of_a_language_model(tmp_path: Path) -> None:
    cache_teacher(llama(seed=1), text_rows(), tmp_path / "cache", k=8, temperature=3.0)
    trainer = distiller(llama(), tmp_path / "cache", tmp_path, temperature=None)
    assert [(name, loss.temperature) for name, loss in trainer.logit_losses.items()] == [("top_k_kl", 3.0)]


@pytest.mark.parametrize("k", [1, 2, 4, 7, 48])
@pytest.mark.parametrize("classes", [50, 49_152, 151_936, 262_144, 600_000])
def test_shards_give_back_what_was_written(classes: int, k: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    answers = [top_k_of(4 * torch.randn(rows, classes, generator=generator), k, 1.5) for rows in (3, 0, 40)]
    keys = [bytes([number]) * 16 for number in range(3)]
    file = tmp_path / "one.safetensors"
    write_shard(file, keys, answers, classes)
    shard = Shard(file)
    assert shard.keys == keys
    for row, answer in enumerate(answers):
        found = shard.read(row, 1.5)
        assert isinstance(found, TopK)
        order = answer.classes.argsort(-1)
        assert torch.equal(found.classes, answer.classes.gather(-1, order))
        torch.testing.assert_close(
            found.log_probabilities, answer.log_probabilities.gather(-1, order), rtol=1e-3, atol=0
        )
        torch.testing.assert_close(found.log_tail, answer.log_tail, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("classes", [49_152, 151_936, 262_144])
@pytest.mark.parametrize(("k", "over"), [(1, 1), (2, 2), (10, 1), (16, 0), (64, 0)])
def test_answers_take_the_bytes_that_are_written_down(k: int, over: int, classes: int, tmp_path: Path) -> None:
    rows, places = 256, 255  # a whole shard of rows of 256 tokens
    steps = torch.randint(1, classes // k, (places, k), generator=torch.Generator().manual_seed(0))
    answer = TopK(steps.cumsum(-1) - 1, torch.full((places, k), -3.0), torch.full((places,), -3.0), 1.0)
    file = tmp_path / "answers-000000.safetensors"
    write_shard(file, [number.to_bytes(16, "big") for number in range(rows)], [answer] * rows, classes)
    size = file.stat().st_size - 24 * rows
    assert (4 * k + 2) * rows * places < size < (4 * k + 2 + over) * rows * places + 1000
    assert 4 * k + 2 + over <= 2 * 2 * (k + 1)


def test_the_report_counts_everything_on_disk(tmp_path: Path) -> None:
    report = cache_teacher(llama(seed=1), text_rows(), tmp_path / "cache", k=8)
    files = list((tmp_path / "cache").iterdir())
    assert report.bytes == sum(file.stat().st_size for file in files)
    assert (tmp_path / "cache" / cache.INDEX) in files


def test_keys_are_of_the_content_alone() -> None:
    rows = text_rows(4)
    columns = {"input_ids", "attention_mask"}
    whole = keys_of(stack(rows), columns)
    assert len(set(whole)) == 4
    assert keys_of(stack(rows[::-1]), columns) == whole[::-1]
    padded = copy.deepcopy(rows)
    for row in padded:
        for name, filler in (("input_ids", 7), ("attention_mask", 0), ("labels", -100)):
            row[name] = torch.cat([torch.full((3,), filler), row[name]])
    assert keys_of(stack(padded), columns) == whole
    for name in ("input_ids", "labels"):
        other = copy.deepcopy(rows)
        other[0][name][4] = -100 if name == "labels" else 63
        assert keys_of(stack(other), columns)[0] != whole[0]
    # a class label is not part of what the teacher saw
    classes = stack(class_rows(4))
    assert keys_of(classes, columns) == keys_of({**classes, "labels": classes["labels"] + 1}, columns)


def test_cut_short_cache_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ROWS_PER_SHARD", 4)
    rows, whole, cut = text_rows(), tmp_path / "whole", tmp_path / "cut"
    cache_teacher(llama(seed=1), rows, whole, k=4)
    write = cache.write_shard
    written: list[Path] = []

    def killed(file: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file)
        write(file, *rest)

    monkeypatch.setattr(cache, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(llama(seed=1), rows, cut, k=4)
    (cut / ".answers-000002.safetensors.123").write_bytes(b"half")
    monkeypatch.setattr(cache, "write_shard", write)
    teacher = llama(seed=1)
    ran: list[int] = []
    teacher.register_forward_hook(lambda *_: ran.append(1))
    report = cache_teacher(teacher, rows, cut, k=4)
    assert (report.examples, report.found) == (16, 8)
    assert len(ran) == 1
    one, other = CachedTeacher(cut), CachedTeacher(whole)
    assert one.places == other.places
    for place, (shard, row) in one.places.items():
        mine, theirs = (each.shards[shard].read(row, 1.0) for each in (one, other))
        assert torch.equal(mine.classes, theirs.classes), place
        assert torch.equal(mine.log_probabilities, theirs.log_probabilities)
    assert cache_teacher(llama(seed=1), rows, cut, k=4).found == 16


def test_another_teacher_or_other_options_are_refused(tmp_path: Path) -> None:
    cache_teacher(llama(seed=1), text_rows(), tmp_path / "cache", k=4)
    with pytest.raises(OutputError, match="holds another teacher's answers"):
        cache_teacher(llama(seed=2), text_rows(), tmp_path / "cache", k=4)
    swapped = llama(seed=1)
    with torch.no_grad():
        row = swapped.model.layers[0].mlp.down_proj.weight[0]
        row[:2] = row[:2].flip(0)
    scaled = llama(seed=1)
    scaled.config.rope_parameters["rope_theta"] *= 2
    for other in (swapped, scaled):
        with pytest.raises(OutputError, match="holds another teacher's answers"):
            cache_teacher(other, text_rows(), tmp_path / "cache", k=4)
    llama(seed=1).save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert cache_teacher(again, text_rows(), tmp_path / "cache", k=4).found == 16
    with pytest.raises(OutputError, match="holds answers with k=4, not 5"):
        cache_teacher(llama(seed=1), text_rows(), tmp_path / "cache", k=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        cache_teacher(llama(seed=1), text_rows(), tmp_path / "mine", k=4)


@pytest.mark.parametrize("make", [llama, bert])
def test_other_data_are_refused_before_the_first_step(make: Any, tmp_path: Path) -> None:
    rows = rows_for(make())
    cache_teacher(make(seed=1), rows, tmp_path / "cache", k=2)
    steps: list[int] = []
    student = make()
    others = copy.deepcopy(rows)
    others[3]["input_ids"][0] += 1  # neither the first, the middle one nor the last
    trainer = distiller(student, tmp_path / "cache", tmp_path, others, temperature=None)
    student.register_forward_hook(lambda *_: steps.append(1))  # making the trainer runs it on inputs of its own
    with pytest.raises(DataError, match="written from other data"):
        trainer.train()
    assert not steps


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (lambda: llama(), {"losses": ["forward_kl"]}, "the 4 most probable classes only; forward_kl needs all"),
        (lambda: llama(), {"temperature": 2.0}, "written at temperature 1, but top_k_kl has 2"),
        (lambda: llama(), {"losses": ["hidden_states"]}, "hidden_states looks inside the teacher"),
        (lambda: llama(vocab_size=72), {}, "student has 72 classes or tokens and the teacher 64"),
    ],
)
def test_what_a_cache_cannot_answer_is_refused(student: Any, options: dict, message: str, tmp_path: Path) -> None:
    cache_teacher(llama(seed=1), text_rows(4), tmp_path / "cache", k=4)
    with pytest.raises(ModelError, match=message):
        distiller(student(), tmp_path / "cache", tmp_path, **{"temperature": None, **options})


@pytest.mark.parametrize(("student_size", "teacher_size"), [(64, 72), (72, 64)])
@pytest.mark.parametrize("k", [8, 64])
def test_a_cache_of_a_padded_vocabulary_teaches_the_shared_classes(
    student_size: int, teacher_size: int, k: int, tmp_path: Path, tokenizer: Any
) -> None:
    losses = [{"top_k_kl": {"k": k}}]
    both = {"processing_class": tokenizer, "teacher_processing_class": tokenizer}

    def teacher() -> PreTrainedModel:
        made = llama(seed=1, vocab_size=teacher_size, tie_word_embeddings=False)
        with torch.no_grad():  # in the untrained rows nothing but a little noise
            made.lm_head.weight[64:] *= 0.1
        return made

    cache_teacher(teacher(), text_rows(), tmp_path / "cache", k=k if k < 64 else teacher_size)
    results = []
    for one in (teacher(), tmp_path / "cache"):
        trainer = distiller(llama(vocab_size=student_size), one, tmp_path, temperature=None, losses=losses, **both)
        assert trainer.shared_classes == 64
        trainer.train()
        results.append(weights_of(trainer.model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-2, atol=1e-3)


def test_classifiers_with_other_labels_are_refused(tmp_path: Path) -> None:
    cache_teacher(bert(seed=1, id2label={0: "bad", 1: "fair", 2: "good"}), class_rows(4), tmp_path / "cache")
    student = bert(id2label={0: "bad", 1: "good", 2: "fair"})
    with pytest.raises(ModelError, match="Class 1 is 'good' for the student and 'fair' for the teacher"):
        distiller(student, tmp_path / "cache", tmp_path, temperature=None)
    with pytest.raises(ModelError, match="student has 4 classes"):
        distiller(bert(num_labels=4), tmp_path / "cache", tmp_path, temperature=None)


@pytest.mark.parametrize("k", [0, 65, 256])
def test_k_beyond_the_vocabulary_is_refused(k: int, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"k={k} must be at least 1 and at most 255, and there are 64 classes"):
        cache_teacher(llama(), text_rows(4), tmp_path / "cache", k=k)
    if k:
        with pytest.raises(ModelError, match=f"k={k} is more than the 64 classes"):
            distiller(llama(), llama(seed=1), tmp_path, temperature=None, losses=[{"top_k_kl": {"k": k}}])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_that_give_no_probabilities_are_refused(temperature: float, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"temperature={temperature} must be above 0 and finite"):
        cache_teacher(llama(), text_rows(4), tmp_path / "cache", temperature=temperature)
    assert not (tmp_path / "cache").exists()


def test_what_is_no_model_answers_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must be a transformers PreTrainedModel, not a str"):
        cache_teacher("a/name", text_rows(4), tmp_path / "cache")  # type: ignore[arg-type]


def test_folders_that_are_no_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no teacher's answers"):
        distiller(llama(), tmp_path, tmp_path)
    cache_teacher(llama(), text_rows(4), tmp_path / "cache", k=4)
    file = next((tmp_path / "cache").glob("answers-*"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        CachedTeacher(tmp_path / "cache")
    file.unlink()
    with pytest.raises(HFCompressError, match="holds no answers yet"):
        CachedTeacher(tmp_path / "cache")


def test_padded_batches_find_rows_that_were_cached_in_others(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"input_ids": row["input_ids"][: 3 + at % 5].tolist(), "labels": at % 3} for at, row in enumerate(class_rows())
    ]
    collator = DataCollatorWithPadding(tokenizer)
    cache_teacher(bert(seed=1), rows, tmp_path / "cache", collator=collator, batch_size=5)
    results = []
    for teacher in (bert(seed=1), tmp_path / "cache"):
        trainer = distiller(
            bert(), teacher, tmp_path, rows, temperature=None, data_collator=collator, per_device_train_batch_size=3
        )
        trainer.train()
        results.append(trainer.state.log_history[0]["kd_loss"])
    assert results[1] == pytest.approx(results[0], rel=1e-5)
