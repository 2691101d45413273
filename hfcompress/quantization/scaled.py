"""AWQ through a whole model: each layer on what it sees once those before it are quantized."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.calibration import InputHessian, LayerVisit
from hfcompress.calibration.checks import observe_layers
from hfcompress.calibration.hessian import relative_error
from hfcompress.quantization.awq import AWQ, Reader, search_scale_of_inputs
from hfcompress.quantization.folding import Changes, Fold, fold_, folds_of, per_column
from hfcompress.quantization.linear_folds import LinearFold, LinearFolds
from hfcompress.quantization.placing import Rows, pack_, row_of
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.report import QuantizedLinear


def scaled(
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    method: AWQ,
    batches: Sequence[Mapping[str, Any]],
    changes: Changes,
) -> Iterator[tuple[str, Rows]]:
    """Scale and round layer by layer.  changes: takes the values of what is folded."""
    by_name = {one.name: one for one in planned}
    find = LinearFolds()
    rows: Rows = []
    for visit, found in observe_layers(model, by_name, batches, LayerVisit.input_hessians):
        prefix = f"{visit.name}."
        inside = {name.removeprefix(prefix): one for name, one in by_name.items() if name.startswith(prefix)}
        done = _rounded_layer_(model, visit, inside, found, method, changes, find)
        rows.extend(done)
        yield visit.name, done
    if rows and not any(row.scaled for row in rows):
        warnings.warn(
            f"No norm or linear layer of {type(model).__name__} can take the scales of the linear layers after it, "
            "so nothing was scaled: this is RTN.",
            stacklevel=5,
        )


@dataclass(frozen=True)
class _Linear:
    """One linear layer of a layer.

    dense: (out, in) float32, as it was.  hessian: of its inputs as they were.  columns, rows: by what its columns were
    multiplied and its rows divided, None for nothing.
    """

    one: PlannedLinear
    dense: Tensor
    found: InputHessian
    columns: Tensor | None = None
    rows: Tensor | None = None

    def reader(self, weight: Tensor) -> Reader:
        one = self.one
        return Reader(weight, one.bits, one.group_size, one.symmetric, one.matrix.dtype)


def _rounded_layer_(
    model: nn.Module,
    visit: LayerVisit,
    inside: Mapping[str, PlannedLinear],
    found: Sequence[InputHessian],
    method: AWQ,
    changes: Changes,
    find: LinearFolds,
) -> Rows:
    """Scale the linear layers of one layer, which are all dense, and then round them."""
    started = time.perf_counter()
    linears = {name: _Linear(inside[name], inside[name].weight.float(), seen) for seen in found for name in seen.names}
    scales = [(fold, _search(fold, linears, method.grid)) for fold in folds_of(visit, set(linears), find)]
    for fold, scale in scales:
        _fold_(fold, scale, linears, changes)
    seconds = (time.perf_counter() - started) / max(1, len(linears))
    return [_round_(model, one, method.clip, seconds) for one in linears.values()]


def _search(fold: Fold, linears: Mapping[str, _Linear], grid: int) -> Tensor:
    readers = [linears[name] for name in fold.readers]
    return search_scale_of_inputs(
        [one.reader(one.dense) for one in readers], readers[0].found.hessian, fold.unit_of_column, fold.units, grid
    )


def _fold_(fold: Fold, scale: Tensor, linears: dict[str, _Linear], changes: Changes) -> None:
    realised = fold_(fold, scale, changes)
    columns = per_column(fold, realised)
    for name in fold.readers:
        linears[name] = replace(linears[name], columns=columns)
    if isinstance(fold, LinearFold):
        linears[fold.name] = replace(linears[fold.name], rows=realised)


def _round_(model: nn.Module, linear: _Linear, clip: bool, before: float) -> QuantizedLinear:
    """Round one linear layer as it is now and put its packed form in its place; the error is in terms of before.

    before: seconds that its scales took.
    """
    started = time.perf_counter()
    one, hessian = linear.one, linear.found.hessian
    if isinstance(one.module, Conv1D):  # its groups lie along the outputs, so an input's scale would change nothing
        reader = linear.reader(one.matrix.float())
        choices = [reader.rounded()]
    else:
        reader = linear.reader(one.weight.float())
        now = hessian if linear.columns is None else hessian / torch.outer(linear.columns, linear.columns)
        choices = [reader.rounded(), *([reader.rounded(importance=now.diagonal())] if clip else [])]
        choices.sort(key=lambda rounded: reader.error(rounded, now))
    packed = pack_(model, one, choices[0])
    values = one.as_weight(packed.dequantize()).float()
    if linear.columns is not None:
        values = values / linear.columns
    if linear.rows is not None:
        values = values * linear.rows.unsqueeze(1)
    error = relative_error(linear.dense, values, hessian)
    row = row_of(one, error, None, linear.found.tokens, before + time.perf_counter() - started)
    return replace(row, scaled=linear.columns is not None)
