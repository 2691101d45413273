"""Gradient steps on the scales of a quantized model, so that its output comes near to the dense one's.

GPTQ sees one layer at a time. What its errors do to the output in the end is known only once all layers are
quantized; then codes stay as they are, and scales, which take any value, are tuned against the dense model, as the
second phase of EfficientQAT (arXiv 2407.11062) does on labels. Steps are of Adam (arXiv 1412.6980).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hfcompress.calibration.attention import fast_attention
from hfcompress.calibration.parts import replaced_forwards
from hfcompress.calibration.running import Batch
from hfcompress.devices import give_back_holes, release_freed_memory
from hfcompress.packed import PackedWeight
from hfcompress.progress import meter
from hfcompress.quantization.placing import put_, restore_
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.report import ScaleTuning
from hfcompress.quantization.tuning.answers import Answers
from hfcompress.quantization.tuning.portions import portions, rows_of
from hfcompress.quantization.tuning.scales import TunedScales
from hfcompress.structure.modes import frozen
from hfcompress.structure.running import running_still
from hfcompress.structure.stack import layer_stacks

STEP_TOKENS = 1024
RATE, WARM_STEPS = 0.012, 5  # the rate as a share of 1 / 2**bits of a scale


def tune_scales_(
    model: PreTrainedModel,
    planned: Sequence[PlannedLinear],
    batches: Sequence[Batch],
    unseen: Sequence[Batch],
    tokens: int,
    steps: int,
) -> ScaleTuning:
    """Tune the scales of packed linear layers inside the stacks.

    planned: with the dense layers.  batches: for the steps, ``tokens`` tokens in all.  unseen: rows that judge: scales
    stay as they are where these gain nothing.  steps: at most so many, of some ``STEP_TOKENS`` tokens, no row twice.
    """
    started = time.perf_counter()
    release_freed_memory()  # of the layers' turns, whose blocks have other sizes
    rows = max(1, round(STEP_TOKENS * sum(map(rows_of, batches)) / tokens))
    seen, judging = _steps_of(batches, rows)[:steps], portions(unseen, rows)
    answers, scales = Answers(model, batches[0]), TunedScales(_packed(model, planned))

    def distance(batch: Batch) -> tuple[Tensor, int]:
        """Return the distance from the dense model's answers, and how many these are."""
        with dense_again(model, planned), torch.no_grad():
            wanted = answers.of(batch)
        return answers.distance(answers.of(batch), wanted), len(wanted[0])

    @torch.no_grad()
    def average() -> float:
        totals, counts = zip(*map(distance, judging))
        return float(sum(map(float, totals)) / sum(counts))

    with meter("Tuning scales", len(seen)) as bar, running_still(model), frozen(model), fast_attention():
        before = average()
        optimizer = torch.optim.Adam(scales.changes)
        with scales.in_force(), _checkpointed(model):
            for step, together in enumerate(seen):
                for batch in together:
                    with torch.enable_grad():
                        distance(batch)[0].backward()
                optimizer.param_groups[0]["lr"] = _rate(step, len(seen))
                optimizer.step()
                optimizer.zero_grad()
                give_back_holes()
                bar.advance()
            after = average()
    kept = after < before
    if kept:
        scales.write_()
    return ScaleTuning(answers.measure, before, after, kept, len(seen), time.perf_counter() - started)


def _steps_of(batches: Sequence[Batch], rows: int) -> list[list[Batch]]:
    """Return steps of at least so many rows, in portions: in another order than they came in, as texts fill rows."""
    parts = portions(batches, rows)
    steps: list[list[Batch]] = [[]]
    for index in torch.randperm(len(parts), generator=torch.Generator().manual_seed(0)).tolist():
        if sum(map(rows_of, steps[-1])) >= rows:
            steps.append([])
        steps[-1].append(parts[index])
    return steps


def _rate(step: int, steps: int) -> float:
    """Return by how much a step changes scales: after the first ones half a cosine, down to 0."""
    return RATE * min(1.0, (step + 1) / WARM_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2


def _packed(model: nn.Module, planned: Sequence[PlannedLinear]) -> list[PackedWeight]:
    inside = [f"{stack.name}." for stack in layer_stacks(model)]
    names = [name for one in planned for name in (one.name, *one.also) if name.startswith(tuple(inside))]
    modules = [model.get_submodule(name) for name in names]
    return [module for module in modules if isinstance(module, PackedWeight)]


@contextmanager
def dense_again(model: nn.Module, planned: Sequence[PlannedLinear]) -> Iterator[None]:
    """Put the dense layers back for a while."""
    packed = {name: model.get_submodule(name) for one in planned for name in (one.name, *one.also)}
    try:
        restore_(model, planned)
        yield
    finally:
        for name, module in packed.items():
            put_(model, name, module)


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Have every layer keep its input alone for the backward pass, and run once more there (arXiv 1604.06174)."""
    layers = [layer for stack in layer_stacks(model) for layer in stack.layers]
    with replaced_forwards((layer, partial(checkpoint, layer.forward, use_reentrant=False)) for layer in layers):
        yield
