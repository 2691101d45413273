"""Tiny models and a tokenizer made here, so that no test needs the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import gc
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hfcompress import pipeline
from hfcompress.checkpoint import verify
from tests.forks import Forks
from tests.runs import WORDS, language_recipe, write_text

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]
VOCABULARY_SIZE = 64

# The files that take longest: they come first, so that processes which share the files end together.
LONGEST = [
    f"test_{name}.py"
    for name in (
        "docs", "readme", "structure_shrink", "resume", "fresh", "quantized_families", "push", "column_kernel",
        "mixed_bits", "publish", "shrink_stock", "pruning_trainer", "shrink_reload", "task_recipes",
        "uneven_registration", "quantize_low_memory", "unit_pruning_trainer", "bitsandbytes", "pruning_criteria",
        "faults", "evaluate", "quantization_grids", "pipeline", "checkpoint", "vocabulary_recipe", "imports",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the special tokens and these words, in this order."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )


def tiny_llama(layers: int = 2, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A Llama of hidden size 64 with two key/value heads for four query heads."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 4,
        "eos_token_id": 5,
        "tie_word_embeddings": True,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**options, **changes}))


def tiny_bert(layers: int = 2, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A BERT classifier of hidden size 32, without dropout so that runs can be compared."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 2,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
    }
    return AutoModelForSequenceClassification.from_config(BertConfig(**{**options, **changes}))


def tiny_gpt2_classifier(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A decoder that classifies by the last token of a row; its config names no padding token."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY_SIZE,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 4,
        "eos_token_id": 5,
        "num_labels": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return AutoModelForSequenceClassification.from_config(GPT2Config(**{**options, **changes}))


def token_batches(count: int = 4, rows: int = 4, length: int = 16, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random token batches with labels, as a causal language model takes them."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(6, VOCABULARY_SIZE, (rows, length), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one.clone()} for one in ids]


@pytest.fixture
def llama_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved tiny Llama with its tokenizer."""
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bert_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved tiny BERT classifier with its tokenizer."""
    folder = tmp_path / "bert"
    tiny_bert().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with what ``language_recipe`` needs: a Llama of four layers and some text."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_llama(layers=4).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs hfcompress's commands in processes of their own, without the imports that cost seconds."""
    forks = Forks.start()
    yield forks
    forks.close()


@contextmanager
def forking(forks: Forks) -> Iterator[None]:
    """Let the processes that measure and verify be forks, too."""

    def run(words: Sequence[str]) -> int:
        return forks.run_instead([sys.executable, "-m", "hfcompress", *words]).returncode

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verify, "subprocess", SimpleNamespace(run=forks.run_instead))
        patched.setattr(pipeline, "FreshProcesses", lambda *preload: nullcontext(SimpleNamespace(run=run)))
        yield


@pytest.fixture
def forked(forks: Forks) -> Iterator[None]:
    """Take the processes that measure and verify from forks: for what a new interpreter would not show either."""
    with forking(forks):
        yield


@pytest.fixture(scope="session")
def finished(sources: Path, forks: Forks) -> Path:
    """One uninterrupted run, shared by all tests that look at its result or compare with it."""
    with forking(forks):
        return pipeline.compress(language_recipe(sources / "llama", sources / "text.jsonl", sources / "out"))


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pictures be files that start as pictures do: painting one takes longer than writing a card."""
    monkeypatch.setattr(Figure, "draw_without_rendering", lambda figure: None)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"\x89PNG"))


@pytest.fixture
def few_tokens_are_fine() -> Iterator[None]:
    """Let tiny models be calibrated on a few tokens, with groups that do not divide their columns, in silence."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*calibration tokens are fewer")
        warnings.filterwarnings("ignore", message="Group sizes that do not divide")
        yield


@pytest.fixture(scope="module")
def quick_trainers() -> Iterator[None]:
    """Spare each tiny training what costs more than itself: threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _no_garbage_among_the_imports() -> Iterator[None]:
    """Let nothing look for garbage among what was there before: trainings and measurements collect it, and often."""
    gc.freeze()
    yield
    gc.unfreeze()
