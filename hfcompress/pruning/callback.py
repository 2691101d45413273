"""Gradual pruning of weights as a Trainer callback."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from hfcompress.callbacks import refuse_split_weights
from hfcompress.pruning import checks
from hfcompress.pruning import masks as masking
from hfcompress.pruning.criteria import Criterion, criterion_of
from hfcompress.pruning.gradual import GradualPruneCallback, Weights
from hfcompress.pruning.options import PruneOptions
from hfcompress.pruning.patterns import Blocks
from hfcompress.pruning.targets import as_rows, lies_transposed, warn_of_experts

logger = logging.get_logger(__name__)


class PruneCallback(GradualPruneCallback):
    """Prune weights gradually while the Trainer trains (Zhu and Gupta, arXiv 1710.01878).

    ``Trainer(..., callbacks=[PruneCallback])`` works with the defaults; ``PruneCallback(sparsity=0.8)`` sets options:
    see ``PruneOptions`` for all of them.  The sparsity is a function of ``state.global_step`` alone, the masks are the
    weights' own zeros, and what a criterion has observed lies in the optimizer's checkpoint, so a run resumes from any
    checkpoint with no special flag.  Zeros that are there when training begins stay: ``sparsity=0`` trains a sparse
    model further and adds none.  Several callbacks may prune weights of their own.  Zeros of heads and
    neurons that ``HeadPruneCallback`` and ``NeuronPruneCallback`` closed so far count towards the sparsity; what they
    close later comes on top.
    Every evaluation, and the end, logs ``sparsity`` and ``sparsity/LAYER`` to the Trainer's log and to what
    ``report_to`` names; the first of several callbacks logs ``sparsity_1``, the next ``sparsity_2``.
    Raises HFCompressError for a wrong option, and before the first step for a set-up it cannot prune rightly.
    """

    options_type = PruneOptions
    log_name: ClassVar[str] = "sparsity"
    what: ClassVar[str] = "weights"
    options: PruneOptions
    _transposed: frozenset[str] = frozenset()

    def _find(self, model: nn.Module) -> Weights:
        refuse_split_weights(model, type(self).__name__)
        weights = masking.prunable_weights(model, self.options.targets, self.options.exclude)
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
        self._transposed = frozenset(name for name, module in modules.items() if lies_transposed(module))
        return weights

    def _check(
        self, args: TrainingArguments, model: nn.Module, weights: Weights, criterion: Criterion, data: Any
    ) -> None:
        super()._check(args, model, weights, criterion, data)
        checks.refuse_misfits(weights, self.options, self._transposed)
        warn_of_experts(model, self.options.targets, type(self).__name__)
        for name, weight in weights.items():
            if not bool(weight.any()):
                logger.warning(f"PruneCallback: '{name}' is all zero, so all of it counts as pruned and stays zero.")

    def _criterion(self, seed: int, model: nn.Module) -> Criterion:
        return criterion_of(self.options.criterion, seed)

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        return as_rows(tensor, name in self._transposed)

    def _mask_rows(self) -> masking.Masks:
        return {name: self._rows(name, mask) for name, mask in self._masks.items()}

    def _masks_from_zeros(self, model: nn.Module, weights: Weights) -> masking.Masks:
        return masking.masks_from_zeros(weights)

    def _prune(self, weights: Weights, sparsity: float) -> None:
        assert self._evidence is not None
        evidence = self._evidence
        masking.prune_masks_(
            self._mask_rows(),
            lambda name: evidence.scores(name, weights[name]),
            sparsity,
            self.options.scope,
            self.options.parsed_pattern(),
            evidence.unseen,
        )

    def _reached(self, model: nn.Module, weights: Weights) -> tuple[float, dict[str, float]]:
        return masking.sparsity_of(weights), masking.sparsity_by_layer(model, weights)

    def _grain(self, weights: Weights) -> float:
        groups = 1 if self.options.scope == "global" else len(weights)
        pattern = self.options.parsed_pattern()
        unit = max(pattern.size(m.shape[1]) for m in self._mask_rows().values()) if isinstance(pattern, Blocks) else 1
        return groups * unit / sum(weight.numel() for weight in weights.values())
