"""What a model's linear layers see on real data, and how their weights are changed by it, one layer at a time.

Quantization and one-shot pruning share it.
"""

from __future__ import annotations

from hfcompress.calibration.columns import ColumnPruning, Rounding, Selection, compress_columns
from hfcompress.calibration.factor import HessianFactor, factor_hessian
from hfcompress.calibration.hessian import accumulate_hessian_
from hfcompress.calibration.observe import InputHessian, InputSquares
from hfcompress.calibration.texts import calibration_batches
from hfcompress.calibration.walk import LayerVisit, walk_layers

__all__ = [
    "ColumnPruning",
    "HessianFactor",
    "InputHessian",
    "InputSquares",
    "LayerVisit",
    "Rounding",
    "Selection",
    "accumulate_hessian_",
    "calibration_batches",
    "compress_columns",
    "factor_hessian",
    "walk_layers",
]
