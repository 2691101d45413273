"""Rounding learnt by gradient steps on what one layer of a stack gives, from the codes that GPTQ has found.

GPTQ weighs one linear layer at a time; attention and activations lie between them. AutoRound (arXiv 2309.05516) and
BRECQ (arXiv 2102.05426) learn codes on the output of the whole layer. They begin with weights rounded to nearest,
where hundreds of steps go into what GPTQ finds in closed form. Here steps are few and short: all but the weights near
to where rounding changes keep their codes. Steps are of Adam (arXiv 1412.6980).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hfcompress.calibration import LayerVisit
from hfcompress.calibration.attention import fast_attention
from hfcompress.packed import PackedWeight
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.tuning.codes import Learnt, LearntCodes
from hfcompress.quantization.tuning.portions import ONE_IN
from hfcompress.structure.modes import frozen
from hfcompress.structure.running import running_still

STEP_TOKENS = 2048
# How far all steps together take a weight at most, in codes, and a scale, as a share of 1 / 2**bits; half of what a
# constant rate would, as rates fall to 0.
POSITION_PATH, SCALE_PATH = 0.5, 0.8
BETAS, EPSILON = (0.9, 0.95), 1e-12
JUDGED = 4  # times: rounding may be best before its last step


class Portion(NamedTuple):
    """Some rows of one batch, by its number, and how many tokens they have, padding included."""

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
    """Learn codes and scales of the packed linear layers in one layer; None where too few rows would have to judge.

    planned: with the dense weights, as (full) names say.  outputs: of the layer in the dense model, for each batch.
    """
    found = ((visit.layer.get_submodule(one.name.removeprefix(f"{visit.name}.")), one.matrix) for one in planned)
    pairs = [(layer, weight) for layer, weight in found if isinstance(layer, PackedWeight)]
    seen, judging = _portions(outputs)
    if not (pairs and seen and judging):
        return None
    learnt = LearntCodes(pairs, zeros_stay)

    def real(portion: Portion) -> Tensor:
        return visit.portion(portion.batch, portion.rows, outputs[portion.batch])

    def error(portion: Portion) -> Tensor:
        wanted = real(portion).float()
        lack = (visit.portion(portion.batch, portion.rows).float() - wanted).square().sum(-1)
        return (lack / wanted.square().sum(-1).clamp_min(EPSILON)).sum()

    @torch.no_grad()
    def judged() -> float:
        return sum(float(error(one)) for one in judging)

    optimizer = torch.optim.Adam(
        [{"params": learnt.positions, "path": POSITION_PATH}, {"params": learnt.changes, "path": SCALE_PATH}],
        betas=BETAS,
        eps=EPSILON,
        fused=True,
    )
    with running_still(visit.layer), frozen(visit.layer), fast_attention():
        before = least = judged()
        best: list[Learnt] | None = None
        checks = {round(steps * (one + 1) / JUDGED) for one in range(JUDGED)}
        with learnt.in_force():
            for step, together in enumerate(_steps_of(seen, steps)):
                for portion in together:
                    with torch.enable_grad():
                        error(portion).backward()
                learnt.hold_fixed_()
                for group in optimizer.param_groups:
                    group["lr"] = group["path"] / steps * (1 - step / steps)
                optimizer.step()
                optimizer.zero_grad()
                if step + 1 in checks and (now := judged()) < least:
                    least, best = now, learnt.now()
    if best is not None:
        learnt.take_(best)
    tokens = sum(len(real(one)) for one in judging)
    return LearntRounding(*((one / tokens) ** 0.5 if tokens else 0.0 for one in (before, least)))


def _portions(outputs: Sequence[Tensor]) -> tuple[list[Portion], list[Portion]]:
    """Return rows of at most some ``STEP_TOKENS`` tokens for the steps, and one in ``ONE_IN`` of them that judges."""
    found = []
    for index, states in enumerate(outputs):
        all_rows, length = states.shape[:2]
        rows = -(-STEP_TOKENS // length)
        for first in range(0, all_rows, rows):
            last = min(first + rows, all_rows)
            found.append(Portion(index, slice(first, last), (last - first) * length))
    held = found[ONE_IN - 1 :: ONE_IN] or found[1:][-1:]
    return [one for one in found if one not in held], held


def _steps_of(seen: Sequence[Portion], steps: int) -> Iterator[list[Portion]]:
    """Yield what each step sees, at least ``STEP_TOKENS`` tokens: all in one random order, and then in another."""
    generator = torch.Generator().manual_seed(0)
    left: list[int] = []
    for _ in range(steps):
        together: list[Portion] = []
        while len(together) < len(seen) and sum(one.tokens for one in together) < STEP_TOKENS:
            left = left or torch.randperm(len(seen), generator=generator).tolist()
            together.append(seen[left.pop()])
        yield together
