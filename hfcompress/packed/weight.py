"""A matrix kept as packed integer codes with scales: what all packed layers have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hfcompress.packed.packing import WORD_BITS, pack_codes, packed_width, unpack_codes

SHAPE_BYTES = 16  # of the two whole numbers of ``weight_shape``
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")  # of a packed weight in a checkpoint


def values_of(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return what codes stand for, in the dtype of the scales.  codes: (rows, columns).  scale: (rows, groups)."""
    groups = codes.to(scale.dtype).view(len(codes), scale.shape[1], -1)
    if zero_point is not None:
        groups.sub_(zero_point.to(scale.dtype).unsqueeze(-1))
    return groups.mul_(scale.unsqueeze(-1)).view(codes.shape)


def stored_bytes(rows: int, columns: int, bits: int, group_size: int | None, scale_bytes: int) -> int:
    """Return what a symmetric packed weight takes in a checkpoint: codes in whole words, scales and shape.

    scale_bytes: of one scale.
    """
    words = rows * packed_width(columns, bits)
    return words * WORD_BITS // 8 + rows * (columns // group_size if group_size else 1) * scale_bytes + SHAPE_BYTES


class PackedWeight(nn.Module):
    """A layer whose matrix is ``(codes - zero_point) * scale``; its state dict is the compressed-tensors format.

    weight_packed: (rows, ceil(columns * bits / 32)) int32.  weight_scale: (rows, groups) in the model's dtype.
    weight_zero_point: (ceil(rows * bits / 32), groups) int32, only where ``symmetric`` is False.
    weight_shape: (2,) int64.  group_size: columns that share a scale; None is one scale per row.
    Only inputs get gradients: codes, scales and zero points are constants.
    """

    sizes: tuple[str, str]  # the names of the attributes that hold rows and columns
    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor
    _unpacked: Tensor | None = None

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        group_size: int | None,
        symmetric: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        if group_size is not None and columns % group_size:
            raise ValueError(f"group_size {group_size} does not divide {columns} columns")
        for name, size in zip(self.sizes, (rows, columns)):
            setattr(self, name, size)
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        groups = columns // group_size if group_size else 1
        words = torch.zeros(rows, packed_width(columns, bits), dtype=torch.int32, device=device)
        self.register_buffer("weight_packed", words)
        self.register_buffer("weight_scale", torch.ones(rows, groups, dtype=dtype, device=device))
        self.register_buffer("weight_shape", torch.tensor([rows, columns], device=device))
        if not symmetric:
            points = torch.zeros(packed_width(rows, bits), groups, dtype=torch.int32, device=device)
            self.register_buffer("weight_zero_point", points)

    @property
    def rows(self) -> int:
        """Return how many rows the stored matrix has; each has its own scales."""
        return int(getattr(self, self.sizes[0]))

    @property
    def columns(self) -> int:
        """Return how many columns the stored matrix has; groups of them share a scale."""
        return int(getattr(self, self.sizes[1]))

    def fill_(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Take signed codes, scales and zero points.

        codes: (rows, columns) integers.  scale: (rows, groups), kept in its own dtype.  zero_point: (rows, groups)
        integers in the range of the codes; None for a symmetric layer.  Raises ValueError when the shapes do not fit.
        """
        if codes.shape != (self.rows, self.columns):
            raise ValueError(f"codes have shape {tuple(codes.shape)}, not {(self.rows, self.columns)}")
        if (zero_point is None) != self.symmetric:
            raise ValueError(f"symmetric is {self.symmetric}, but zero_point is {'not ' * (not self.symmetric)}given")
        for name, given in (("scale", scale), ("zero_point", zero_point)):
            if given is not None and given.shape != self.weight_scale.shape:
                raise ValueError(f"{name} has shape {tuple(given.shape)}, not {tuple(self.weight_scale.shape)}")
        self.weight_packed = pack_codes(codes, self.bits)
        self.weight_scale = scale.detach().clone()
        if zero_point is not None:
            self.weight_zero_point = pack_codes(zero_point.T, self.bits).T.contiguous()

    def share_(self, other: PackedWeight) -> None:
        """Hold the same tensors as another packed weight, as tied layers do."""
        for name in PARTS:
            if hasattr(other, name):
                setattr(self, name, getattr(other, name))

    def codes(self) -> Tensor:
        """Return the signed codes, (rows, columns) int8."""
        return unpack_codes(self.weight_packed, self.bits, self.columns)

    def zero_point(self) -> Tensor | None:
        """Return the codes that stand for 0, (rows, groups) int8; None where that is code 0 for all."""
        if self.symmetric:
            return None
        return unpack_codes(self.weight_zero_point.T.contiguous(), self.bits, self.rows).T

    def dequantize(self) -> Tensor:
        """Return the matrix that the codes stand for, (rows, columns) in the dtype of the scales.

        The product is taken in that dtype, as compressed-tensors does, so a stock reload has the same bits.
        """
        if self._unpacked is not None:
            return self._unpacked
        return values_of(self.codes(), self.weight_scale, self.zero_point())

    @property
    def weight(self) -> Tensor:
        """The dequantised matrix, made anew at each access; it is no parameter and not in the state dict."""
        return self.dequantize()

    def nonzero(self) -> int:
        """Count the weights that are not zero."""
        zero_point = self.zero_point()
        groups = self.codes().view(self.rows, self.weight_scale.shape[1], -1)
        return int(torch.count_nonzero(groups if zero_point is None else groups != zero_point.unsqueeze(-1)))

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        group = "row" if self.group_size is None else self.group_size
        own = ", ".join(f"{name}={getattr(self, name)}" for name in self.sizes)
        kind = "" if self.symmetric else ", symmetric=False"
        return f"{own}, bias={getattr(self, 'bias', None) is not None}, bits={self.bits}, group_size={group}{kind}"


@contextmanager
def unpacked(parent: nn.Module) -> Iterator[None]:
    """Unpack the packed layers inside a module once, instead of at every call."""
    inside = [module for module in parent.modules() if isinstance(module, PackedWeight)]
    try:
        for module in inside:
            module._unpacked = module.dequantize()
        yield
    finally:
        for module in inside:
            module._unpacked = None


def rows_of_words(words: Tensor, bits: int, rows: Tensor) -> Tensor:
    """Return some codes of columns that are packed downwards, as zero points are.

    words: (ceil(all * bits / 32), groups) int32.  rows: (n,) int64.  Returns (n, groups) signed integers.
    """
    start = rows * bits
    word, shift = start // WORD_BITS, (start % WORD_BITS).unsqueeze(1)
    low = words[word].long() & 0xFFFFFFFF
    high = words[(word + 1).clamp_max(len(words) - 1)].long() & 0xFFFFFFFF
    return (((low | high << WORD_BITS) >> shift) & (2**bits - 1)) - 2 ** (bits - 1)
