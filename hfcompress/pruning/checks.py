"""Refuse, before the first step, what cannot be pruned rightly."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import TrainingArguments

from hfcompress.errors import HFCompressError, ModelError
from hfcompress.pruning.options import PruneOptions
from hfcompress.pruning.targets import as_rows

Weights = Mapping[str, nn.Parameter]


def refuse_replicas(args: TrainingArguments, criterion: str) -> None:
    """Raise HFCompressError when one process runs copies of the model, whose hooks would count in parallel."""
    if args.n_gpu > 1:
        raise HFCompressError(
            f"criterion='{criterion}' cannot watch the {args.n_gpu} copies of the model that one process runs. Start "
            "one process per device with torchrun, or show one device by CUDA_VISIBLE_DEVICES."
        )


def refuse_nan(weights: Weights) -> None:
    """Raise HFCompressError when a weight has no order."""
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise HFCompressError(f"Weight '{name}' holds NaN or infinite values, so it has no order to prune by.")


def refuse_frozen(weights: Weights, criterion: str) -> None:
    """Raise ModelError when a criterion needs gradients of weights that get none."""
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ModelError(
            f"criterion='{criterion}' needs gradients, but {some(frozen)} have requires_grad=False. "
            "Exclude or unfreeze them, or use criterion='magnitude'."
        )


def refuse_misfits(weights: Weights, options: PruneOptions, transposed: Collection[str]) -> None:
    """Raise ModelError when the pattern does not divide a weight."""
    pattern = options.parsed_pattern()
    if pattern is None:
        return
    misfits = []
    for name, weight in weights.items():
        shape = tuple(as_rows(weight, name in transposed).shape)
        if len(shape) != 2 or not pattern.divides(*shape):
            misfits.append(f"{name} ({' x '.join(map(str, shape))})")
    if misfits:
        raise ModelError(
            f"pattern='{options.pattern}' does not divide {some(misfits)} (outputs x inputs). Exclude them or choose "
            "another pattern."
        )


def refuse_overlap(mine: Weights, others: Iterable[Weights], kind: str) -> None:
    """Raise HFCompressError when two callbacks would prune the same weight."""
    own = {id(weight): name for name, weight in mine.items()}
    for other in others:
        shared = [own[id(weight)] for weight in other.values() if id(weight) in own]
        if shared:
            raise HFCompressError(
                f"Two {kind}s target {some(shared)}. Give each its own targets, or use one callback."
            )


def some(names: Sequence[str]) -> str:
    """Return the first names of many, as an error shows them."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
