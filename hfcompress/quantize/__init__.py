"""Post-training quantization of the linear layers of any Transformers model."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from hfcompress.quantize.apply import quantize
from hfcompress.quantize.gptq import GPTQResult, gptq
from hfcompress.quantize.options import GPTQ, RTN
from hfcompress.quantize.report import QuantizationReport, QuantizedLinear
from hfcompress.quantize.rtn import round_to_nearest

METHODS: dict[str, type[RTN] | type[GPTQ]] = {"rtn": RTN, "gptq": GPTQ}

__all__ = [
    "GPTQ",
    "METHODS",
    "RTN",
    "GPTQResult",
    "QuantizationReport",
    "QuantizedLinear",
    "gptq",
    "quantize",
    "round_to_nearest",
]


class _CallableModule(ModuleType):
    """``hfcompress.quantize`` names this package and the function alike, whichever was imported first."""

    def __call__(self, *args: Any, **kwargs: Any) -> QuantizationReport:
        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
