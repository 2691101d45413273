"""Quantization-aware training: weights that are rounded in every forward pass and trained as if they were not."""

from __future__ import annotations

from hfcompress.quantization.aware.callback import QuantizeAwareCallback
from hfcompress.quantization.aware.layers import FakeQuantized, round_straight_through
from hfcompress.quantization.aware.options import QuantizeAwareOptions

__all__ = ["FakeQuantized", "QuantizeAwareCallback", "QuantizeAwareOptions", "round_straight_through"]
