"""Prune a model in one shot, in place and without training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.calibration import InputHessian, InputSquares, LayerVisit
from hfcompress.calibration.checks import compress_layers, warn_about_damping
from hfcompress.calibration.hessian import relative_error
from hfcompress.calibration.observe import GRAM, SQUARES, Statistic
from hfcompress.calibration.running import Batch
from hfcompress.calibration.texts import Calibration, batches_for
from hfcompress.devices import freed_memory_kept
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.progress import meter
from hfcompress.pruning.oneshot.magnitude import Magnitude, magnitude_pruned
from hfcompress.pruning.oneshot.plan import PlannedWeight, plan_weights
from hfcompress.pruning.oneshot.report import PrunedLayer, PruningReport
from hfcompress.pruning.oneshot.sparsegpt import SparseGPT, sparsegpt
from hfcompress.pruning.oneshot.wanda import Wanda, wanda_pruned
from hfcompress.pruning.targets import warn_of_experts

Planned = Mapping[str, PlannedWeight]
Rows = list[PrunedLayer]


def prune(
    model: PreTrainedModel,
    method: Magnitude | Wanda | SparseGPT,
    calibration: Calibration | None = None,
    *,
    targets: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    processor: Any = None,
) -> PruningReport:
    """Set weights of a model to zero in place, layer by layer, each calibrated on what the pruned layers before give.

    calibration: for methods that need data, batches as ``model(**batch)`` takes them, where padding does not count, or
    what ``calibration_batches`` makes them of: texts, a ``Dataset``, a file, a dataset's id.  processor: the tokenizer
    for texts; None is the one in the model's folder.
    targets, exclude: name patterns (``fnmatch``) over module names; targets None means every linear and Conv1D module
    inside the layer stacks.  Weights that are zero stay zero and count towards the sparsity, which is never exceeded.
    Beyond the model it takes the memory of one layer's activations and Hessians, so there is no way back: an error
    that shows half way, such as NaN activations, says that earlier layers are pruned.  Raises ModelError or DataError.
    """
    started = time.perf_counter()
    name = type(method).__name__
    batches = batches_for(model, name, calibration, processor) if method.needs_calibration else []
    planned = plan_weights(model, method, targets, exclude)
    warn_of_experts(model, targets, name)
    rows: Rows = []
    try:
        with freed_memory_kept(), meter(f"Pruning with {name}", len(planned)) as bar, torch.no_grad():
            shown = 0
            for layer in _steps(model, planned, method, batches, rows):
                bar.advance(len(rows) - shown, note=layer)
                shown = len(rows)
    except HFCompressError as error:
        if not rows:
            raise
        raise type(error)(
            f"{error} {len(rows)} of {len(planned)} layers are pruned by now, so load the model again."
        ) from error
    by_name = {row.name: row for row in rows}
    ordered = tuple(by_name[name] for name in planned)
    return PruningReport(name.lower(), ordered, time.perf_counter() - started)


def _steps(
    model: PreTrainedModel,
    planned: Planned,
    method: Magnitude | Wanda | SparseGPT,
    batches: Sequence[Batch],
    rows: Rows,
) -> Iterator[str]:
    """Prune, add the rows, and yield the name of each layer after that."""
    if isinstance(method, Magnitude):
        for name, one in planned.items():
            rows.append(_prune_by_magnitude_(one, method))
            yield name
    elif isinstance(method, Wanda):
        yield from _walked(
            model, planned, batches, SQUARES, lambda some, seen: _prune_by_wanda_(some, seen, method), rows
        )
    else:
        yield from _walked(
            model, planned, batches, GRAM, lambda some, seen: _prune_by_sparsegpt_(some, seen, method), rows
        )


def _walked(
    model: PreTrainedModel,
    planned: Planned,
    batches: Sequence[Batch],
    statistic: Statistic[Any],
    prune_: Callable[[list[PlannedWeight], Any], Rows],
    rows: Rows,
) -> Iterator[str]:
    """Prune linear layers by what they see once the layers before them are pruned."""

    def prune_siblings_(visit: LayerVisit, seen: InputHessian | InputSquares) -> None:
        rows.extend(prune_([planned[f"{visit.name}.{name}"] for name in seen.names], seen))

    for visit in compress_layers(model, planned, batches, statistic, prune_siblings_):
        yield visit.name


def _prune_by_magnitude_(one: PlannedWeight, method: Magnitude) -> PrunedLayer:
    started = time.perf_counter()
    pruned = magnitude_pruned(one.weight, method)
    error = relative_error(one.weight, one.weight.masked_fill(pruned, 0))
    one.weight.masked_fill_(pruned, 0)
    return _row(one, error, None, 0, time.perf_counter() - started)


def _prune_by_wanda_(siblings: list[PlannedWeight], found: InputSquares, method: Wanda) -> Rows:
    rows = []
    for one in siblings:
        started = time.perf_counter()
        pruned = wanda_pruned(one.weight, found.squares, method)
        size = one.weight.float().square() @ found.squares
        lost = (one.weight.float().square() * pruned) @ found.squares
        error = float((lost.sum() / size.sum()).sqrt()) if float(size.sum()) > 0 else 0.0
        one.weight.masked_fill_(pruned, 0)
        rows.append(_row(one, error, None, found.tokens, time.perf_counter() - started))
    return rows


def _prune_by_sparsegpt_(siblings: list[PlannedWeight], found: InputHessian, method: SparseGPT) -> Rows:
    started = time.perf_counter()
    names = [one.name for one in siblings]
    try:
        results = sparsegpt([one.weight for one in siblings], found.hessian, method)
    except ModelError as error:
        raise ModelError(f"{', '.join(names)}: {error}") from error
    warn_about_damping(names, method.damping, results[0].damping_used)
    for one, result in zip(siblings, results):
        one.weight.copy_(result.weight)
    seconds = (time.perf_counter() - started) / sum(one.weight.numel() for one in siblings)
    return [
        _row(one, result.relative_error, result.damping_used, found.tokens, seconds * one.weight.numel())
        for one, result in zip(siblings, results)
    ]


def _row(one: PlannedWeight, error: float, damping: float | None, tokens: int, seconds: float) -> PrunedLayer:
    count = one.weight.numel()
    return PrunedLayer(one.name, count - _nonzero(one.weight), count, error, damping, tokens, seconds)


def _nonzero(weight: Tensor) -> int:
    return int(weight.count_nonzero())
