"""Every task with a tiny model, its processor and a local data file."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers as hf

from hfcompress.recipe import Recipe, parse_recipe
from tests.conftest import word_tokenizer
from tests.kinds import encoder, family, wav2vec2
from tests.runs import WORDS, write_text

TAGS = ["O", "B-ART", "I-ART"]
LETTERS = [" ", *"abcdefghij"]


@dataclasses.dataclass(frozen=True)
class TinyTask:
    """model, processor: what is saved as the model's folder.  data: writes rows and returns the data section.


    learns: whether a recipe can begin with a finetune stage.  rows: of the data.
    """

    task: str
    model: Callable[[], hf.PreTrainedModel]
    processor: Callable[[], Any]
    data: Callable[[Path], dict[str, Any]]
    evaluate: dict[str, Any] = dataclasses.field(default_factory=dict)
    learns: bool = True

    def write(self, folder: Path) -> Path:
        """Save the model and what makes its inputs."""
        torch.manual_seed(0)
        self.model().save_pretrained(folder)
        self.processor().save_pretrained(folder)
        return folder

    def recipe(self, folder: Path, stages: list[dict[str, Any]] | None = None, **data: Any) -> Recipe:
        """Return a recipe of this task; the model is written to ``folder/model`` unless it is there."""
        if not (folder / "model").is_dir():
            self.write(folder / "model")
        return parse_recipe(
            {
                "name": "tiny",
                "task": self.task,
                "model": {"id": str(folder / "model")},
                "data": {**self.data(folder), **data},
                "output": str(folder / "out"),
                "evaluate": {"batch_size": 4, **self.evaluate},
                "stages": stages or self.stages(),
            }
        )

    def stages(self) -> list[dict[str, Any]]:
        """Return all that is done to a model, in two steps each."""
        training = {"per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-3, "bf16": False}
        finetune = {"finetune": {"steps": 2, "training": training}}
        prune = {"sparsity": 0.5, "start": 0.0, "end": 0.5}
        teacher = "finetune" if self.learns else "original"
        distill = {"distill": {"steps": 2, "teacher": teacher, "prune": prune, "training": training}}
        quantize = {"quantize": {"method": "rtn", "bits": 8}}
        return [*([finetune] if self.learns else []), distill, quantize]


def text_tokenizer() -> Any:
    """The tests' tokenizer of known words, with a token that hides others."""
    tokenizer = word_tokenizer([*WORDS, "[MASK]"])
    tokenizer.mask_token = "[MASK]"
    return tokenizer


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sentences(count: int = 40, seed: int = 0) -> list[list[str]]:
    """Random sentences of different lengths."""
    chooser = random.Random(seed)
    return [chooser.choices(WORDS, k=chooser.randint(3, 9)) for _ in range(count)]


def texts(folder: Path) -> dict[str, Any]:
    return {"files": str(write_text(folder / "text.jsonl", rows=40, words=20)), "block_size": 16}


def hidden_texts(folder: Path) -> dict[str, Any]:
    rows = [{"text": " ".join(words)} for words in sentences()]
    return {"files": lines(folder / "text.jsonl", rows), "max_length": 12, "line_by_line": True}


def reviews(folder: Path) -> dict[str, Any]:
    rows = [{"text": " ".join(words), "label": int("film" in words)} for words in sentences()]
    return {"files": lines(folder / "reviews.jsonl", rows), "max_length": 16}


def topics(folder: Path) -> dict[str, Any]:
    wanted = ["good", "film", "model"]
    rows = [{"text": " ".join(w), "label": [one for one in wanted if one in w]} for w in sentences()]
    return {"files": lines(folder / "topics.jsonl", rows), "max_length": 16}


def scores(folder: Path) -> dict[str, Any]:
    rows = [{"text": " ".join(words), "label": len(words) / 4} for words in sentences()]
    return {"files": lines(folder / "scores.jsonl", rows), "max_length": 16}


def tagged(folder: Path) -> dict[str, Any]:
    def tags(words: list[str]) -> list[str]:
        return ["B-ART" if word == "film" else "I-ART" if word == "scene" else "O" for word in words]

    rows = [{"tokens": words, "ner_tags": tags(words)} for words in [*sentences(), ["film", "scene", "is", "good"]]]
    return {"files": lines(folder / "tagged.jsonl", rows), "max_length": 8}


def questions(folder: Path) -> dict[str, Any]:
    rows = []
    for words in sentences():
        context = " ".join([*words, "the", *words])
        answers = {"text": [words[1]], "answer_start": [len(words[0]) + 1]}
        rows.append({"question": f"{words[0]} is", "context": context, "answers": answers})
    return {"files": lines(folder / "questions.jsonl", rows), "max_length": 16, "doc_stride": 4}


def endings(folder: Path) -> dict[str, Any]:
    chooser = random.Random(1)
    rows = []
    for words in sentences():
        choices = {f"ending{index}": " ".join(chooser.choices(WORDS, k=1 + index)) for index in range(4)}
        rows.append({"sent1": " ".join(words), "sent2": "the", **choices, "label": chooser.randrange(4)})
    return {"files": lines(folder / "endings.jsonl", rows), "max_length": 24}


def summaries(folder: Path) -> dict[str, Any]:
    rows = [{"text": " ".join(words), "summary": " ".join(words[: len(words) // 2 + 1])} for words in sentences()]
    return {"files": lines(folder / "texts.jsonl", rows), "max_source_length": 16, "max_target_length": 8}


def unlabelled(folder: Path) -> dict[str, Any]:
    return {"files": lines(folder / "text.jsonl", [{"text": " ".join(w)} for w in sentences()]), "max_length": 16}


def images(folder: Path) -> dict[str, Any]:
    """A folder of images: a folder for each class."""
    chooser = np.random.default_rng(0)
    for kind, low in (("dark", 0), ("light", 128)):
        where = folder / "images" / kind
        where.mkdir(parents=True, exist_ok=True)
        for index in range(20):
            pixels = chooser.integers(low, low + 127, (8, 8, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(where / f"{index}.png")
    return {"id": str(folder / "images")}


def sound_bytes(seconds: float, rate: int = 16_000, seed: int = 0) -> bytes:
    """A WAV file of noise."""
    samples = np.random.default_rng(seed).normal(0, 3000, int(seconds * rate)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(samples.tobytes())
    return file.getvalue()


def speech(folder: Path, words: list[str] | None = None) -> dict[str, Any]:
    """Sounds of different lengths beside a table that names them."""
    where = folder / "sounds"
    where.mkdir(exist_ok=True)
    rows = []
    for index, said in enumerate(sentences(24)):
        (where / f"{index}.wav").write_bytes(sound_bytes(0.1 + 0.01 * (index % 5), seed=index))
        text = " ".join(said[:2]) if words is None else "".join(words[(index + i) % len(words)] for i in range(2))
        rows.append({"audio": str(where / f"{index}.wav"), "text": text})
    return {"files": lines(folder / "speech.jsonl", rows)}


def spelled(folder: Path) -> dict[str, Any]:
    return speech(folder, words=LETTERS[1:])


def heard() -> Any:
    """A Whisper processor whose sounds are 32 frames long, as the tiny Whisper takes them."""
    extractor = hf.WhisperFeatureExtractor(
        feature_size=8, sampling_rate=16_000, hop_length=500, chunk_length=1, n_fft=1000
    )
    return hf.WhisperProcessor(extractor, word_tokenizer(WORDS))


def spelling() -> Any:
    """A processor of raw sounds and letters."""
    tokenizer = letter_tokenizer()
    extractor = hf.Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=16_000, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )
    return hf.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def letter_tokenizer() -> Any:
    import tempfile

    letters = {
        "[PAD]": 0,
        "<s>": 1,
        "</s>": 2,
        "[UNK]": 3,
        "|": 4,
        **{one: 5 + i for i, one in enumerate(LETTERS[1:])},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(letters))
        return hf.Wav2Vec2CTCTokenizer(str(Path(folder) / "vocab.json"), pad_token="[PAD]", unk_token="[UNK]")


def pixels() -> Any:
    return hf.ViTImageProcessor(size={"height": 8, "width": 8})


TINY: dict[str, TinyTask] = {
    "causal-lm": TinyTask("causal-lm", family("llama"), text_tokenizer, texts),
    "masked-lm": TinyTask("masked-lm", encoder(hf.BertForMaskedLM), text_tokenizer, hidden_texts),
    "single-label": TinyTask(
        "sequence-classification", encoder(hf.BertForSequenceClassification), text_tokenizer, reviews
    ),
    "multi-label": TinyTask("sequence-classification", encoder(hf.BertModel), text_tokenizer, topics),
    "regression": TinyTask("sequence-classification", encoder(hf.BertModel), text_tokenizer, scores),
    "token-classification": TinyTask("token-classification", encoder(hf.BertModel), text_tokenizer, tagged),
    "question-answering": TinyTask(
        "question-answering", encoder(hf.BertForQuestionAnswering), text_tokenizer, questions
    ),
    "multiple-choice": TinyTask("multiple-choice", encoder(hf.BertForMultipleChoice), text_tokenizer, endings),
    "seq2seq-lm": TinyTask(
        "seq2seq-lm", family("t5"), text_tokenizer, summaries, {"metrics": ["perplexity", "rouge_l", "chrf"]}
    ),
    "image-classification": TinyTask("image-classification", family("vit", num_labels=2), pixels, images),
    "speech-seq2seq": TinyTask(
        "speech-seq2seq", family("whisper"), heard, lambda f: {**speech(f), "max_target_length": 8}
    ),
    "speech-ctc": TinyTask("speech-ctc", wav2vec2, spelling, spelled),
    "sentence-embeddings": TinyTask(
        "sentence-embeddings", encoder(hf.BertModel), text_tokenizer, unlabelled, learns=False
    ),
}  # fmt: skip
