"""Post-training quantization of the linear layers of any Transformers model."""

from __future__ import annotations

from hfcompress.quantize.options import GPTQ, RTN

METHODS: dict[str, type[RTN] | type[GPTQ]] = {"rtn": RTN, "gptq": GPTQ}

__all__ = ["GPTQ", "METHODS", "RTN"]
