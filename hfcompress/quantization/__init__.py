"""Post-training quantization of the linear layers of any Transformers model."""

from __future__ import annotations

from hfcompress.quantization.apply import Method, quantize
from hfcompress.quantization.aware import QuantizeAwareCallback, QuantizeAwareOptions
from hfcompress.quantization.awq import AWQ
from hfcompress.quantization.bitsandbytes import BitsAndBytes
from hfcompress.quantization.float8 import Float8
from hfcompress.quantization.gptq import GPTQResult, gptq
from hfcompress.quantization.options import GPTQ, RTN
from hfcompress.quantization.report import QuantizationReport, QuantizedLinear
from hfcompress.quantization.rtn import round_to_nearest
from hfcompress.quantization.smoothquant import SmoothQuant

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "bitsandbytes": BitsAndBytes,
    "smoothquant": SmoothQuant,
    "float8": Float8,
}

__all__ = [
    "AWQ",
    "GPTQ",
    "METHODS",
    "RTN",
    "BitsAndBytes",
    "Float8",
    "GPTQResult",
    "Method",
    "QuantizationReport",
    "QuantizeAwareCallback",
    "QuantizeAwareOptions",
    "QuantizedLinear",
    "SmoothQuant",
    "gptq",
    "quantize",
    "round_to_nearest",
]
