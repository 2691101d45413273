"""What quantization-aware training can be told; the fields are the recipe's options."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from hfcompress.quantization.options import FORBID_UNKNOWN, RTN, Bits


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class QuantizeAwareOptions(RTN):
    """Train weights that round-to-nearest will quantize; the grid's options are those of ``RTN``.

    bits: of one code.  group_size: input columns that share a scale; None is one scale per output row.
    exclude: name patterns (``fnmatch``) of linear layers that stay as they are.
    symmetric: code 0 stands for 0; otherwise each group also has a zero point.
    scale: ``absmax`` takes it from the group's largest values; ``mse`` searches the one with the smallest squared
    error in every forward pass, which costs far more.
    embeddings, head: quantize the input embeddings or the output head too; tied ones go together.
    activations: must stay None; the inputs of layers are not rounded in training.
    start: share of ``max_steps`` that is trained before anything is rounded.
    dtype: of the checkpoint that the model is exported to, where it is not the dtype it is trained in; weights and
    scales are rounded to it as they will be there.
    """

    bits: Bits = 4
    group_size: Annotated[int, Field(ge=8)] | None = 128
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations:
            raise ValueError(f"activations={self.activations}: training rounds weights alone; leave it out")

    @property
    def method(self) -> RTN:
        """Return the method whose grid the weights are trained on."""
        return RTN(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RTN)})

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Return the dtype of the checkpoint, None for that of the model."""
        return None if self.dtype is None else getattr(torch, self.dtype)
