"""What a criterion has observed of the weights, kept where the Trainer's own checkpoints carry it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState
from transformers.utils import logging

from hfcompress.errors import CheckpointError, HFCompressError
from hfcompress.pruning.checks import some
from hfcompress.pruning.criteria import Criterion

logger = logging.get_logger(__name__)
KEY = "hfcompress.pruning"
Rows = Callable[[str, Tensor], Tensor]


class Evidence:
    """The states of one criterion over some weights, which ``rows`` lays out by name as the criterion takes them.

    They lie in the optimizer's first parameter group, which every torch optimizer saves and loads as it is: a
    checkpoint has them or has no optimizer at all, wherever it is moved, and no file beside it can be lost or half
    written.  ``trainer_state.json`` notes of which step they must be, and they note the step that they belong to.
    Observations are counted for each weight: layers that LayerDrop leaves out of a step are not seen in it.
    """

    def __init__(self, criterion: Criterion, name: str, weights: Mapping[str, Tensor], rows: Rows) -> None:
        self.criterion = criterion
        self._rows = rows
        self.label = f"{name} of {next(iter(weights))}"
        self.observes = criterion.needs_gradient or criterion.needs_activations
        self._marks: dict[str, Any] = {}
        self._kept: dict[str, Any] = {
            "step": 0,
            "observed": dict.fromkeys(weights, 0),
            "states": {key: criterion.initial(self._rows(key, weight.detach())) for key, weight in weights.items()},
        }

    @property
    def is_ready(self) -> bool:
        """Say whether any scores can be given."""
        return len(self.unseen) < len(self._kept["observed"])

    @property
    def unseen(self) -> list[str]:
        """The weights of which nothing has been observed, so that they have no scores: their layers did not run."""
        return [name for name, count in self._kept["observed"].items() if self.observes and count == 0]

    def restore(self, optimizer: Any, state: TrainerState) -> None:
        """Go on with what the optimizer's checkpoint holds, or put the empty state there.

        At step 0 all begins anew: what an optimizer holds then is of an attempt that was given up.  After steps that
        were trained without this, too.  Raises CheckpointError when a checkpoint should have it and has not, or has
        that of another step or of other weights.
        """
        if not self.observes:
            return
        self._marks = state.stateful_callbacks if isinstance(state.stateful_callbacks, dict) else {}
        noted = self._marks.get(KEY, {}).get(self.label)
        places = optimizer.param_groups[0].setdefault(KEY, {})
        found = places.get(self.label)
        step = state.global_step
        if step > 0 and found is None and noted == step:
            raise CheckpointError(
                f"The checkpoint of step {step} lacks the scores ({self.label}) that its run had: it was "
                "not written to its end, or with save_only_model=True. Resume from another one."
            )
        # Whoever trains on without this hands on what it wrote: scores and note are of one and the same older step.
        is_behind = found is not None and found["step"] < step and noted in (None, found["step"])
        if step > 0 and found is not None and found["step"] != step and not is_behind:
            raise CheckpointError(
                f"The optimizer holds scores ({self.label}) of step {found['step']}, but training goes on from step "
                f"{step}: the checkpoint was not written to its end, or train() was cut off before. "
                "Resume from another checkpoint, or make a new Trainer."
            )
        if step > 0 and found is not None and not is_behind:
            self._take_over(found)
        elif step > 0:
            older = "" if found is None else f" later than of step {found['step']}"
            logger.warning(f"The checkpoint holds no scores ({self.label}){older}; they begin at step {step}.")
        places[self.label] = self._kept
        self.belongs_to(step)

    def _take_over(self, found: Mapping[str, Any]) -> None:
        """Copy what a checkpoint holds.  Raises CheckpointError when it is of other weights."""
        mine, theirs = self._kept["states"], found["states"]
        if mine.keys() != theirs.keys():
            missing, more = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
            faults = [f"not of {some(missing)}"] * bool(missing) + [f"also of {some(more)}"] * bool(more)
            raise CheckpointError(
                f"The checkpoint holds scores ({self.label}) of other weights than are pruned now: "
                f"{', and '.join(faults)}. Scores over unlike numbers of steps do not compare, so resume with the "
                "options that its run had."
            )
        for name, state in mine.items():
            state.update({key: theirs[name][key].to(empty.device) for key, empty in state.items()})
        self._kept["observed"].update(found["observed"])

    def remove_from(self, optimizer: Any) -> None:
        """Take the state out of the optimizer."""
        if self.observes:
            optimizer.param_groups[0].get(KEY, {}).pop(self.label, None)

    def belongs_to(self, step: int) -> None:
        """Note the step that the next checkpoint will be of, in the state and beside it."""
        self._kept["step"] = step
        if self.observes:
            self._marks.setdefault(KEY, {})[self.label] = step

    @torch.no_grad()
    def observe_gradients(self, weights: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        """Take in the gradients of one step; a step that the gradient scaler will skip does not count.

        A weight without a gradient, since its layer did not run, is not seen.  Raises HFCompressError when no weight
        at all has a gradient when the optimizer steps.
        """
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        if not gradients and all(w.grad is None for group in optimizer.param_groups for w in group["params"]):
            raise HFCompressError(
                f"No weight has a gradient before the optimizer's step, so there are no scores ({self.label}). "
                "Optimizers that step inside the backward pass keep none; use criterion='magnitude' with them."
            )
        if getattr(optimizer, "scaler", None) is not None and not _all_finite(optimizer):
            return
        for name, gradient in gradients.items():
            rows = self._rows(name, weights[name].detach()), self._rows(name, gradient)
            self._observe(name, *rows)

    @torch.no_grad()
    def observe_sums(self, weights: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor]) -> None:
        """Take in what was watched in the forwards of one step; it does not count if it overflowed."""
        if not all(bool(torch.isfinite(one).all()) for one in sums.values()):
            return
        for name, one in sums.items():
            # The sums count tokens or examples, too: only a layer that did not run has none.
            if bool(one.any()):
                self._observe(name, self._rows(name, weights[name].detach()), one)

    def _observe(self, name: str, weight: Tensor, evidence: Tensor) -> None:
        self.criterion.observe_(self._kept["states"][name], weight, evidence)
        self._kept["observed"][name] += 1

    @torch.no_grad()
    def scores(self, name: str, weight: Tensor) -> Tensor:
        """Return the scores of a weight: (outputs, inputs), or one per unit; they mean nothing for ``unseen`` ones."""
        return self.criterion.scores(name, self._rows(name, weight.detach()), self._kept["states"][name])


def _all_finite(optimizer: Any) -> bool:
    """Say what the gradient scaler found: clipping keeps what is not finite as it is."""
    gradients = [w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
