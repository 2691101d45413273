"""Post-training quantization of the linear layers of any Transformers model."""

from __future__ import annotations

from hfcompress.quantization.apply import quantize
from hfcompress.quantization.aware import QuantizeAwareCallback, QuantizeAwareOptions
from hfcompress.quantization.gptq import GPTQResult, gptq
from hfcompress.quantization.options import GPTQ, RTN
from hfcompress.quantization.report import QuantizationReport, QuantizedLinear
from hfcompress.quantization.rtn import round_to_nearest

METHODS: dict[str, type[RTN] | type[GPTQ]] = {"rtn": RTN, "gptq": GPTQ}

__all__ = [
    "GPTQ",
    "METHODS",
    "RTN",
    "GPTQResult",
    "QuantizationReport",
    "QuantizeAwareCallback",
    "QuantizeAwareOptions",
    "QuantizedLinear",
    "gptq",
    "quantize",
    "round_to_nearest",
]
