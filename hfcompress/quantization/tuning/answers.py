"""What a quantized model is compared with the dense one by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.calibration.observe import real_tokens
from hfcompress.calibration.record import hidden_of, stacks_in_order
from hfcompress.calibration.running import Batch, run_batch
from hfcompress.calibration.walk import token_masks
from hfcompress.logits.chunks import sum_over_rows
from hfcompress.logits.forward_kl import forward_kl
from hfcompress.structure.stack import layer_stacks


class Answers:
    """The logits of a model with an output head, or else what its stacks give: (tokens, size) each, without padding.

    batch: one that the model runs on.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        self.model = model
        stacks = layer_stacks(model)
        self.stacks = stacks_in_order(model, stacks, batch) if len(stacks) > 1 else stacks
        self.by_logits = model.get_output_embeddings() is not None

    @property
    def measure(self) -> str:
        """Return the name of what ``distance`` gives."""
        return "KL divergence" if self.by_logits else "squared error"

    def of(self, batch: Batch) -> list[Tensor]:
        """Run the model as it is now."""
        if self.by_logits:
            logits = run_batch(self.model, batch)["logits"]
            return [real_tokens(logits, token_masks(self.model, batch, is_last=True).own)]
        found: list[Tensor] = []
        with ExitStack() as hooks:
            for stack in self.stacks:
                masks = token_masks(self.model, batch, is_last=stack is self.stacks[-1])
                handle = stack.layers[-1].register_forward_hook(_keeping(found, masks.own))
                hooks.callback(handle.remove)
            run_batch(self.model, batch)
        return found

    def distance(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Return how far answers are from those of the dense model, summed over the tokens; it has a gradient."""
        if not self.by_logits:
            return torch.stack([_squared_error(*pair) for pair in zip(found, wanted)]).mean()
        ((own,), (dense,)) = found, wanted

        def divergence(student: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            return forward_kl(student, dense[rows].to(student.dtype), 1.0)

        return sum_over_rows(own, torch.arange(len(own), device=own.device), [1.0], [divergence])[0]


def _squared_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared error as a share of the squares, times the number of tokens."""
    wanted = wanted.float()
    return (found.float() - wanted).square().sum() * len(wanted) / wanted.square().sum()


def _keeping(found: list[Tensor], mask: Tensor | None) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(real_tokens(hidden_of(output), mask))

    return keep
