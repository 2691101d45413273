"""Sums that say how a unit's activation is spread within each class of the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hfcompress.errors import HFCompressError, ModelError
from hfcompress.pruning.inputs import counted

MOST_CLASSES = 64


def class_moments(inputs: Tensor, mask: Tensor | None, labels: Tensor | None, classes: int) -> Tensor:
    """Return the number of examples of each class, and the sums and sums of squares of each feature over them.

    inputs: (..., features), the batch first.  mask: see ``counted``.  labels: (batch,), when an example's activation
    is its mean over the tokens that count; or (batch, tokens), when every token is an example but those below 0.
    Returns (classes, 1 + 2 x features) float32; of no inputs, zeros.  Raises HFCompressError without labels.
    """
    rows = inputs.flatten(0, -2).float()
    if len(rows) == 0:
        return rows.new_zeros(classes, 1 + 2 * rows.shape[-1])
    refuse_unlabelled(labels)
    assert labels is not None
    if labels.dim() == 0 or len(rows) % max(1, len(labels)):
        raise HFCompressError(_NO_CLASSES.format(found=f"{tuple(labels.shape)}"))
    keep = counted(inputs, mask)
    if labels.dim() == 1:
        weights = keep.to(rows.dtype).view(len(labels), -1, 1)
        tokens = rows.masked_fill(~keep[:, None], 0).view(len(labels), -1, rows.shape[-1])
        rows, labels = tokens.sum(1) / weights.sum(1).clamp_min(1), labels
    elif labels.numel() == len(rows):
        chosen = keep & (labels.flatten() >= 0)
        rows, labels = rows[chosen], labels.flatten()[chosen]
    else:
        raise HFCompressError(_NO_CLASSES.format(found=f"{tuple(labels.shape)}"))
    members = nn.functional.one_hot(labels.long(), classes).to(rows.dtype).t()
    return torch.cat([members.sum(1, keepdim=True), members @ rows, members @ rows.square()], dim=1)


def refuse_no_classes(model: nn.Module, args: TrainingArguments, row: Any, has_own_loss: bool) -> None:
    """Raise before the first step where the batches will have no class labels.

    row: the first row of the training data, or None where it cannot be looked at: then the first batch is looked at.
    has_own_loss: whether the Trainer has a ``compute_loss_func``, to which it gives the labels instead of the model.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)
    classes = getattr(config, "num_labels", 0)
    name = type(model).__name__
    if "Classification" not in name or kind in ("regression", "multi_label_classification") or classes < 2:
        raise ModelError(
            f"criterion='mutual_information' needs labels that are classes, and {name} "
            f"({kind or f'{classes} labels'}) is trained on none. Use criterion='taylor' or 'activation'."
        )
    if classes > MOST_CLASSES:
        raise ModelError(
            f"criterion='mutual_information' compares at most {MOST_CLASSES} classes, not {classes}. "
            "Use criterion='taylor' or 'activation'."
        )
    if isinstance(row, dict) and not {"label", "labels", "label_ids"} & row.keys():
        raise HFCompressError(_NO_CLASSES.format(found="none") + f" Rows have: {', '.join(map(str, row))}.")
    if args.label_smoothing_factor:
        raise HFCompressError(
            "criterion='mutual_information' needs the labels in the model's forward, from which "
            f"label_smoothing_factor={args.label_smoothing_factor} takes them. Use criterion='taylor' or no smoothing."
        )
    if has_own_loss:
        raise HFCompressError(
            "criterion='mutual_information' needs the labels in the model's forward, from which compute_loss_func "
            "takes them. Use criterion='taylor', or let the model compute the loss."
        )


def refuse_unlabelled(labels: Tensor | None) -> None:
    """Raise HFCompressError for a batch without labels that are classes."""
    if labels is None or labels.is_floating_point() or labels.dim() > 2:
        raise HFCompressError(_NO_CLASSES.format(found="none" if labels is None else f"{tuple(labels.shape)}"))


def first_row(data: Any) -> Any:
    """Return the first row behind a data loader, or None where only reading on would show it."""
    rows: Any = getattr(data, "dataset", None)
    return rows[0] if hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and len(rows) else None


_NO_CLASSES = (
    "criterion='mutual_information' needs labels that are classes, one for each row or token, in the model's forward, "
    "and found: {found}. Add them to the data, or use criterion='taylor' or 'activation'."
)
