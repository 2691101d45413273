"""Distilling a sentence classifier into smaller ones: accuracy of students on SST-2 with all-MiniLM-L6-v2.

    python benchmarks/distill_sst2.py --data sst2_train.tsv --output runs/distill_sst2 --seeds 0 1 2

The file is SST-2's training split, see ``sst2.py``, of which whole sentences are held out.  The teacher is the
fine-tuned model of six layers, and the students of three begin as its layers 1, 3 and 5.  All students are trained for
as long: with a teacher at three times the learning rate and without dropout, which a student alone is also tried with.
Every row of the table is kept as JSON and every model as a checkpoint, so a killed run goes on where it was;
``--only`` runs some rows.  A folder of ``prune_sst2.py`` holds the same teachers.

A second table has what a teacher, and what features beside logits, add to the students of three layers, see
``paired.py``.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

from paired import show_paired
from sst2 import FASTER, NO_DROPOUT, Bench, Result, Results, arguments, dense, run_rows, spread
from table import show
from transformers import PreTrainedModel, set_seed

from hfcompress.distillation import make_student
from hfcompress.distillation.losses import ForwardKL, HiddenStates, Loss, Relations

Maker = Callable[[PreTrainedModel], PreTrainedModel]

LOGITS = ForwardKL(temperature=2.0)
RELATIONS = Relations(weight=1.0, layers="last")
HIDDEN = HiddenStates(weight=1.0)


def three_layers(teacher: PreTrainedModel) -> PreTrainedModel:
    """Return the teacher's layers 1, 3 and 5."""
    return make_student(teacher, layers=3)


def half_width(teacher: PreTrainedModel) -> PreTrainedModel:
    """Return two layers of half the width, with random weights."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = 2
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        setattr(config, name, getattr(config, name) // 2)
    return make_student(teacher, config=config)


def taught(student: Maker, *losses: Loss) -> Callable[[Bench], Result]:
    """Train a student on the task and by these losses."""

    def run(bench: Bench) -> Result:
        set_seed(bench.seed)
        model = student(bench.open(**NO_DROPOUT))
        bench.distil(model, alpha=0.9, losses=list(losses), **FASTER)
        return model, {"layers": model.config.num_hidden_layers}

    return run


def alone(student: Maker, as_taught: bool = False) -> Callable[[Bench], Result]:
    """Train a student on the task alone, as long and with the same first weights.

    as_taught: with the settings of the students that have a teacher.
    """

    def run(bench: Bench) -> Result:
        set_seed(bench.seed)
        model = student(bench.open(**(NO_DROPOUT if as_taught else {})))
        bench.fit(model, **(FASTER if as_taught else {}))
        return model, {"layers": model.config.num_hidden_layers}

    return run


ALIKE = "3 layers, no teacher, taught ones' settings"
ROWS: dict[str, Callable[[Bench], Result]] = {
    "dense": dense,
    "3 layers, no teacher": alone(three_layers),
    ALIKE: alone(three_layers, as_taught=True),
    "3 layers, logits": taught(three_layers, LOGITS),
    "3 layers, logits and hidden states": taught(three_layers, LOGITS, HIDDEN),
    "3 layers, logits and relations": taught(three_layers, LOGITS, RELATIONS),
    "2 layers of half width, no teacher": alone(half_width),
    "2 layers of half width, logits and hidden states": taught(half_width, LOGITS, HIDDEN),
}
FEATURES = ("3 layers, logits and hidden states", "3 layers, logits and relations")
PAIRS = [
    *((name, "3 layers, no teacher") for name in ("3 layers, logits", *FEATURES, ALIKE)),
    *((name, "3 layers, logits") for name in FEATURES),
    *((name, ALIKE) for name in ("3 layers, logits", *FEATURES)),
    ("2 layers of half width, logits and hidden states", "2 layers of half width, no teacher"),
]


def main() -> None:
    """Run the rows that were asked for and print the table."""
    _, results = run_rows(arguments(__doc__, ROWS, "runs/distill_sst2").parse_args(), ROWS)
    header = ["row", "parameters (M)", "accuracy", "spread", "of the teacher's", "seconds"]
    show(header, [_cells(name, results) for name in results])
    show_paired(PAIRS, results)


def _cells(name: str, results: Results) -> list[str]:
    mine = [100 * one["accuracy"] for one in results[name]]
    # Each student beside its own teacher: seeds differ in both.
    shares = [100 * one["accuracy"] / other["accuracy"] for one, other in zip(results[name], results["dense"])]
    return [
        name,
        f"{results[name][0]['parameters'] / 1e6:.2f}",
        f"{statistics.mean(mine):.2f}",
        spread(mine),
        f"{statistics.mean(shares):.2f}%",
        f"{statistics.mean(one['seconds'] for one in results[name]):.0f}",
    ]


if __name__ == "__main__":
    main()
