"""Gradual pruning of weights, heads and neurons as Trainer callbacks; pruning in one shot lies in ``oneshot``."""

from __future__ import annotations

from hfcompress.pruning.callback import PruneCallback
from hfcompress.pruning.options import PruneOptions
from hfcompress.pruning.units import HeadPruneCallback, HeadPruneOptions, NeuronPruneCallback, NeuronPruneOptions

__all__ = [
    "HeadPruneCallback",
    "HeadPruneOptions",
    "NeuronPruneCallback",
    "NeuronPruneOptions",
    "PruneCallback",
    "PruneOptions",
]
