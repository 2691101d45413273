"""Eight-bit floats (float8_e4m3fn) for weights, and for inputs too: what recent GPUs multiply at twice the rate."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from hfcompress.quantization.options import FORBID_UNKNOWN, WhileLoading


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class Float8(WhileLoading):
    """Store weights as float8_e4m3fn with a scale per output row; needs no data.

    activations: round the inputs of linear layers too, each token by a scale of its own.
    exclude: name patterns (``fnmatch``) of linear layers that stay as they are.
    """

    needs_calibration: ClassVar[bool] = False
    package: ClassVar[str] = "compressed_tensors"
    bits: ClassVar[Literal[8]] = 8
    group_size: ClassVar[None] = None
    symmetric: ClassVar[bool] = True
    embeddings: ClassVar[bool] = False
    head: ClassVar[bool] = False

    activations: bool = False
    exclude: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What the method does, for people."""
        return "float8, a scale per row" + ", inputs in float8 too" * self.activations
