"""Codes and scales learnt by gradients: of a layer once it is rounded, and scales of the whole model at last."""

from hfcompress.quantization.tuning.learning import LearntRounding, learn_rounding_
from hfcompress.quantization.tuning.portions import held_back
from hfcompress.quantization.tuning.steps import tune_scales_

__all__ = ["LearntRounding", "held_back", "learn_rounding_", "tune_scales_"]
