"""Teachers of a recipe: what the distill stage gets from it, answers written ahead, and refusals before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hfcompress import stages, teaching
from hfcompress.checks import check_before_work
from hfcompress.cli import app
from hfcompress.distillation import CachedTeacher, DistillationTrainer
from hfcompress.errors import DataError, HFCompressError, ModelError, OutputError
from hfcompress.job import Job, Source
from hfcompress.recipe import Recipe
from hfcompress.stages import Outcome, run_stage
from hfcompress.teaching import cache_recipe_teacher
from tests.conftest import tiny_bert, tiny_llama
from tests.distilling import llama
from tests.runs import language_recipe, write_reviews, write_text
from tests.test_distillation_across import TEACHER
from tests.tiny_tasks import TINY

pytestmark = pytest.mark.usefixtures("quick_trainers")


def recipe_of(model: Path, tmp_path: Path, text: Path | None = None, **options: Any) -> Recipe:
    stage = {"distill": {"steps": 2, "training": {"save_strategy": "no"}, **options}}
    text = text or write_text(tmp_path / "text.jsonl", rows=20)
    return language_recipe(model, text, tmp_path / "out", stages=[stage])


def run(recipe: Recipe, tmp_path: Path) -> Outcome:
    source = Source(recipe)
    check_before_work(source)
    model = Path(recipe.model.id)
    return run_stage(recipe.stages[0], Job(source, model, tmp_path / "work", {"original": model}))


def cached(recipe: Recipe, folder: Path, **options: Any) -> Any:
    return cache_recipe_teacher(recipe, folder, **{"teacher": "original", "k": 8, "temperature": 1.0,
                                                   "batch_size": 4, **options})  # fmt: skip


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[DistillationTrainer]:
    """The trainers that stages make."""
    made: list[DistillationTrainer] = []
    original = stages.train
    monkeypatch.setattr(stages, "train", lambda trainer, *rest: (made.append(trainer), original(trainer, *rest)))
    return made


def test_losses_of_a_recipe_reach_the_trainer(llama_dir: Path, tmp_path: Path, trainers: list) -> None:
    losses = ["reverse_kl", {"hidden_states": {"weight": 3}}]
    run(recipe_of(llama_dir, tmp_path, losses=losses), tmp_path)
    (trainer,) = trainers
    assert list(trainer.logit_losses) == ["reverse_kl"]
    assert {name: loss.weight for name, loss in trainer.matcher.losses.items()} == {"hidden_states": 3}


def test_several_teachers_of_a_recipe_have_their_shares(
    llama_dir: Path, tmp_path: Path, tokenizer: Any, trainers: list
) -> None:
    other = tmp_path / "other"
    tiny_llama(seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    options = {"teacher": ["original", str(other)], "teacher_weights": [3, 1]}
    outcome = run(recipe_of(llama_dir, tmp_path, **options), tmp_path)
    assert outcome.summary == f"teacher original and {other}, 2 steps"
    ((first, second),) = [trainer.teachers for trainer in trainers]
    assert (first[1], second[1]) == (0.75, 0.25)
    weights = [one[0].model.get_input_embeddings().weight for one in (first, second)]
    assert not weights[0].equal(weights[1])


def test_answers_written_ahead_stand_for_the_teacher(
    llama_dir: Path, tmp_path: Path, trainers: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "answers"
    report = cached(recipe_of(llama_dir, tmp_path), folder)
    rows = len(Source(recipe_of(llama_dir, tmp_path)).encoded("train"))
    assert (report.examples, report.answers) == (rows, rows * 31)
    opened: list[str] = []
    original = Source.open
    monkeypatch.setattr(
        Source, "open", lambda self, spec, *rest: (opened.append(spec.id), original(self, spec, *rest))[1]
    )
    outcome = run(recipe_of(llama_dir, tmp_path, teacher=str(folder)), tmp_path)
    assert opened == [str(llama_dir)]  # the student
    assert isinstance(trainers[0].teachers[0][0], CachedTeacher)
    assert list(trainers[0].logit_losses) == ["top_k_kl"]
    assert outcome.summary == f"teacher {folder}, 2 steps"


def test_cache_teacher_command_goes_on_where_it_was(llama_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(llama_dir, tmp_path).to_yaml())
    command = ["cache-teacher", str(recipe), "-o", str(tmp_path / "answers"), "--k", "4", "--json"]
    found = [json.loads(CliRunner().invoke(app, command).stdout) for _ in range(2)]
    assert found[0]["found"] == 0
    assert found[1] == {**found[0], "found": found[0]["examples"]}
    assert found[0]["examples"] > 10
    assert CachedTeacher(tmp_path / "answers").index.k == 4


# What cannot work is said before any model is opened


@pytest.fixture
def nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(teaching.opening, "open_model", refuse)


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 65}, ModelError, "k=65 must be at least 1 and at most 255, and there are 64 classes"),
        ({"k": 0}, ModelError, "k=0 must be at least 1"),
        ({"teacher": "distill"}, DataError, "'distill' is a stage of the recipe"),
        ({"teacher": "./nowhere"}, ModelError, "No such model folder"),
    ],
)
def test_faults_of_a_cache_come_first(
    options: dict, error: type[HFCompressError], message: str, llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        cached(recipe_of(llama_dir, tmp_path), tmp_path / "answers", **options)
    assert not (tmp_path / "answers").exists()


@pytest.mark.usefixtures("nothing_opens")
def test_a_folder_with_other_files_is_refused_first(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds other files"):
        cached(recipe_of(llama_dir, tmp_path), llama_dir)


def test_another_teachers_answers_are_refused(llama_dir: Path, tmp_path: Path, tokenizer: Any) -> None:
    other = tmp_path / "other"
    tiny_llama(seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    cached(recipe_of(llama_dir, tmp_path), tmp_path / "answers")
    with pytest.raises(OutputError, match="holds another teacher's answers"):
        cached(recipe_of(llama_dir, tmp_path), tmp_path / "answers", teacher=str(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": ["forward_kl"]}, "holds the 8 most probable classes only; forward_kl needs all"),
        ({"losses": ["relations"]}, "relations looks inside the teacher: it needs one teacher, which is a model"),
        ({"losses": [{"top_k_kl": {"k": 65}}]}, "top_k_kl: k=65 is more than the 64 classes"),
    ],
)
def test_losses_that_answers_on_disk_cannot_serve_are_refused(
    options: dict, message: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(recipe_of(llama_dir, tmp_path), tmp_path / "answers")
    monkeypatch.setattr(teaching.opening, "open_model", None)
    with pytest.raises(ModelError, match=message):
        check_before_work(Source(recipe_of(llama_dir, tmp_path, teacher=str(tmp_path / "answers"), **options)))


def test_answers_to_other_data_are_refused(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(recipe_of(llama_dir, tmp_path), tmp_path / "answers")
    monkeypatch.setattr(teaching.opening, "open_model", None)
    text = write_text(tmp_path / "other.jsonl", rows=30, words=61)
    with pytest.raises(DataError, match="written from other data"):
        check_before_work(Source(recipe_of(llama_dir, tmp_path, text, teacher=str(tmp_path / "answers"))))


def test_answers_to_all_other_rows_are_refused_too(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "text.jsonl", rows=20)
    cached(recipe_of(llama_dir, tmp_path, text), tmp_path / "answers")
    monkeypatch.setattr(teaching.opening, "open_model", None)
    lines = text.read_text().splitlines()
    words = json.loads(lines[3])
    key, value = next(iter(words.items()))
    lines[3] = json.dumps({key: " ".join(value.split()[::-1])})
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="written from other data"):
        check_before_work(Source(recipe_of(llama_dir, tmp_path, other, teacher=str(tmp_path / "answers"))))


def test_answers_to_masks_that_are_drawn_anew_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TINY["masked-lm"].recipe(tmp_path)
    monkeypatch.setattr(teaching.opening, "open_model", None)
    with pytest.raises(DataError, match="masked-lm hides other tokens in every epoch, so no training would find"):
        cached(recipe, tmp_path / "answers", k=4)
    assert not (tmp_path / "answers").exists()


def test_a_classifiers_answers_have_its_labels(tmp_path: Path, tokenizer: Any) -> None:
    teacher = tmp_path / "teacher"
    tiny_bert(num_labels=2, seed=3).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    data = {"files": str(write_reviews(tmp_path / "reviews.tsv")), "max_length": 32}
    changes = {"task": "sequence-classification", "data": data, "evaluate": {}}
    stage = {"distill": {"steps": 2, "teacher": str(teacher), "training": {"save_strategy": "no"}}}
    recipe = language_recipe(teacher, Path("none"), tmp_path / "out", stages=[stage], **changes)
    report = cached(recipe, tmp_path / "answers", teacher=str(teacher), k=None)
    assert report.answers == report.examples == 108
    assert CachedTeacher(tmp_path / "answers").index.classes == 2


# Vocabularies


def padded(folder: Path, tokenizer: Any, size: int) -> str:
    tiny_llama(vocab_size=size, seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_teacher_with_a_padded_vocabulary_is_aligned(
    llama_dir: Path, tmp_path: Path, tokenizer: Any, trainers: list
) -> None:
    teacher = padded(tmp_path / "padded", tokenizer, 72)
    run(recipe_of(llama_dir, tmp_path, teacher=teacher), tmp_path)
    assert trainers[0].shared_classes == 64
    assert trainers[0].state.global_step == 2


@pytest.mark.parametrize("name", ["masked-lm", "seq2seq-lm", "speech-seq2seq", "speech-ctc"])
def test_a_padded_vocabulary_is_aligned_in_every_task_of_tokens(name: str, tmp_path: Path, trainers: list) -> None:
    tiny = TINY[name]
    size = tiny.model().config.vocab_size
    tiny.write(tmp_path / "teacher")
    model = tiny.model()
    config = type(model.config).from_dict({**model.config.to_dict(), "vocab_size": size + 8})
    type(model)(config).save_pretrained(tmp_path / "teacher")
    stages = [{"distill": {"steps": 2, "teacher": str(tmp_path / "teacher"), "training": {"save_strategy": "no"}}}]
    outcome = run(tiny.recipe(tmp_path, stages=stages), tmp_path)
    assert trainers[0].shared_classes == size
    assert trainers[0].state.log_history[-1]["train_loss"] > 0
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    was, now = ([getattr(one, name, None) for name in special] for one in (model.config, outcome.model.config))
    assert now == was, "a teacher's size is no reason to take other special tokens"


def test_answers_of_a_padded_vocabulary_are_aligned(
    llama_dir: Path, tmp_path: Path, tokenizer: Any, trainers: list
) -> None:
    cached(recipe_of(llama_dir, tmp_path), tmp_path / "answers", teacher=padded(tmp_path / "padded", tokenizer, 72))
    run(recipe_of(llama_dir, tmp_path, teacher=str(tmp_path / "answers")), tmp_path)
    assert trainers[0].shared_classes == 64
    assert trainers[0].state.global_step == 2


def test_a_teacher_that_knows_fewer_tokens_than_the_tokenizer_is_refused(
    llama_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    teacher = padded(tmp_path / "small", tokenizer, len(tokenizer) - 1)
    with pytest.raises(ModelError, match="one of the models knows only"):
        check_before_work(Source(recipe_of(llama_dir, tmp_path, teacher=teacher)))


# Tokenizers


def reading_bytes(folder: Path) -> str:
    """Save a causal language model whose tokens are not the recipe's."""
    llama(vocab_size=len(TEACHER), seed=5, bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(folder)
    TEACHER.save_pretrained(folder)
    return str(folder)


def test_a_recipe_distils_across_tokenizers(llama_dir: Path, tmp_path: Path, trainers: list) -> None:
    teacher = reading_bytes(tmp_path / "teacher")
    losses = [{"universal_logit": {"top": 8}}]
    run(recipe_of(llama_dir, tmp_path, teacher=["original", teacher], losses=losses), tmp_path)
    (trainer,) = trainers
    labelled, own, other = (trainer.counts[name] for name in ("places", "places of teacher 0", "places of teacher 1"))
    assert own == labelled > 200  # the student's own tokens, every one of them
    assert 0.9 * labelled < other < labelled  # whole words; not what stands before the first
    assert trainer.teachers[1][0].teacher_spans.tokenizer.get_vocab() == TEACHER.get_vocab()
    assert trainer.state.log_history[-1]["train_loss"] > 0


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (None, r"Token 0 is '\[PAD\]' for the student .*losses=\['universal_logit'\]"),
        (["universal_logit", "reverse_kl"], "reverse_kl compares the same tokens"),
    ],
)
def test_other_tokenizers_are_refused_unless_asked_for(
    losses: Any, message: str, llama_dir: Path, tmp_path: Path
) -> None:
    teacher = reading_bytes(tmp_path / "teacher")
    with pytest.raises(ModelError, match=message):
        check_before_work(Source(recipe_of(llama_dir, tmp_path, teacher=teacher, losses=losses)))


def test_what_cannot_cross_tokenizers_is_refused_first(
    llama_dir: Path, bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(recipe_of(llama_dir, tmp_path), tmp_path / "answers")
    monkeypatch.setattr(teaching.opening, "open_model", None)
    across: dict[str, Any] = {"losses": ["universal_logit"]}
    with pytest.raises(ModelError, match="holds answers to the student's tokens"):
        check_before_work(Source(recipe_of(llama_dir, tmp_path, teacher=str(tmp_path / "answers"), **across)))
    data = {"files": str(write_reviews(tmp_path / "reviews.tsv")), "max_length": 32}
    changes = {"task": "sequence-classification", "data": data, "evaluate": {}}
    stages = [{"finetune": {"steps": 1}}, {"distill": {"steps": 2, "teacher": "finetune", **across}}]
    with pytest.raises(ModelError, match=r"two causal language models.* the task is sequence-classification"):
        check_before_work(Source(language_recipe(bert_dir, Path("none"), tmp_path / "out", stages=stages, **changes)))
