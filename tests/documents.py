"""The code in documents, and what stands for a reader's own model, data and folder while it runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, DistilBertConfig, PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from hfcompress.publish import load_facts
from tests.conftest import tiny_llama, token_batches
from tests.families import FAMILIES
from tests.runs import WORDS, write_reviews, write_text
from tests.vocabularies import CASES

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, code) of every block of a Markdown text."""
    return _BLOCK.findall(text)


def readers_names(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return what documents call ``model``, ``dataset`` and so on: tiny models, and rows of their tokens."""
    batches = token_batches(8)
    token_rows = [
        {name: value[0].clamp(max=len(tokenizer) - 1) for name, value in batch.items()}
        for batch in token_batches(32, rows=1)
    ]
    multilingual, its_tokenizer = CASES["gpt2"].make()
    return {
        "model": tiny_llama(layers=4),
        "other": tiny_llama(layers=2, seed=1),
        "another": tiny_llama(layers=2, seed=3),
        "dense": tiny_llama(layers=2, seed=2),
        "student": tiny_llama(layers=2),
        "teacher": tiny_llama(layers=4),
        "args": TrainingArguments(
            output_dir=str(folder / "out"), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=8
        ),
        "dataset": token_rows,
        "summarizer": FAMILIES["t5"].model(),
        "pairs": [{**row, "labels": row["input_ids"][:5]} for row in token_rows],
        "rouge": lambda prediction: {"rougeL": float((prediction.predictions == 5).mean())},
        "batches": batches,
        "rows": [{**batch, "labels": batch["input_ids"]} for batch in batches],
        "other_teacher": CASES["llama3"].make()[0],
        "other_tokenizer": CASES["llama3"].make()[1],
        "multilingual": multilingual,
        "its_tokenizer": its_tokenizer,
        "texts": [" ".join(WORDS)] * 8,
        "original": saved(tiny_llama(layers=4), tokenizer, folder / "original"),
        "tokenizer": tokenizer,
        "folder": str(folder),
    }


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """Save a dense checkpoint and return where it is."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def commands(text: str) -> list[str]:
    """Return the lines of a document's shell blocks, without comments."""
    return [" ".join(shlex.split(line, comments=True)) for language, code in blocks(text) if language == "bash"
            for line in code.splitlines()]  # fmt: skip


def write_readers_files(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write what documents' commands find where they run: models by the names that they have on the Hub, and data."""
    saved(tiny_llama(max_position_embeddings=512), tokenizer, folder / "HuggingFaceTB/SmolLM2-135M")
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    saved(AutoModel.from_config(config), tokenizer, folder / "distilbert/distilbert-base-uncased")
    for name, rows in (("train.csv", 64), ("held-out.csv", 16)):
        texts = write_reviews(folder / name, rows).read_text(encoding="utf-8")
        (folder / name).write_text(texts.replace("text\t", "sentence\t").replace("\t", ","), encoding="utf-8")
    write_text(folder / "texts.jsonl", rows=200)
    (folder / "texts.txt").write_text(" ".join([*WORDS] * 400), encoding="utf-8")
    page = (ROOT / "docs/guides/recipes.md").read_text(encoding="utf-8")
    recipe = next(code for language, code in blocks(page) if language == "yaml")
    (folder / "my-reviews.yaml").write_text(recipe, encoding="utf-8")


def run_python(text: str, source: str, names: dict[str, Any]) -> int:
    """Run a document's Python, block after block, in one namespace; return how many blocks it has."""
    found = [code for language, code in blocks(text) if language == "python"]
    for code in found:
        exec(compile(code, source, "exec"), names)
    return len(found)


def run_card(folder: Path, around: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a card's Python where its checkpoint has the name that the card gives it; return the names that it sets.

    around: an empty folder, in which a reader would keep the checkpoint.
    """
    card = (folder / "README.md").read_text(encoding="utf-8")
    (around / load_facts(folder).name).symlink_to(folder)
    names: dict[str, Any] = {}
    with monkeypatch.context() as there:
        there.chdir(around)
        assert run_python(card, "README.md", names) == 1
    return names
