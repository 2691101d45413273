"""One-shot pruning: weights go to zero in place, by calibration and without training."""

from __future__ import annotations

from hfcompress.pruning.oneshot.apply import prune
from hfcompress.pruning.oneshot.magnitude import Magnitude, magnitude_pruned
from hfcompress.pruning.oneshot.report import PrunedLayer, PruningReport
from hfcompress.pruning.oneshot.sparsegpt import SparseGPT, SparseGPTResult, sparsegpt
from hfcompress.pruning.oneshot.wanda import Wanda, wanda_pruned

METHODS: dict[str, type[Magnitude] | type[Wanda] | type[SparseGPT]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}

__all__ = [
    "METHODS",
    "Magnitude",
    "PrunedLayer",
    "PruningReport",
    "SparseGPT",
    "SparseGPTResult",
    "Wanda",
    "magnitude_pruned",
    "prune",
    "sparsegpt",
    "wanda_pruned",
]
