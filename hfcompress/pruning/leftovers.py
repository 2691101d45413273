"""What a run that was cut off, as by an interrupt in a notebook, left on the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hfcompress.pruning.inputs import Watch
from hfcompress.pruning.masks import GradientMask, Masks


def remove_leftovers(model: nn.Module, masks: Sequence[Masks], watches: Sequence[Watch | None]) -> None:
    """Take off pruning's hooks except those of these masks and watches: weights would stay zero that no run prunes.

    Callbacks take their own hooks off when training ends, but a run that was cut off has no end.
    """
    for weight in model.parameters():
        hooks = getattr(weight, "_post_accumulate_grad_hooks", None) or {}
        for key, hook in list(hooks.items()):
            if isinstance(hook, GradientMask) and not any(hook.masks is one for one in masks):
                del hooks[key]
    for hook in list(model._forward_pre_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Watch) and not any(owner is one for one in watches):
            owner.remove()
