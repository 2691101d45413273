"""Pruning a sentence classifier: accuracy against sparsity and structure, on SST-2 with all-MiniLM-L6-v2.

    python benchmarks/prune_sst2.py --data sst2_train.tsv --output runs/prune_sst2 --seeds 0 1 2

The file is SST-2's training split, see ``sst2.py``, of which whole sentences are held out.  Every row of the table is
kept as JSON and every model as a checkpoint, so a killed run goes on where it was; ``--only`` runs some rows.  What
was measured so far is in ``results/sst2``: copied to the output folder, it is shown beside what is run.  A second
table has the comparisons that matter, see ``paired.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paired import show_paired
from row_names import slug
from sst2 import FASTER, NO_DROPOUT, Bench, Result, Results, arguments, dense, run_rows, spread
from table import machine, once, show
from torch.nn.utils import prune as torch_prune
from transformers import PreTrainedModel, TrainerCallback

import hfcompress
from hfcompress.distillation.losses import ForwardKL, HiddenStates
from hfcompress.pruning.masks import prunable_weights, sparsity_of
from hfcompress.publish.pictures import draw_kept

# Logits at temperature 2, and what the layers hand on: the pruned model has its teacher's shape until it is cut.
TAUGHT: dict[str, Any] = {
    "alpha": 0.9,
    "losses": [ForwardKL(temperature=2.0), HiddenStates(weight=1.0)],
    **FASTER,
}


def weights_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Return how sparse the linear layers of the stack are."""
    return {"sparsity": sparsity_of(prunable_weights(model))}


def gradual(sparsity: float) -> Callable[[Bench], Result]:
    """Train the dense model's copy from the dense model while its weights are pruned."""

    def run(bench: Bench) -> Result:
        model = bench.open(**NO_DROPOUT)
        bench.distil(model, [hfcompress.PruneCallback(sparsity=sparsity)], **TAUGHT)
        return model, weights_facts(model)

    return run


def without_teacher(bench: Bench) -> Result:
    """Prune 80% gradually with the task loss alone."""
    model = bench.open()
    callback = hfcompress.PruneCallback(sparsity=0.8)
    bench.fit(model, [callback])
    return model, weights_facts(model)


def at_once(bench: Bench, taught: bool) -> Result:
    """Prune 80% at once with torch.nn.utils.prune, then train as long with fixed masks."""
    model = bench.open(**(NO_DROPOUT if taught else {}))
    modules = [model.get_submodule(name.removesuffix(".weight")) for name in prunable_weights(model)]
    pairs = [(module, "weight") for module in modules]
    torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=0.8)
    bench.distil(model, **TAUGHT) if taught else bench.fit(model)
    for module in modules:
        torch_prune.remove(module, "weight")
    return model, weights_facts(model)


def structure(neurons: float, **changes: Any) -> Callable[[Bench], Result]:
    """Train the dense model's copy while half of its heads and a share of its neurons close, then cut them out."""

    def run(bench: Bench) -> Result:
        model = bench.open(**NO_DROPOUT)
        callbacks: list[TrainerCallback] = [
            hfcompress.HeadPruneCallback(sparsity=0.5, **changes),
            hfcompress.NeuronPruneCallback(sparsity=neurons, **changes),
        ]
        bench.distil(model, callbacks, **TAUGHT)
        report = hfcompress.shrink(model)
        return model, {"kept": {"heads": report.heads, "neurons": report.neurons}}

    return run


# The prototype that gradual and global must beat: scores of each layer apart, once, after the gates' gradients of the
# first hundredth of the run; the rest of the run recovers.
PROTOTYPE: dict[str, Any] = {"schedule": "oneshot", "start": 0.01, "scope": "layer"}
HALF, QUARTER = "1/2 heads, 1/2 neurons", "1/2 heads, 1/4 neurons"

ROWS: dict[str, Callable[[Bench], Result]] = {
    "dense": dense,
    "60% gradual, teacher": gradual(0.6),
    "80% gradual, teacher": gradual(0.8),
    "90% gradual, teacher": gradual(0.9),
    "80% gradual, no teacher": without_teacher,
    "80% at once, fixed masks, teacher": partial(at_once, taught=True),
    "80% at once, fixed masks, no teacher": partial(at_once, taught=False),
    HALF: structure(0.5),
    QUARTER: structure(0.75),
    f"{HALF}, at once per layer": structure(0.5, **PROTOTYPE),
    f"{QUARTER}, at once per layer": structure(0.75, **PROTOTYPE),
}

PAIRS = [
    *((f"{share}% gradual, teacher", "dense") for share in (60, 80, 90)),
    *(("80% gradual, teacher", f"80% at once, fixed masks, {kind}") for kind in ("teacher", "no teacher")),
    *((units, other) for units in (HALF, QUARTER) for other in ("dense", f"{units}, at once per layer")),
]


def forward_seconds(models: dict[str, PreTrainedModel], dtype: torch.dtype, rounds: int = 31) -> dict[str, float]:
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
    parser = arguments(__doc__, ROWS, "runs/prune_sst2")
    parser.add_argument("--no-speed", action="store_true", help="do not time forward passes")
    given = parser.parse_args()
    benches, results = run_rows(given, ROWS)
    speed = {} if given.no_speed else _speed(benches, list(results), given.output / "speed.json")
    header = [
        "row",
        "parameters (M)",
        "sparsity",
        "accuracy",
        "spread",
        "against dense",
        "float32",
        "bfloat16",
        "seconds",
    ]
    show(header, [_cells(name, results, speed.get(name)) for name in results])
    show_paired(PAIRS, results)
    for name, rows in results.items():
        if "kept" in rows[0]:
            print(f"{name}: {_draw(name, rows[0]['kept'], given.output)}")


def _draw(name: str, kept: dict[str, dict[str, list[int]]], folder: Path) -> Path | None:
    rows = {
        unit: {place: (before, after) for place, (before, after) in enumerate(blocks.values())}
        for unit, blocks in kept.items()
    }
    return draw_kept(rows, f"{name} (first seed)", folder / f"{slug(name)}.png")


def _speed(benches: list[Bench], names: list[str], file: Path) -> dict[str, list[float]]:
    """Return how many times as fast as dense each is, in float32 and bfloat16, of the first seed with all models."""
    whole = [bench for bench in benches if all(bench.model_folder(name).is_dir() for name in names)]

    def make() -> dict[str, Any]:
        found: dict[str, Any] = {name: [] for name in names}
        for dtype in (torch.float32, torch.bfloat16):
            seconds = forward_seconds({name: whole[0].open(name) for name in names}, dtype)
            for name in names:
                found[name].append(seconds["dense"] / seconds[name])
        return {"machine": machine(), "seed": whole[0].seed, "times": found}

    return dict(once(file, make)["times"]) if whole or file.is_file() else {}


def _cells(name: str, results: Results, speed: list[float] | None) -> list[str]:
    mine, base = results[name], results["dense"]
    accuracy = [100 * one["accuracy"] for one in mine]
    against = statistics.mean(accuracy) - statistics.mean(100 * one["accuracy"] for one in base)
    shown = [f"{one:.2f}x" for one in speed] if speed else ["not measured"] * 2
    return [
        name,
        f"{mine[0]['parameters'] / 1e6:.2f}",
        f"{statistics.mean(one.get('sparsity', 0.0) for one in mine):.3f}",
        f"{statistics.mean(accuracy):.2f}",
        spread(accuracy),
        f"{against:+.2f}",
        *shown,
        f"{statistics.mean(one['seconds'] for one in mine):.0f}",
    ]


if __name__ == "__main__":
    main()
