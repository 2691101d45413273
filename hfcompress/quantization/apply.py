"""Quantize the linear layers of a model in place, all of them or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.calibration import ColumnPruning, InputHessian, LayerVisit
from hfcompress.calibration.checks import calibration_list, observe_layers, warn_about_damping
from hfcompress.calibration.hessian import relative_error
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.loading.record import record_uneven
from hfcompress.packed import PackedLinear, compressed_tensors_config
from hfcompress.progress import meter
from hfcompress.quantization.gptq import gptq_siblings
from hfcompress.quantization.grids import dequantized
from hfcompress.quantization.options import GPTQ, RTN
from hfcompress.quantization.plan import PlannedLinear, check_joint_pruning, plan_linears
from hfcompress.quantization.report import QuantizationReport, QuantizedLinear
from hfcompress.quantization.rtn import round_to_nearest
from hfcompress.structure.stack import layer_stacks

Rows = list[QuantizedLinear]
OnLayer = Callable[[str, Sequence[QuantizedLinear]], None]


def quantize(
    model: PreTrainedModel,
    method: RTN | GPTQ,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    on_layer: OnLayer | None = None,
    prune: ColumnPruning | None = None,
) -> QuantizationReport:
    """Replace the linear layers of a model's stacks by packed ones; embeddings and heads stay as they are.

    Afterwards plain ``model.save_pretrained`` writes a compressed-tensors checkpoint. calibration: batches as
    ``model(**batch)`` takes them, for methods that need data; padding does not count.  on_layer: called after each
    layer with its name and rows.  prune: ``SparseGPT(...)`` prunes the same layers in the pass in which GPTQ rounds
    them, so that later columns absorb both errors.  Raises ModelError or DataError; the model is then as it was
    before, for which the dense weights are kept until the end.
    """
    started = time.perf_counter()
    batches = calibration_list(type(method).__name__, calibration) if method.needs_calibration else []
    planned = plan_linears(model, method)
    if prune is not None:
        check_joint_pruning(method, prune, planned)
    if isinstance(method, GPTQ):
        steps = _calibrated(model, planned, method, batches, prune)
    else:
        steps = _data_free(model, planned)
    layers = sum(len(stack) for stack in layer_stacks(model))
    rows: Rows = []
    try:
        with meter(f"Quantizing with {type(method).__name__}", layers) as bar:
            for name, done in steps:
                rows.extend(done)
                bar.advance(note=name)
                if on_layer is not None and done:
                    on_layer(name, done)
    except BaseException:
        _restore_(model, planned)
        raise
    model.config.quantization_config = compressed_tensors_config(model)
    record_uneven(model)
    by_name = {row.name: row for row in rows}
    ordered = tuple(by_name[one.name] for one in planned)
    return QuantizationReport(type(method).__name__.lower(), ordered, time.perf_counter() - started)


def _restore_(model: nn.Module, planned: Iterable[PlannedLinear]) -> None:
    for one in planned:
        _put_(model, one.name, one.module)


def _put_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _data_free(model: nn.Module, planned: Sequence[PlannedLinear]) -> Iterator[tuple[str, Rows]]:
    """Round every layer to nearest."""
    by_name = {one.name: one for one in planned}
    for stack in layer_stacks(model):
        for index in range(len(stack)):
            layer = f"{stack.name}.{index}"
            inside = [one for name, one in by_name.items() if name.startswith(f"{layer}.")]
            yield layer, [_round_one_(model, one) for one in inside]


def _round_one_(model: nn.Module, one: PlannedLinear) -> QuantizedLinear:
    started = time.perf_counter()
    weight = one.module.weight.detach()
    codes, scale = round_to_nearest(weight, one.bits, one.group_size)
    grouped = codes.view(len(codes), -1, one.group_size or codes.shape[1])
    quantized = dequantized(grouped, scale.float().unsqueeze(-1), scale.dtype).view_as(weight)
    error = relative_error(weight, quantized)
    _pack_(model, one, codes, scale)
    return _row(one, error, None, 0, time.perf_counter() - started)


def _pack_(model: nn.Module, one: PlannedLinear, codes: Tensor, scale: Tensor) -> None:
    packed = PackedLinear.from_codes(codes, scale, one.module.bias, one.bits, one.group_size)
    _put_(model, one.name, packed.train(one.module.training))


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
    by_name = {one.name: one for one in planned}
    for visit, hessians in observe_layers(model, by_name, batches, LayerVisit.input_hessians):
        groups = [([by_name[f"{visit.name}.{name}"] for name in found.names], found) for found in hessians]
        rows = [row for alike, found in groups for row in _round_siblings_(model, alike, found, method, prune)]
        groups.clear()
        yield visit.name, rows


def _round_siblings_(
    model: nn.Module, siblings: Sequence[PlannedLinear], found: InputHessian, method: GPTQ, prune: ColumnPruning | None
) -> Iterator[QuantizedLinear]:
    """Quantize linear layers that share an input, those of one dtype in one call."""
    by_dtype: dict[Any, list[PlannedLinear]] = {}
    for one in siblings:
        by_dtype.setdefault(one.module.weight.dtype, []).append(one)
    for alike in by_dtype.values():
        started = time.perf_counter()
        weights = [one.module.weight for one in alike]
        try:
            results = gptq_siblings(weights, found.hessian, method.bits, alike[0].group_size, method.damping, prune)
        except HFCompressError as error:
            raise ModelError(f"{', '.join(one.name for one in alike)}: {error}") from error
        warn_about_damping([one.name for one in alike], method.damping, results[0].damping_used)
        for one, result in zip(alike, results):
            _pack_(model, one, result.codes, result.scale)
        seconds = time.perf_counter() - started
        total = sum(weight.numel() for weight in weights)
        for one, result in zip(alike, results):
            share = one.module.weight.numel() / total
            yield _row(one, result.relative_error, result.damping_used, found.tokens, seconds * share)
