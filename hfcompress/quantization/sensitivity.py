"""What a model loses when some of its layers get few bits, measured on the dense model before bits are chosen.

How large the error of a layer's own outputs is says little of that: a part of attention that is soon averaged away may
lose much. So the error that GPTQ would leave is put into the weights of layers that see the same input, and it is
measured how much of the hidden states changes where their block of the stack ends. Errors at other numbers of bits
follow from that one, as what arrives of a small error is in proportion to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.calibration import HessianFactor, InputHessian, LayerVisit, factor_hessian
from hfcompress.calibration.checks import observe_layers
from hfcompress.calibration.running import Batch, watching
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.packed import values_of
from hfcompress.progress import meter
from hfcompress.quantization.options import GPTQ
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.rtn import round_to_nearest
from hfcompress.structure.offload import lent_layers
from hfcompress.structure.stack import layer_stacks, stack_linears


@dataclass(frozen=True)
class Siblings:
    """Layers that see the same input, which serving engines join into one: they get the same bits.

    losses: what the model loses by them, by the number of bits, as the share of the hidden states that changes.
    """

    layers: tuple[PlannedLinear, ...]
    losses: Mapping[int, float]


def measure_losses(
    model: PreTrainedModel, planned: Sequence[PlannedLinear], method: GPTQ, batches: Sequence[Batch]
) -> list[Siblings]:
    """Return what the model would lose by each group of layers that see the same input; it stays as it is.

    Layers outside the stacks are left out.  Weights that lie on disk are loaded for their turn and go back.
    Raises ModelError as ``GPTQ`` does: for layers that no token reaches, and for Hessians without a factor.
    """
    inside = stack_linears(model)
    by_name = {one.name: one for one in planned if one.name in inside}
    measured: list[Siblings] = []
    visits = observe_layers(model, by_name, batches, lambda visit, names: visit.input_hessians(names))
    with meter("Measuring what bits are worth", sum(len(stack) for stack in layer_stacks(model))) as bar:
        for visit, found in lent_layers(model, visits, lambda one: one[0].layer):
            for one in found:
                layers = tuple(by_name[f"{visit.name}.{name}"] for name in one.names)
                try:
                    measured.append(Siblings(layers, _losses(visit, layers, one, method)))
                except HFCompressError as error:
                    raise ModelError(f"{', '.join(one.name for one in layers)}: {error}") from error
            bar.advance(note=visit.name)
    return measured


def _losses(visit: LayerVisit, layers: Sequence[PlannedLinear], found: InputHessian, method: GPTQ) -> dict[int, float]:
    """Return the losses by the number of bits: one is measured, others follow by their layers' errors."""
    factor = factor_hessian(found.hessian, method.damping)
    choices = method.candidates
    probed = choices[(len(choices) - 1) // 2]
    sizes: dict[int, float] = {}
    share = 0.0
    for bits in choices:
        rounding = [rounding_errors(one, bits, factor.strength) for one in layers]
        sizes[bits] = sum(float(one.square().sum(0) @ factor.strength) for one in rounding)
        if bits == probed:
            share = _changed_share(visit, layers, [left_by_gptq(one, factor) for one in rounding])
    return {bits: share * sizes[bits] / sizes[probed] if share else 0.0 for bits in choices}


def rounding_errors(one: PlannedLinear, bits: int, importance: Tensor) -> Tensor:
    """Return the weights less what they round to, (out, in) float32.  importance: (in,), of errors in each column."""
    rounded = round_to_nearest(one.weight, bits, one.group_size, importance=importance)
    return one.weight.float() - values_of(*rounded).float()


def left_by_gptq(rounding: Tensor, factor: HessianFactor) -> Tensor:
    """Return about what GPTQ would leave of a weight, the weight less its values, without running its loop.

    rounding: (out, in) float32, the errors that the loop makes in each column before later ones make up for them; here
    those of the values as they are, not as earlier columns have moved them.  Returns E (out, in) with
    E @ unit = rounding, so that tr(E H E^T) = sum_k strength[k] * |rounding[:, k]|^2 for the damped H.
    """
    return torch.linalg.solve_triangular(factor.unit, rounding, upper=True, left=False, unitriangular=True)


def _changed_share(visit: LayerVisit, layers: Sequence[PlannedLinear], errors: Sequence[Tensor]) -> float:
    """Return which share of a block's output changes with errors in its layers: the mean over tokens of squares.

    Measured on the first batch that comes to these layers.  Each token counts by itself: the outputs of a few are
    hundreds of times as large as others', and these are neither more important nor as easily disturbed.  Raises
    ModelError where the outputs are not finite.
    """
    with watching(visit.layer):
        for index in range(len(visit.hidden_states)):
            output = visit.rows(index, visit.output(index))
            dense, dtype = output.float(), output.dtype
            with _disturbed(layers, errors):
                change = visit.rows(index, visit.output(index)).float().sub_(dense)
            size = dense.square().sum(-1)
            share = (
                float((change.square().sum(-1)[size > 0] / size[size > 0]).mean()) if bool((size > 0).any()) else 0.0
            )
            if not math.isfinite(share):
                raise ModelError(
                    f"{visit.name} overflows {dtype} once its layers are disturbed as rounding does, so what bits are "
                    "worth cannot be measured. Load the model in bfloat16 or float32, or give a number of bits."
                )
            if share > 0:
                return share
    return 0.0


@contextmanager
def _disturbed(layers: Sequence[PlannedLinear], errors: Sequence[Tensor]) -> Iterator[None]:
    """Take errors off the weights for the length of a ``with`` block."""
    weights = [one.module.get_parameter("weight") for one in layers]
    dense = [one.data for one in weights]
    try:
        for one, weight, error in zip(layers, weights, errors):
            weight.data = (weight.data.float() - one.as_weight(error)).to(weight.dtype)
        yield
    finally:
        for weight, data in zip(weights, dense):
            weight.data = data
