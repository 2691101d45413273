"""Codes of 2, 3, 4 or 8 bits in 32-bit words, laid out as compressed-tensors' ``pack-quantized`` format does.

The stored value is ``code + 2**(bits - 1)``, the lowest bits of a word come first, and codes follow each other along
the input columns without gaps: a 3-bit code may straddle two words. Rows start at a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

PACKABLE_BITS = (2, 3, 4, 8)
WORD_BITS = 32


def code_range(bits: int) -> tuple[int, int]:
    """Return the lowest and the highest signed code of ``bits`` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def packed_width(in_features: int, bits: int) -> int:
    """Return how many 32-bit words hold one row of codes."""
    return -(-in_features * bits // WORD_BITS)


def _check_bits(bits: int) -> None:
    if bits not in PACKABLE_BITS:
        raise ValueError(f"codes of {bits} bits cannot be packed; the widths are {', '.join(map(str, PACKABLE_BITS))}")


def _straddling(bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return word, shift and overhang (bits beyond the word) of each of 32 codes that share ``bits`` words."""
    start = torch.arange(WORD_BITS, device=device) * bits
    shift = start % WORD_BITS
    return start // WORD_BITS, shift, (shift + bits - WORD_BITS).clamp_min(0)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes into words.

    codes: (out, in), integers in ``code_range(bits)``.  Returns (out, ceil(in * bits / 32)) int32.
    Raises ValueError for other widths or for codes out of range.
    """
    _check_bits(bits)
    low, high = code_range(bits)
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise ValueError(f"codes of {bits} bits lie in [{low}, {high}], not [{int(codes.min())}, {int(codes.max())}]")
    if 8 % bits == 0:
        return _pack_bytes(codes, bits)
    return _pack_straddling(codes, bits)


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Fill each byte, lowest bits first; words are little-endian in memory."""
    rows, columns = codes.shape
    low, _ = code_range(bits)
    stored = torch.zeros(rows, packed_width(columns, bits) * WORD_BITS // bits, dtype=torch.uint8, device=codes.device)
    stored[:, :columns] = codes.to(torch.int16) - low
    parts = stored.view(rows, -1, 8 // bits)
    packed = parts[..., 0].clone()
    for index in range(1, 8 // bits):
        packed |= parts[..., index] << (index * bits)
    return packed.view(torch.int32)


def _pack_straddling(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    low, _ = code_range(bits)
    spans = -(-columns // WORD_BITS)
    values = torch.zeros(rows, spans * WORD_BITS, dtype=torch.int64, device=codes.device)
    values[:, :columns] = codes.long() - low
    values = values.view(rows, spans, WORD_BITS)
    words = torch.zeros(rows, spans, bits + 1, dtype=torch.int64, device=codes.device)
    word, shift, overhang = _straddling(bits, codes.device)
    # No two codes set the same bit, so a sum is an "or"; the high half of the 64-bit value goes to the next word.
    shifted = values << shift
    words.index_add_(2, word, shifted & 0xFFFFFFFF)
    if bool(overhang.any()):
        words.index_add_(2, word + 1, shifted >> WORD_BITS)
    packed = words[:, :, :bits].reshape(rows, spans * bits)[:, : packed_width(columns, bits)]
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Return the signed codes of packed words.

    packed: (out, ceil(in * bits / 32)) int32.  Returns (out, in_features) int8. Raises ValueError when the width of
    ``packed`` does not belong to ``in_features``.
    """
    _check_bits(bits)
    if packed.shape[1] != packed_width(in_features, bits):
        raise ValueError(
            f"{in_features} codes of {bits} bits take {packed_width(in_features, bits)} words, not {packed.shape[1]}"
        )
    low, _ = code_range(bits)
    if 8 % bits == 0:
        return _unpack_bytes(packed, bits)[:, :in_features] + low
    return (_unpack_straddling(packed, bits)[:, :in_features] + low).to(torch.int8)


def _unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """Split each byte, lowest bits first (words are little-endian in memory); four times less traffic than words."""
    stored = packed.contiguous().view(torch.uint8)
    if bits == 8:
        # Adding -128 to a byte wraps around, so the cast to int8 may come first.
        return stored.view(torch.int8)
    mask = 2**bits - 1
    parts = [(stored >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).view(torch.int8).flatten(1)


def _unpack_straddling(packed: Tensor, bits: int) -> Tensor:
    rows, width = packed.shape
    spans = -(-width // bits)
    words = torch.zeros(rows, spans * bits, dtype=torch.int64, device=packed.device)
    words[:, :width] = packed.long() & 0xFFFFFFFF
    words = torch.nn.functional.pad(words.view(rows, spans, bits), (0, 1))
    word, shift, _ = _straddling(bits, packed.device)
    pair = words[:, :, word] | (words[:, :, word + 1] << WORD_BITS)
    return ((pair >> shift) & (2**bits - 1)).flatten(1)
