"""Data that do not fit a task are one clear message before the first stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from hfcompress.checks import check_before_work
from hfcompress.data import data_digest, load_splits
from hfcompress.errors import DataError, HFCompressError, ModelError, RecipeError
from hfcompress.job import Source
from hfcompress.recipe import DataSpec
from hfcompress.tasks import batches
from hfcompress.tasks.sounds import read_sound
from tests.conftest import word_tokenizer
from tests.kinds import family
from tests.runs import WORDS
from tests.tiny_tasks import TINY, encoder, lines, sound_bytes, text_tokenizer

Change = Callable[[list[dict[str, Any]]], None]


def changed(name: str, folder: Path, change: Change | None = None, **data: Any) -> Source:
    """A task's recipe whose first rows were changed on disk."""
    recipe = TINY[name].recipe(folder, **data)
    if change is not None:
        (path,) = folder.glob("*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        lines(path, rows)
    return Source(recipe)


def put(column: str, value: Any) -> Change:
    """Give every row the same value, so that the fault is in every part of the data."""
    return lambda rows: [row.update({column: value}) for row in rows] and None


FAULTS: list[tuple[str, Change | None, dict[str, Any], type[HFCompressError], str]] = [
    ("single-label", None, {"text_column": "texts"}, DataError, "no column 'texts'. Did you mean 'text'"),
    ("single-label", None, {"problem_type": "multi_label_classification"}, DataError, "needs a list of labels in"),
    ("single-label", put("label", "words"), {"problem_type": "regression"}, DataError, "A regression needs numbers"),
    ("single-label", lambda rows: [row.update(label=i % 3) for i, row in enumerate(rows)] and None, {}, ModelError,
     "trained head of 2 labels, but the data have 3"),
    ("single-label", lambda rows: [row.update(label=i / 3) for i, row in enumerate(rows)] and None, {}, ModelError,
     "trained head of 2 labels, but the data have 1: a number"),
    ("token-classification", put("tokens", "one text"), {}, DataError, "must hold lists of words and of tags"),
    ("token-classification", put("ner_tags", ["O"]), {}, DataError, r"Row \d+ has \d words in 'tokens' and 1 tags"),
    ("question-answering", put("answers", "text"), {}, DataError, "'text' and 'answer_start', as SQuAD does"),
    ("question-answering", put("answers", {"text": ["nowhere"], "answer_start": [2]}), {}, DataError,
     "answer 'nowhere' does not stand at character 2 of column 'context'"),
    ("question-answering", put("answers", {"text": [], "answer_start": []}), {}, DataError,
     "Set data.version_2_with_negative: true"),
    ("question-answering", None, {"doc_stride": 16}, DataError, "doc_stride is 16 tokens, which windows of"),
    ("question-answering", None, {"doc_stride": 14}, DataError, "leaves no room for its context"),
    ("question-answering", put("question", " ".join(WORDS)), {}, DataError, "leaves no room for its context"),
    ("multiple-choice", put("label", 4), {}, DataError, "label 4 is not one of its 4 endings, 0 to 3"),
    ("multiple-choice", None, {"ending_columns": ["ending0"]}, DataError, "two or more columns of text"),
    ("seq2seq-lm", None, {"source_lang": "en", "target_lang": "de"}, DataError, "no column 'translation'"),
    ("seq2seq-lm", put("translation", {"en": "a"}), {"source_lang": "en", "target_lang": "de"}, DataError,
     "column 'translation' has no 'de', only en"),
    ("speech-ctc", put("audio", "nowhere.wav"), {}, DataError,
     r"sound in row 0 of column 'audio' \(nowhere.wav\) cannot be"),
    ("speech-ctc", None, {"max_duration_in_seconds": 0.01}, DataError, r"All \d+ sounds .* are longer than 0.01 s"),
    ("speech-ctc", None, {"min_duration_in_seconds": 0.5}, DataError, r"shorter than 0.5 s .*they have 0.1 to 0.1 s"),
    ("seq2seq-lm", None, {"forced_bos_token": "flim"}, DataError, "'flim' is no token .*Did you mean 'film'"),
    ("speech-seq2seq", None, {"max_target_length": 99}, ModelError, "99 tokens, but the model writes at most 16"),
    ("speech-seq2seq", None, {"language": "german"}, ModelError, "language is for multilingual Whisper"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "data", "error", "message"), FAULTS, ids=[f"{one[0]}-{one[4][:24]}" for one in FAULTS]
)
def test_a_fault_is_known_before_the_first_stage(
    name: str, change: Change | None, data: dict[str, Any], error: type[HFCompressError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        check_before_work(changed(name, tmp_path, change, **data))


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    recipe = TINY["image-classification"].recipe(tmp_path)
    broken = tmp_path / "images" / "dark" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=r"image in row \d+ of column 'image' \(.*3\.png\) cannot be read.*Remove or"):
        check_before_work(Source(recipe))
    broken.write_text("no image")
    with pytest.raises(DataError, match=r"3\.png\) cannot be read"):
        check_before_work(Source(recipe))


def test_folders_of_images_are_splits(tmp_path: Path) -> None:
    tiny = TINY["image-classification"]
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        tiny.data(tmp_path / name)
    folders = {f"{name}_dir": str(tmp_path / name / "images") for name in ("train", "validation")}
    # A class whose name is that of a split, and one that only the training images have.
    (tmp_path / "train" / "images" / "dark").rename(tmp_path / "train" / "images" / "test")
    for image in (tmp_path / "validation" / "images" / "dark").iterdir():
        image.unlink()
    tiny.write(tmp_path / "model")
    recipe = tiny.recipe(tmp_path, id=None, **folders)
    source = Source(recipe)
    check_before_work(source)
    assert source.labels == ["light", "test"]
    assert (len(source.raw["train"]), len(source.raw["held_out"])) == (40, 20)
    assert {row["labels"] for row in source.encoded("held_out")} == {0}
    before = data_digest(recipe.data)
    (tmp_path / "validation" / "images" / "light" / "0.png").unlink()
    assert data_digest(recipe.data) != before


def test_folders_that_cannot_be_splits(tmp_path: Path) -> None:
    tiny = TINY["image-classification"]
    tiny.data(tmp_path)
    images = tmp_path / "images"
    inside = {"train": str(images), "validation": str(images / "dark")}
    with pytest.raises(
        DataError, match=r"dark \(validation\) lies in .*images \(train\), which data.files names, too"
    ):
        check_before_work(Source(tiny.recipe(tmp_path, id=None, files=inside)))
    with pytest.raises(DataError, match=r"is a folder\. A split is files, or one folder of"):
        check_before_work(Source(tiny.recipe(tmp_path, id=None, files=[str(images / "dark"), str(images / "light")])))
    texts = TINY["single-label"]
    texts.data(tmp_path / "images" / "dark")
    (tmp_path / "texts").mkdir()
    texts.data(tmp_path / "texts")
    with pytest.raises(DataError, match="is a folder, but not one of images or sounds: name its files"):
        load_splits(DataSpec(files=str(tmp_path / "texts")), 0, needs_calibration=False)


def test_metrics_must_fit_the_answers(tmp_path: Path) -> None:
    source = changed("question-answering", tmp_path)
    recipe = TINY["question-answering"].recipe(tmp_path, stages=None)
    object.__setattr__(recipe.evaluate, "metrics", ("accuracy",))
    with pytest.raises(
        DataError, match=r"'accuracy' takes classes .* answers are answers\. Metrics that fit: exact_match"
    ):
        check_before_work(Source(recipe))
    assert source.metrics == ("exact_match", "answer_f1")


@pytest.mark.parametrize("name", ["token-classification", "multi-label", "regression"])
def test_a_new_head_must_be_trained_first(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    with pytest.raises(ModelError, match=r"no trained head for .*Begin the recipe with a finetune stage"):
        check_before_work(Source(tiny.recipe(tmp_path, stages=[tiny.stages()[-1]])))


@pytest.mark.parametrize("teacher", ["original", ["finetune", "original"]])
def test_a_model_without_the_head_is_no_teacher(teacher: str | list[str], tmp_path: Path) -> None:
    tiny = TINY["multi-label"]
    finetune = tiny.stages()[0]
    stages = [finetune, {"distill": {"steps": 1, "teacher": teacher}}]
    with pytest.raises(ModelError, match=r"no trained head for .*nothing to teach.*teacher: finetune"):
        check_before_work(Source(tiny.recipe(tmp_path, stages=stages)))
    inner = {"steps": 1, "teacher": "original", "losses": ["hidden_states"]}
    check_before_work(Source(tiny.recipe(tmp_path, stages=[finetune, {"distill": inner}])))


@pytest.mark.parametrize(
    ("name", "headless"),
    [
        ("masked-lm", encoder(hf.BertModel)),
        ("causal-lm", lambda: hf.LlamaModel(family("llama")().config)),
        ("seq2seq-lm", lambda: hf.T5EncoderModel(family("t5")().config)),
    ],
)
def test_a_model_that_predicts_no_tokens_is_no_teacher_of_a_language_model(
    name: str, headless: Callable[[], hf.PreTrainedModel], tmp_path: Path
) -> None:
    for folder in ("model", "teacher"):
        TINY[name].write(tmp_path / folder)
    headless().save_pretrained(tmp_path / "teacher")
    stages = [{"distill": {"steps": 1, "teacher": str(tmp_path / "teacher")}}]
    with pytest.raises(ModelError, match=f"Model '.*teacher' lacks .* weights of a {name} model"):
        check_before_work(Source(TINY[name].recipe(tmp_path, stages=stages)))
    headless().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=f"Model '.*model' lacks .* weights of a {name} model"):
        Source(TINY[name].recipe(tmp_path)).open_original()


def test_embeddings_are_not_finetuned(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\[0\]: sentence-embeddings have no labels.*use distill"):
        TINY["sentence-embeddings"].recipe(tmp_path, stages=[{"finetune": {"steps": 1}}])


def test_models_of_another_kind(tmp_path: Path) -> None:
    encoder(hf.BertForMaskedLM)().save_pretrained(tmp_path / "model")
    text_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="has no encoder and decoder"):
        check_before_work(Source(TINY["seq2seq-lm"].recipe(tmp_path)))
    word_tokenizer(WORDS).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="needs a tokenizer with a mask token"):
        check_before_work(Source(TINY["masked-lm"].recipe(tmp_path)))
    with pytest.raises(ModelError, match="has no processor that can be opened"):
        check_before_work(Source(TINY["image-classification"].recipe(tmp_path)))


def test_a_teacher_of_other_vectors(tmp_path: Path) -> None:
    encoder(hf.BertModel)().save_pretrained(tmp_path / "model")
    hf.BertModel(
        hf.BertConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=1, vocab_size=64)
    ).save_pretrained(tmp_path / "teacher")
    for folder in ("model", "teacher"):
        text_tokenizer().save_pretrained(tmp_path / folder)
    stages = [{"distill": {"steps": 1, "teacher": str(tmp_path / "teacher")}}]
    with pytest.raises(ModelError, match="gives 32 numbers for a row and the teacher 48"):
        check_before_work(Source(TINY["sentence-embeddings"].recipe(tmp_path, stages=stages, max_length=8)))


def test_short_sounds_are_left_out(tmp_path: Path) -> None:
    source = changed("speech-seq2seq", tmp_path, min_duration_in_seconds=0.105, max_duration_in_seconds=0.135)
    lengths = {round(len(read_sound(row["audio"], "audio", 0, 16_000)) / 16_000, 2) for row in source.raw["train"]}
    assert lengths == {0.11, 0.12, 0.13}


def test_generated_texts_begin_with_the_forced_token(tmp_path: Path) -> None:
    source = changed("seq2seq-lm", tmp_path, forced_bos_token="film")
    rows, held_out = source.held_out()
    reader, model = source.task.reader(held_out), source.open_original()
    batch = batches(rows, source.task.collator(source.processor, source.recipe.data), 4)[0]
    assert all(text.split()[0] == "film" for text in reader.generated(model, batch))


def test_sounds_of_another_rate_are_converted(tmp_path: Path) -> None:
    source = changed("speech-ctc", tmp_path)
    path = next((tmp_path / "sounds").glob("*.wav"))
    for file in (tmp_path / "sounds").glob("*.wav"):
        file.write_bytes(sound_bytes(0.2, rate=8_000))
    rows = source.encoded("train")
    assert path.is_file()
    assert rows[0]["input_values"].shape == (3200,)
