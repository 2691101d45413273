"""Remove closed heads and neurons physically: the same function from smaller matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.structure.attention import attention_in
from hfcompress.structure.cut import cut_
from hfcompress.structure.ffn import ffn_in
from hfcompress.structure.gates import fold_gates_
from hfcompress.structure.inputs import dummy_inputs
from hfcompress.structure.plan import Plan, plan_shrink
from hfcompress.structure.probe import trace_model
from hfcompress.structure.resize import Edits
from hfcompress.structure.running import float_outputs
from hfcompress.structure.shapes import record_shapes
from hfcompress.structure.sites import AttentionSite, FfnSite

# Relative to the largest output; sums over fewer terms round differently.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class ShrinkReport:
    """What ``shrink`` removed.

    heads, key_value_heads, neurons: (before, after) per attention or feed-forward block.  parameters: (before, after)
    of the whole model.  config: the values that were changed in the model's config.  uneven: sizes and counts
    (``module:attribute``) that the config still does not say, and its record holds instead; empty when stock
    Transformers loads the model.
    not_searched: why heads or neurons could not be looked for in this architecture.
    """

    heads: dict[str, tuple[int, int]]
    key_value_heads: dict[str, tuple[int, int]]
    neurons: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    config: dict[str, int] = field(default_factory=dict)
    uneven: tuple[str, ...] = ()
    not_searched: tuple[str, ...] = ()

    @property
    def removed_heads(self) -> int:
        """Query heads removed from the whole model."""
        return sum(before - after for before, after in self.heads.values())

    @property
    def removed_neurons(self) -> int:
        """Feed-forward neurons removed from the whole model."""
        return sum(before - after for before, after in self.neurons.values())

    @property
    def summary(self) -> str:
        """Say in a line what was done."""
        before, after = self.parameters
        return f"{self.removed_heads} heads and {self.removed_neurons} neurons removed, {before - after:,} parameters"


def shrink(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> ShrinkReport:
    """Remove the heads and neurons that gates closed, or whose weights are zero, and return what was removed.

    In place.  A head goes when its columns of the output projection are zero, a neuron when its column of the down
    projection is; gates on the model are multiplied into these columns first and taken off.  Key/value heads go with
    all their query heads; where an architecture needs equal numbers, the fewest closed heads that make them equal
    stay, as zeros.  The config is changed where it can say the new sizes, and else gets a record of them that
    ``from_pretrained`` reads once hfcompress is imported.  inputs: arguments of one forward; made from
    the config by default.

    The shrunk model is run against the model as it was: a difference, or an architecture that cannot express the new
    sizes, raises ModelError and leaves the model as it was.
    """
    inputs = dict(inputs if inputs is not None else dummy_inputs(model))
    before = sum(parameter.numel() for parameter in model.parameters())
    attention, ffn, reasons = _sites(model, inputs)
    edits = Edits()
    try:
        fold_gates_(model, edits)
        expected = float_outputs(model, inputs)
        plan, config = _shrink_to_fit(model, attention, ffn, inputs, expected)
    except Exception:
        edits.undo()
        raise
    shapes = record_shapes(model)
    after = sum(parameter.numel() for parameter in model.parameters())
    return ShrinkReport(
        heads={site.name: (site.heads, len(plan.heads[site.name].units)) for site in attention},
        key_value_heads={
            site.name: (site.key_value_heads, len(plan.heads[site.name].key_value_heads)) for site in attention
        },
        neurons={site.name: (site.width, len(plan.neurons[site.name].units)) for site in ffn},
        parameters=(before, after),
        config=config,
        uneven=tuple(f"{module}:{name}" for module, values in shapes.items() for name in values),
        not_searched=tuple(reasons),
    )


def _sites(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[list[AttentionSite], list[FfnSite], list[str]]:
    """Return what one run finds, and the reason for what it does not; with neither kind, raise it."""
    trace = trace_model(model, inputs)
    attention: list[AttentionSite] = []
    ffn: list[FfnSite] = []
    reasons: list[str] = []
    try:
        attention = attention_in(model, trace)
    except ModelError as error:
        reasons.append(str(error))
    try:
        ffn = ffn_in(model, trace)
    except ModelError as error:
        reasons.append(str(error))
    if not attention and not ffn:
        raise ModelError(" ".join(reasons))
    return attention, ffn, reasons


def _shrink_to_fit(
    model: PreTrainedModel,
    attention: Sequence[AttentionSite],
    ffn: Sequence[FfnSite],
    inputs: Mapping[str, Any],
    expected: list[Tensor],
) -> tuple[Plan, dict[str, int]]:
    """Cut as much as runs: layers without any head or neuron if the architecture takes them, else with one closed."""
    for least_heads, least_neurons in ((0, 0), (1, 0), (0, 1), (1, 1)):
        plan = plan_shrink(model, attention, ffn, least_heads, least_neurons)
        if not plan.removes:
            return plan, {}
        edits = Edits()
        try:
            config = cut_(model, edits, plan)
            prove_equal(model, inputs, expected)
        except Exception as error:
            edits.undo()
            if not isinstance(error, ModelError) or not plan.empties:
                raise
        else:
            return plan, config
    raise AssertionError("the last plan empties no layer")


@torch.no_grad()
def prove_equal(model: PreTrainedModel, inputs: Mapping[str, Any], expected: list[Tensor]) -> None:
    """Raise ModelError when a model that was cut cannot run, or gives other outputs than before, but for rounding."""
    try:
        outputs = float_outputs(model, inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot run without its closed heads or neurons ({type(error).__name__}: {error});"
            " its architecture fixes their number."
        ) from error
    for before, after in zip(expected, outputs, strict=True):
        bound = TOLERANCE.get(before.dtype, 1e-2) * float(before.abs().max())
        difference = float((after - before).abs().max()) if after.shape == before.shape else float("inf")
        if not difference <= bound:
            raise ModelError(
                f"{type(model).__name__} without its closed heads and neurons gives other outputs (by "
                f"{difference:.1e}, at most {bound:.1e} expected); its architecture uses their number in a way that "
                "is not understood."
            )
