"""What a model's linear layers see on real data: one layer at a time, for quantization and one-shot pruning."""

from __future__ import annotations

from hfcompress.calibration.hessian import accumulate_hessian_
from hfcompress.calibration.observe import InputHessian
from hfcompress.calibration.walk import LayerVisit, walk_layers

__all__ = ["InputHessian", "LayerVisit", "accumulate_hessian_", "walk_layers"]
