"""Quantize the linear layers of a model in place, all of them or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from hfcompress.calibration import ColumnPruning, InputHessian, LayerVisit
from hfcompress.calibration.checks import compress_in_turn, compress_layers, warn_about_damping
from hfcompress.calibration.hessian import relative_error
from hfcompress.calibration.texts import Calibration, batches_for
from hfcompress.calibration.turns import Turn
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.loading.record import record_uneven
from hfcompress.packed import PackedWeight, compressed_tensors_config, packed_twin
from hfcompress.packed.bytes import byte_config, byte_layers
from hfcompress.progress import meter
from hfcompress.quantization.bitsandbytes import BitsAndBytes, finish_, plan_bitsandbytes, replaced
from hfcompress.quantization.conv1d import gptq_conv1d
from hfcompress.quantization.drift import correct_drift
from hfcompress.quantization.float8 import Float8
from hfcompress.quantization.folding import Changes, undo_
from hfcompress.quantization.gptq import gptq_siblings
from hfcompress.quantization.grids import Rounded
from hfcompress.quantization.options import GPTQ, RTN
from hfcompress.quantization.plan import PlannedLinear, check_joint_pruning, plan_linears, warn_about_other_grid
from hfcompress.quantization.report import QuantizationReport, QuantizedLinear
from hfcompress.quantization.rtn import Scale, round_to_nearest
from hfcompress.quantization.shards import kept_layers
from hfcompress.quantization.smoothquant import SmoothQuant, smoothed
from hfcompress.quantization.w8a8 import byte_layer, check_bytes
from hfcompress.structure.offload import bring_in_, is_offloaded, release_, settle_
from hfcompress.structure.stack import layer_stacks, stack_linears

Rows = list[QuantizedLinear]
Method = RTN | GPTQ | BitsAndBytes | SmoothQuant | Float8
OnLayer = Callable[[str, Sequence[QuantizedLinear]], None]


def quantize(
    model: PreTrainedModel,
    method: Method,
    calibration: Calibration | None = None,
    on_layer: OnLayer | None = None,
    prune: ColumnPruning | None = None,
    *,
    processor: Any = None,
    shards: str | Path | None = None,
) -> QuantizationReport:
    """Replace the linear layers of a model's stacks by packed ones; embeddings and heads stay as they are.

    Afterwards plain ``model.save_pretrained`` writes a checkpoint of compressed-tensors or bitsandbytes.
    calibration: for methods that need data, batches as ``model(**batch)`` takes them, where padding does not count, or
    what ``calibration_batches`` makes them of: texts, a ``Dataset``, a file, a dataset's id.  processor: the tokenizer
    for texts; None is the one in the model's folder.  on_layer: called after each layer with its name and rows.
    prune: ``SparseGPT(...)`` prunes the same layers in the pass in which GPTQ rounds them, so that later columns
    absorb both errors.  shards: a folder that keeps each layer as soon as GPTQ is done with it, until you remove it; a
    run that was killed goes on after those it finds there, to the same bits.
    Layers that ``device_map`` left on disk are loaded one at a time, so only the packed model has to fit into memory.
    Raises ModelError, DataError, or OutputError for shards of another run; the model is then as it was before, for
    which the dense weights are kept until the end, unless layers were on disk: then load it again.
    """
    started = time.perf_counter()
    batches = batches_for(model, type(method).__name__, calibration, processor) if method.needs_calibration else []
    changes: Changes = {}
    quantizer = None
    if isinstance(method, BitsAndBytes):
        planned, quantizer = plan_bitsandbytes(model, method)
    else:
        planned = plan_linears(model, method)
    if prune is not None:
        check_joint_pruning(method, prune, planned)
    warn_about_other_grid(model, planned, method)
    steps = _steps(model, planned, method, batches, prune, quantizer, changes, shards)
    rows = _run(model, planned, steps, type(method).__name__, on_layer, changes)
    if quantizer is not None:
        finish_(model, quantizer)
    else:
        model.config.quantization_config = (
            byte_config(model) if byte_layers(model) else compressed_tensors_config(model)
        )
    record_uneven(model)
    return QuantizationReport(type(method).__name__.lower(), rows, time.perf_counter() - started)


def _steps(
    model: PreTrainedModel,
    planned: Sequence[PlannedLinear],
    method: Method,
    batches: Sequence[Mapping[str, Any]],
    prune: ColumnPruning | None,
    quantizer: HfQuantizer | None,
    changes: Changes,
    shards: str | Path | None,
) -> Iterable[tuple[str, Rows]]:
    """Return the method's work, layer by layer.  changes: takes what it changes beside the planned layers."""
    put = partial(_put_, model)
    inside = stack_linears(model)
    outside = [one for one in planned if one.name not in inside]
    if isinstance(method, BitsAndBytes):
        assert quantizer is not None
        return _replaced(model, planned, quantizer.quantization_config)
    if isinstance(method, GPTQ):
        steps = kept_layers(
            shards, model, planned, (method, prune), batches,
            lambda rest: _calibrated(model, rest, method, batches, prune),
        )  # fmt: skip
        return chain(steps, _outside(model, outside, "mse"))
    if isinstance(method, SmoothQuant):
        check_bytes(model, planned, activations=True)
        return smoothed(model, planned, method, batches, changes, put)
    if isinstance(method, Float8):
        check_bytes(model, planned, method.activations, "float")
        return _by_layers(model, planned, lambda one: _put_bytes_(put, *byte_layer(one, "float", method.activations)))
    if method.activations:
        check_bytes(model, planned, activations=True)
        return _by_layers(model, planned, lambda one: _put_bytes_(put, *byte_layer(one, "int", True, method.scale)))
    return chain(_data_free(model, planned, method.scale), _outside(model, outside, method.scale))


def _put_bytes_(put: Callable[[str, nn.Module], None], layer: nn.Module, row: QuantizedLinear) -> QuantizedLinear:
    put(row.name, layer)
    return row


def _run(
    model: PreTrainedModel,
    planned: Sequence[PlannedLinear],
    steps: Iterable[tuple[str, Rows]],
    method: str,
    on_layer: OnLayer | None,
    changes: Changes,
) -> tuple[QuantizedLinear, ...]:
    """Do all steps or none, and return their rows in the order of the plan.  Layers on disk cannot be put back."""
    streamed = is_offloaded(model)
    rows: Rows = []
    try:
        with meter(f"Quantizing with {method}", sum(len(stack) for stack in layer_stacks(model))) as bar:
            for name, done in steps:
                rows.extend(done)
                bar.advance(note=name)
                if streamed:
                    _release_(planned, done)
                if on_layer is not None and done:
                    on_layer(name, done)
    except BaseException:
        if not streamed:
            _restore_(model, planned)
            undo_(changes)
        raise
    for one in planned:  # some came while their layer was only watched
        model.get_submodule(one.name).train(one.module.training)
    if streamed:
        settle_(model)
    by_name = {row.name: row for row in rows}
    return tuple(by_name[one.name] for one in planned)


def _release_(planned: Iterable[PlannedLinear], rows: Rows) -> None:
    """Give up the dense weights of a finished layer."""
    names = {row.name for row in rows}
    for one in planned:
        if one.name in names:
            release_(one.module)


def _restore_(model: nn.Module, planned: Iterable[PlannedLinear]) -> None:
    for one in planned:
        _put_(model, one.name, one.module)
    for one in planned:
        for name, module in one.also.items():
            _put_(model, name, module)


def _put_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _by_layers(
    model: nn.Module, planned: Sequence[PlannedLinear], rounded: Callable[[PlannedLinear], QuantizedLinear]
) -> Iterator[tuple[str, Rows]]:
    """Quantize the linear layers of each layer of the stacks, one after another."""
    for stack in layer_stacks(model):
        for index in range(len(stack)):
            layer = f"{stack.name}.{index}"
            bring_in_(stack.layers[index])
            yield layer, [rounded(one) for one in planned if one.name.startswith(f"{layer}.")]


def _data_free(model: nn.Module, planned: Sequence[PlannedLinear], scale: Scale) -> Iterator[tuple[str, Rows]]:
    """Round every layer to nearest."""
    return _by_layers(model, planned, lambda one: _round_one_(model, one, scale))


def _replaced(model: nn.Module, planned: Sequence[PlannedLinear], config: Any) -> Iterator[tuple[str, Rows]]:
    """Put a layer of bitsandbytes in the place of every layer."""

    def replace(one: PlannedLinear) -> QuantizedLinear:
        layer, error, seconds = replaced(one, config)
        _put_(model, one.name, layer)
        return _row(one, error, None, 0, seconds)

    return _by_layers(model, planned, replace)


def _outside(model: nn.Module, planned: Sequence[PlannedLinear], scale: Scale) -> Iterator[tuple[str, Rows]]:
    """Round embeddings and heads to nearest, after all layers: a calibrated layer sees the dense ones."""
    for one in planned:
        yield one.name, [_round_one_(model, one, scale)]


def _round_one_(model: nn.Module, one: PlannedLinear, scale: Scale) -> QuantizedLinear:
    started = time.perf_counter()
    packed = _pack_(model, one, round_to_nearest(one.matrix, one.bits, one.group_size, one.symmetric, scale))
    error = relative_error(one.matrix, packed.dequantize())
    return _row(one, error, None, 0, time.perf_counter() - started)


def _pack_(model: nn.Module, one: PlannedLinear, rounded: Rounded) -> PackedWeight:
    """Put a packed layer in the place of a dense one, and of those that share its weight."""
    packed = packed_twin(one.module, one.bits, one.group_size, one.symmetric)
    packed.fill_(*rounded)
    _put_(model, one.name, packed)
    for name, module in one.also.items():
        twin = packed_twin(module, one.bits, one.group_size, one.symmetric)
        twin.share_(packed)
        _put_(model, name, twin)
    return packed


def _row(one: PlannedLinear, error: float, damping: float | None, tokens: int, seconds: float) -> QuantizedLinear:
    return QuantizedLinear(
        one.name, one.bits, one.group_size, one.requested_group_size, error, damping, tokens, seconds
    )


def _calibrated(
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    method: GPTQ,
    batches: Sequence[Mapping[str, Any]],
    prune: ColumnPruning | None,
) -> Iterator[tuple[str, Rows]]:
    """Round layer by layer on what each sees once the layers before it are quantized."""
    if method.quality == "best":
        yield from _corrected(model, planned, method, batches, prune)
        return
    by_name = {one.name: one for one in planned}
    rows: Rows = []

    def compress(visit: LayerVisit, found: InputHessian) -> None:
        alike = [by_name[f"{visit.name}.{name}"] for name in found.names]
        rows.extend(_round_siblings_(model, alike, found, method, prune))

    for visit in compress_layers(model, by_name, batches, compress):
        yield visit.name, rows.copy()
        rows.clear()


def _corrected(
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    method: GPTQ,
    batches: Sequence[Mapping[str, Any]],
    prune: ColumnPruning | None,
) -> Iterator[tuple[str, Rows]]:
    """Round linear layers in the order in which they run, each to make up for what the model lacks by then."""
    by_name = {one.name: one for one in planned}
    rows: Rows = []

    def compress(visit: LayerVisit, turn: Turn) -> None:
        alike = [by_name[f"{visit.name}.{name}"] for name in turn.found.names]
        missing = {one.name: turn.missing(one.name.removeprefix(f"{visit.name}."), one.weight) for one in alike}
        rows.extend(_round_siblings_(model, alike, turn.found, method, prune, missing))

    for visit in compress_in_turn(model, by_name, batches, compress):
        yield visit.name, rows.copy()
        rows.clear()


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
            goals = [correct_drift(one.weight, found.hessian, (missing or {}).get(one.name)) for one in alike]
            results = round_all(weights, found.hessian, *grid, method.damping, prune, method.symmetric, goals)
        except HFCompressError as error:
            raise ModelError(f"{', '.join(one.name for one in alike)}: {error}") from error
        warn_about_damping([one.name for one in alike], method.damping, results[0].damping_used)
        for one, result in zip(alike, results):
            _pack_(model, one, result.rounded)
        seconds = time.perf_counter() - started
        total = sum(weight.numel() for weight in weights)
        for one, result in zip(alike, results):
            share = one.matrix.numel() / total
            yield _row(one, result.relative_error, result.damping_used, found.tokens, seconds * share)
