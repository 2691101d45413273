"""Rounding learnt by gradient steps on what one layer of a stack gives, from the codes that GPTQ has found.

GPTQ weighs one linear layer at a time; attention and activations lie between them. AutoRound (arXiv 2309.05516) and
BRECQ (arXiv 2102.05426) learn codes on the output of the whole layer. They begin with weights rounded to nearest,
where hundreds of steps go into what GPTQ finds in closed form. Here steps are few and short: all but the weights near
to where rounding changes keep their codes. Steps are of Adam (arXiv 1412.6980).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hfcompress.calibration import LayerVisit
from hfcompress.packed import PackedWeight
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.tuning.codes import Learnt, LearntCodes
from hfcompress.quantization.tuning.portions import ONE_IN
from hfcompress.structure.modes import frozen
from hfcompress.structure.running import running_still

STEP_TOKENS = 2048
# How far a constant rate would take a weight, in codes, and a scale, as a share of 1 / 2**bits; rates fall to 0, so it
# is half as far.
POSITION_PATH, SCALE_PATH = 0.5, 0.8
BETAS, EPSILON = (0.9, 0.95), 1e-12  # of Adam
LEAST_SQUARES = 1e-12  # of a token's hidden states
JUDGED = 4  # times: rounding may be best before its last step


class Portion(NamedTuple):
    """Some rows of one batch, by its number, and how many tokens they have without padding."""

    batch: int
    rows: slice
    tokens: int


class LearntRounding(NamedTuple):
    """How far the layer's output is from the dense model's, on rows that no step saw.

    The root of the average token's squared error, as a share of the squares of its hidden states: that is what the
    norms of later layers leave of it.  after: of what is kept, which is what was before where nothing is better.
    """

    before: float
    after: float


def learn_rounding_(
    visit: LayerVisit, planned: Sequence[PlannedLinear], outputs: Sequence[Tensor], steps: int, zeros_stay: bool
) -> LearntRounding | None:
    """Learn codes and scales of packed linear layers in one layer.

    None where there are none, or, with a warning, where no rows could judge.
    planned: of these linear layers, with the dense ones.  outputs: of the layer in the dense model, for each batch.
    zeros_stay: no code that is 0 becomes another one.
    """
    packed = _packed(visit, planned)
    if not packed:
        return None
    seen, judging = _portions(visit, outputs)
    if not judging:
        warnings.warn(
            f"The rounding of {visit.name} is not learnt: its calibration data cannot be cut in two, and rows that "
            "no step sees have to judge. Give more rows, or batches of fewer.",
            stacklevel=2,
        )
        return None
    learnt = LearntCodes(packed, zeros_stay)

    def error(portion: Portion) -> Tensor:
        wanted = visit.part_of(portion.batch, portion.rows, outputs[portion.batch]).float()
        lack = (visit.part_output(portion.batch, portion.rows).float() - wanted).square().sum(-1)
        return (lack / wanted.square().sum(-1).clamp_min(LEAST_SQUARES)).sum()

    @torch.no_grad()
    def judged() -> float:
        return sum(float(error(one)) for one in judging)

    optimizer = torch.optim.Adam(
        [
            {"params": learnt.positions, "path": POSITION_PATH},
            {"params": learnt.scales.changes, "path": SCALE_PATH},
        ],
        betas=BETAS,
        eps=EPSILON,
        fused=True,
    )
    size = outputs[0].shape[-1]  # as a factor keeps gradients in the range of float16
    with running_still(visit.layer), frozen(visit.layer):
        before = least = judged()
        best: list[Learnt] | None = None
        checks = {round(steps * (one + 1) / JUDGED) for one in range(JUDGED)}
        with learnt.in_force():
            for step, together in enumerate(_steps_of(seen, steps)):
                for portion in together:
                    with torch.enable_grad():
                        (error(portion) * size).backward()
                learnt.hold_fixed_()
                for group in optimizer.param_groups:
                    group["lr"] = group["path"] / steps * (1 - step / steps)
                optimizer.step()
                optimizer.zero_grad()
                if step + 1 in checks and (now := judged()) < least:
                    least, best = now, learnt.now()
    if best is not None:
        learnt.take_(best)
    tokens = sum(one.tokens for one in judging)
    return LearntRounding((before / tokens) ** 0.5, (least / tokens) ** 0.5)


def _packed(visit: LayerVisit, planned: Sequence[PlannedLinear]) -> list[tuple[PackedWeight, Tensor]]:
    """Return packed layers with their dense weights; without those that share a weight with another in this layer."""
    inside = f"{visit.name}."
    alone = [one for one in planned if not any(name.startswith(inside) for name in one.also)]
    found = ((visit.layer.get_submodule(one.name.removeprefix(inside)), one.matrix) for one in alone)
    return [(layer, weight) for layer, weight in found if isinstance(layer, PackedWeight)]


def _portions(visit: LayerVisit, outputs: Sequence[Tensor]) -> tuple[list[Portion], list[Portion]]:
    """Return rows of about ``STEP_TOKENS`` tokens each for the steps, and those that judge.

    One portion in ``ONE_IN``, or the last one of fewer; none where there is only one. A batch that is alone is cut in
    two at least.
    """
    found = []
    for index, states in enumerate(outputs):
        most = STEP_TOKENS if len(outputs) > 1 else min(STEP_TOKENS, -(-states.shape[:-1].numel() // 2))
        for rows in visit.parts(index, most):
            found.append(Portion(index, rows, len(visit.part_of(index, rows, states))))
    found = [one for one in found if one.tokens]
    held = found[ONE_IN - 1 :: ONE_IN] or found[1:][-1:]
    return [one for one in found if one not in held], held


def _steps_of(seen: Sequence[Portion], steps: int) -> Iterator[list[Portion]]:
    """Yield what each step sees, about ``STEP_TOKENS`` tokens or all: one random order after another."""
    generator = torch.Generator().manual_seed(0)
    left: list[int] = []
    for _ in range(steps):
        together: list[int] = []
        tokens = 0
        while not together or (len(together) < len(seen) and tokens + seen[0].tokens // 2 <= STEP_TOKENS):
            order = left or torch.randperm(len(seen), generator=generator).tolist()
            chosen = next(one for one in reversed(order) if one not in together)
            left = [one for one in order if one != chosen]
            together.append(chosen)
            tokens += seen[chosen].tokens
        yield [seen[one] for one in together]
