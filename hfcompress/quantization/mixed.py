"""Mixed precision: how many bits each layer gets, so that all together stay below a target and lose least.

What a layer would lose is measured on the dense model, in a pass of its own over the calibration data: bits can only
be chosen once all layers are known, and GPTQ needs them from its first layer on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from hfcompress.calibration.running import Batch
from hfcompress.errors import ModelError
from hfcompress.packed.experts import split_experts
from hfcompress.packed.format import is_seq2seq
from hfcompress.packed.weight import stored_bytes
from hfcompress.quantization.knapsack import Item, best_choice
from hfcompress.quantization.options import AUTO, GPTQ
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.sensitivity import Siblings, measure_losses
from hfcompress.quantization.shards import LayerShards
from hfcompress.structure.stack import stack_linears

MEGABYTE = 1_000_000


def check_target(model: PreTrainedModel, planned: Sequence[PlannedLinear], method: GPTQ) -> None:
    """Raise ModelError for a model that stock Transformers reads with one number of bits only, or a target too far."""
    other = next((type(one.module).__name__ for one in planned if not isinstance(one.module, nn.Linear)), None)
    if other or is_seq2seq(model) or split_experts(model):
        why = f"{other} layers" if other else "experts" if split_experts(model) else "encoder-decoders"
        raise ModelError(
            f"bits='auto' would give the layers of {type(model).__name__} different bits, but stock Transformers "
            f"reads {why} only where all have the same. Give a number of bits."
        )
    free, most = stack_linears(model), max(method.candidates)
    fixed = [one for one in planned if one.name not in free]
    inside = [one for one in planned if one.name in free]
    sizes = [_bytes_of(inside, bits) + _bytes_of(fixed, most) for bits in (min(method.candidates), most)]
    if not sizes[0] <= _budget(planned, method) <= sizes[1]:
        name, unit = ("average_bits", "bits a weight") if method.average_bits else ("megabytes", "MB")
        one = _weights_of(planned) / 8 if method.average_bits else MEGABYTE
        low, high = math.ceil(100 * sizes[0] / one) / 100, math.ceil(100 * sizes[1] / one) / 100
        raise ModelError(
            f"{name}={getattr(method, name):g} is out of reach: with {min(method.candidates)} to {most} bits a "
            f"code, the {len(planned)} layers of {type(model).__name__} take {low:g} to {high:g} {unit}, scales "
            "included. Give a target between these, or other choices."
        )


def with_chosen_bits(
    model: PreTrainedModel,
    planned: list[PlannedLinear],
    method: GPTQ,
    batches: Sequence[Batch],
    store: LayerShards | None,
) -> list[PlannedLinear]:
    """Return the plan with the bits that each layer gets where they are to be chosen; the model stays as it is.

    store: keeps the choice, and has it already if it is of a run that goes on.  Raises ModelError as ``GPTQ`` does.
    """
    if method.bits != AUTO:
        return planned

    def choose() -> dict[str, int]:
        return choose_bits(planned, measure_losses(model, planned, method, batches), method)

    chosen = choose() if store is None else store.bits([one.name for one in planned], choose)
    return [replace(one, bits=chosen[one.name]) for one in planned]


def choose_bits(planned: Sequence[PlannedLinear], measured: Sequence[Siblings], method: GPTQ) -> dict[str, int]:
    """Return the bits of each layer by name, for the smallest sum of losses that the target allows.

    What was not measured, as an output head, keeps the bits that it was planned with.
    """
    chosen = {one.name: one.bits for one in planned}
    free = {one.name for siblings in measured for one in siblings.layers}
    budget = _budget(planned, method) - sum(_bytes_of([one], one.bits) for one in planned if one.name not in free)
    groups = [[Item(_bytes_of(one.layers, bits), loss) for bits, loss in one.losses.items()] for one in measured]
    for siblings, at in zip(measured, best_choice(groups, budget)):
        bits = list(siblings.losses)[at]
        chosen |= {one.name: bits for one in siblings.layers}
    return chosen


def _weights_of(planned: Sequence[PlannedLinear]) -> int:
    return sum(one.matrix.numel() for one in planned)


def _bytes_of(planned: Sequence[PlannedLinear], bits: int) -> int:
    return sum(stored_bytes(*_shape(one), bits, one.group_size, one.matrix.element_size()) for one in planned)


def _shape(one: PlannedLinear) -> tuple[int, int]:
    rows, columns = one.matrix.shape
    return rows, columns


def _budget(planned: Sequence[PlannedLinear], method: GPTQ) -> int:
    """Return the bytes that all layers may take."""
    if method.megabytes is not None:
        return math.floor(method.megabytes * MEGABYTE)
    assert method.average_bits is not None
    return math.floor(method.average_bits * _weights_of(planned) / 8)
