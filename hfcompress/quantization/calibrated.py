"""GPTQ through a whole model: each layer on what it sees once those before it are quantized."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hfcompress.calibration import ColumnPruning, InputHessian, LayerVisit
from hfcompress.calibration.checks import compress_in_turn, compress_layers, warn_about_damping
from hfcompress.calibration.observe import GRAM
from hfcompress.calibration.turn_pass import Turn
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.quantization.conv1d import gptq_conv1d
from hfcompress.quantization.drift import DAMPING, correct_drift
from hfcompress.quantization.gptq import gptq_siblings
from hfcompress.quantization.options import GPTQ
from hfcompress.quantization.placing import Rows, pack_, row_of
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.report import QuantizedLinear
from hfcompress.quantization.tuning import LearntRounding, learn_rounding_


def calibrated(
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    method: GPTQ,
    batches: Sequence[Mapping[str, Any]],
    prune: ColumnPruning | None,
) -> Iterator[tuple[str, Rows]]:
    """Round layer by layer; with ``quality="best"`` each linear layer makes up for what the model lacks by then.

    With ``rounding_steps`` the codes of a layer of the stack then learn from what it gives.
    """
    by_name = {one.name: one for one in planned}
    rows: Rows = []

    def alike(visit: LayerVisit, found: InputHessian) -> list[PlannedLinear]:
        return [by_name[f"{visit.name}.{name}"] for name in found.names]

    def as_they_are(visit: LayerVisit, found: InputHessian) -> None:
        rows.extend(_round_siblings_(model, alike(visit, found), found, method, prune))

    def correcting(visit: LayerVisit, turn: Turn) -> None:
        siblings = alike(visit, turn.found)
        missing = {one.name: turn.missing(one.name.removeprefix(f"{visit.name}."), one.weight) for one in siblings}
        rows.extend(_round_siblings_(model, siblings, turn.found, method, prune, missing))

    def learning(visit: LayerVisit, outputs: Sequence[Tensor]) -> None:
        inside = [by_name[row.name] for row in rows]
        started = time.perf_counter()
        found = learn_rounding_(visit, inside, outputs, method.rounding_steps, zeros_stay=prune is not None)
        if found is not None:
            each = (time.perf_counter() - started) / len(rows)
            rows[:] = [_with_learnt(row, found, each) for row in rows]

    if method.quality == "best":
        visits = compress_in_turn(model, by_name, batches, correcting, learning if method.rounding_steps else None)
    else:
        visits = compress_layers(model, by_name, batches, GRAM, as_they_are)
    for visit in visits:
        yield visit.name, rows.copy()
        rows.clear()


def _with_learnt(row: QuantizedLinear, found: LearntRounding, seconds: float) -> QuantizedLinear:
    """Return a row that says what was learnt after it was made.  seconds: of that, what is this row's share."""
    return replace(
        row, output_error_before=found.before, output_error_after=found.after, seconds=row.seconds + seconds
    )


def _round_siblings_(
    model: nn.Module,
    siblings: Sequence[PlannedLinear],
    found: InputHessian,
    method: GPTQ,
    prune: ColumnPruning | None,
    missing: Mapping[str, Tensor | None] | None = None,
) -> Iterator[QuantizedLinear]:
    """Quantize linear layers that share an input, those of one dtype in one call.

    missing: what each has to make up for, see ``Turn.missing``.
    """
    by_grid: dict[Any, list[PlannedLinear]] = {}
    for one in siblings:
        by_grid.setdefault((one.matrix.dtype, one.bits, one.group_size, type(one.module)), []).append(one)
    for alike in by_grid.values():
        started = time.perf_counter()
        weights = [one.weight for one in alike]
        round_all = gptq_siblings if isinstance(alike[0].module, nn.Linear) else gptq_conv1d
        grid = (alike[0].bits, alike[0].group_size)
        try:
            goals, used = correct_drift(weights, found.hessian, [(missing or {}).get(one.name) for one in alike])
            results = round_all(
                weights, found.hessian, *grid, method.damping, prune, method.symmetric, goals, method.steps
            )
        except HFCompressError as error:
            raise ModelError(f"{', '.join(one.name for one in alike)}: {error}") from error
        names = [one.name for one in alike]
        warn_about_damping(names, DAMPING, used)
        warn_about_damping(names, method.damping, results[0].damping_used)
        for one, result in zip(alike, results):
            pack_(model, one, result.rounded)
        seconds = time.perf_counter() - started
        total = sum(weight.numel() for weight in weights)
        for one, result in zip(alike, results):
            share = one.matrix.numel() / total
            yield row_of(one, result.relative_error, result.damping_used, found.tokens, seconds * share)
