"""Scales tuned by the whole model's output, once all codes are chosen."""

from hfcompress.quantization.tuning.portions import held_back
from hfcompress.quantization.tuning.steps import tune_scales_

__all__ = ["held_back", "tune_scales_"]
