"""Eight-bit floats (float8_e4m3fn) for weights, and for inputs too."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from hfcompress.quantization.options import FORBID_UNKNOWN, ByteCodes


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class Float8(ByteCodes):
    """Store weights as float8_e4m3fn with a scale per output row; needs no data.

    activations: round the inputs of linear layers too, each token by a scale of its own.
    exclude: name patterns (``fnmatch``) of linear layers that stay as they are.
    """

    needs_calibration: ClassVar[bool] = False

    activations: bool = False
    exclude: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What the method does, for people."""
        return "float8, a scale per row" + ", inputs in float8 too" * self.activations
