"""Quantize the linear layers of a model in place, all of them or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from hfcompress.calibration import ColumnPruning
from hfcompress.calibration.running import Batch
from hfcompress.calibration.texts import Calibration, batches_for
from hfcompress.devices import freed_memory_kept, unmap_unchanged
from hfcompress.errors import ModelError
from hfcompress.loading.record import record_uneven
from hfcompress.packed import compressed_tensors_config
from hfcompress.packed.bytes import byte_config, byte_layers
from hfcompress.progress import meter
from hfcompress.quantization.awq import AWQ
from hfcompress.quantization.bitsandbytes import BitsAndBytes, finish_, plan_bitsandbytes, replaced
from hfcompress.quantization.calibrated import calibrated
from hfcompress.quantization.checks import check_joint_pruning, warn_about_other_grid
from hfcompress.quantization.experts import with_split_experts
from hfcompress.quantization.float8 import Float8
from hfcompress.quantization.folding import Changes, undo_
from hfcompress.quantization.mixed import with_chosen_bits
from hfcompress.quantization.options import GPTQ, RTN
from hfcompress.quantization.placing import Rows, by_layers, put_, release_layer_, restore_, round_one_, row_of
from hfcompress.quantization.plan import plan_linears
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.report import QuantizationReport, QuantizedLinear
from hfcompress.quantization.rtn import Scale
from hfcompress.quantization.scaled import scaled
from hfcompress.quantization.shards import LayerShards, kept_layers
from hfcompress.quantization.smoothquant import SmoothQuant, smoothed
from hfcompress.quantization.tuning import held_back, tune_scales_
from hfcompress.quantization.w8a8 import byte_layer, byte_twin, check_bytes
from hfcompress.structure.offload import is_offloaded, settle_
from hfcompress.structure.stack import layer_stacks, stack_linears

Method = RTN | GPTQ | AWQ | BitsAndBytes | SmoothQuant | Float8
OnLayer = Callable[[str, Sequence[QuantizedLinear]], None]


@with_split_experts
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
    absorb both errors.  shards: a folder that keeps each layer as soon as a method that needs data is done with it,
    until you remove it; a run that was killed goes on after those it finds there, to the same bits.
    Layers that ``device_map`` left on disk are loaded one at a time, so only the packed model has to fit into memory.
    Raises ModelError, DataError, or OutputError for shards of another run; the model is then as it was before, for
    which the dense weights are kept until the end, unless layers were on disk: then load it again.
    """
    started = time.perf_counter()
    _check_gradients(method)
    batches: Sequence[Batch] = []
    if method.needs_calibration:
        batches = batches_for(model, type(method).__name__, calibration, processor)
    changes: Changes = {}
    quantizer = None
    if isinstance(method, BitsAndBytes):
        planned, quantizer = plan_bitsandbytes(model, method)
    else:
        planned = plan_linears(model, method)
    if prune is not None:
        check_joint_pruning(method, prune, planned)
    warn_about_other_grid(model, planned, method)
    store = None
    if shards is not None and method.needs_calibration:
        store = LayerShards.open(shards, model, (method, prune), batches)
    tuning, streamed = None, is_offloaded(model)
    batches, unseen = _held_back(method, batches, streamed)
    with freed_memory_kept(), _all_or_nothing(model, planned, changes, streamed):
        if isinstance(method, GPTQ):
            planned = with_chosen_bits(model, planned, method, batches, store)
        steps = _steps(model, planned, method, batches, prune, quantizer, changes, store)
        rows = _run(model, planned, steps, type(method).__name__, on_layer, changes)
        if isinstance(method, GPTQ) and unseen:
            tokens = max(row.tokens for row in rows)
            tuning = tune_scales_(model, planned, batches, unseen, tokens, method.gradient_steps)
    if quantizer is not None:
        finish_(model, quantizer)
    else:
        model.config.quantization_config = (
            byte_config(model) if byte_layers(model) else compressed_tensors_config(model)
        )
    record_uneven(model)
    return QuantizationReport(type(method).__name__.lower(), rows, time.perf_counter() - started, tuning)


def _steps(
    model: PreTrainedModel,
    planned: Sequence[PlannedLinear],
    method: Method,
    batches: Sequence[Mapping[str, Any]],
    prune: ColumnPruning | None,
    quantizer: HfQuantizer | None,
    changes: Changes,
    store: LayerShards | None,
) -> Iterable[tuple[str, Rows]]:
    """Return the method's work, layer by layer.  changes: takes what it changes beside the planned layers."""
    put = partial(put_, model)
    inside = stack_linears(model)
    outside = [one for one in planned if one.name not in inside]
    if isinstance(method, BitsAndBytes):
        assert quantizer is not None
        return _replaced(model, planned, quantizer.quantization_config)
    if isinstance(method, GPTQ):
        steps = kept_layers(
            store, model, planned, lambda rest: calibrated(model, rest, method, batches, prune), changes
        )
        return chain(steps, _outside(model, outside, "mse"))
    if isinstance(method, AWQ):
        planned = [one for one in planned if one.name in inside]
        steps = kept_layers(store, model, planned, lambda rest: scaled(model, rest, method, batches, changes), changes)
        return chain(steps, _outside(model, outside, "mse"))
    if isinstance(method, SmoothQuant):
        check_bytes(model, planned, activations=True)
        return kept_layers(
            store,
            model,
            planned,
            lambda rest: smoothed(model, rest, method, batches, changes, put),
            changes,
            byte_twin,
        )
    if isinstance(method, Float8):
        check_bytes(model, planned, method.activations, "float")
        return by_layers(model, planned, lambda one: _put_bytes_(put, *byte_layer(one, "float", method.activations)))
    if method.activations:
        check_bytes(model, planned, activations=True)
        return by_layers(model, planned, lambda one: _put_bytes_(put, *byte_layer(one, "int", True, method.scale)))
    return chain(_data_free(model, planned, method.scale), _outside(model, outside, method.scale))


def _put_bytes_(put: Callable[[str, nn.Module], None], layer: nn.Module, row: QuantizedLinear) -> QuantizedLinear:
    put(row.name, layer)
    return row


def _check_gradients(method: Method) -> None:
    """Raise ModelError where gradients are needed that cannot be had."""
    given = isinstance(method, GPTQ) and (method.gradient_steps or method.rounding_steps)
    if given and torch.is_inference_mode_enabled():
        raise ModelError(
            "Codes and scales are learnt by gradients: call quantize outside torch.inference_mode(), or give "
            "tuning_steps=0 and rounding_steps=0."
        )


def _held_back(method: Method, batches: Sequence[Batch], streamed: bool) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Return the batches for the layers, and rows that judge how scales are tuned then: none where they are not."""
    if not (isinstance(method, GPTQ) and method.gradient_steps):
        return batches, []
    if streamed and method.tuning_steps:
        raise ModelError(
            f"tuning_steps={method.tuning_steps} runs the dense model at every step, but some of its layers lie on "
            "disk. Leave tuning_steps out, or load the model whole."
        )
    return (batches, []) if streamed else held_back(batches)


@contextmanager
def _all_or_nothing(
    model: nn.Module, planned: Sequence[PlannedLinear], changes: Changes, streamed: bool
) -> Iterator[None]:
    """Put everything back when something fails; layers that were on disk cannot be."""
    try:
        yield
    except BaseException:
        if not streamed:
            restore_(model, planned)
            undo_(changes)
        raise


def _run(
    model: PreTrainedModel,
    planned: Sequence[PlannedLinear],
    steps: Iterable[tuple[str, Rows]],
    method: str,
    on_layer: OnLayer | None,
    changes: Changes,
) -> tuple[QuantizedLinear, ...]:
    """Do all steps and return their rows in the order of the plan."""
    streamed = is_offloaded(model)
    rows: Rows = []
    with meter(f"Quantizing with {method}", sum(len(stack) for stack in layer_stacks(model))) as bar:
        for name, done in steps:
            rows.extend(done)
            bar.advance(note=name)
            if streamed:
                release_layer_(planned, done)
                changes.clear()  # nothing is put back, so nothing is kept for that
            else:
                unmap_unchanged(one.matrix for one in planned if one.name in {row.name for row in done})
            if on_layer is not None and done:
                on_layer(name, done)
    for one in planned:  # some came while their layer was only watched
        model.get_submodule(one.name).train(one.module.training)
    if streamed:
        settle_(model)
    by_name = {row.name: row for row in rows}
    return tuple(by_name[one.name] for one in planned)


def _data_free(model: nn.Module, planned: Sequence[PlannedLinear], scale: Scale) -> Iterator[tuple[str, Rows]]:
    """Round every layer to nearest."""
    return by_layers(model, planned, lambda one: round_one_(model, one, scale))


def _replaced(model: nn.Module, planned: Sequence[PlannedLinear], config: Any) -> Iterator[tuple[str, Rows]]:
    """Put a layer of bitsandbytes in the place of every layer."""

    def replace(one: PlannedLinear) -> QuantizedLinear:
        layer, error, seconds = replaced(one, config)
        put_(model, one.name, layer)
        return row_of(one, error, None, 0, seconds)

    return by_layers(model, planned, replace)


def _outside(model: nn.Module, planned: Sequence[PlannedLinear], scale: Scale) -> Iterator[tuple[str, Rows]]:
    """Round embeddings and heads to nearest, after all layers: a calibrated layer sees the dense ones."""
    for one in planned:
        yield one.name, [round_one_(model, one, scale)]
