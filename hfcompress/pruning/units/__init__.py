"""Gradual pruning of whole heads and neurons."""

from __future__ import annotations

from hfcompress.pruning.units.callback import HeadPruneCallback, NeuronPruneCallback
from hfcompress.pruning.units.options import HeadPruneOptions, NeuronPruneOptions

__all__ = ["HeadPruneCallback", "HeadPruneOptions", "NeuronPruneCallback", "NeuronPruneOptions"]
