"""Names examples by their content, whatever batch, order or padding they come in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import DataError
from hfcompress.outputs import IGNORED, Outputs, row_count
from hfcompress.outputs.frames import lengths_of_sounds

KEY_BYTES = 16
# What says where padding is, or is made from the labels, does not belong to the content.
_LEFT_OUT = {"attention_mask", "decoder_attention_mask", "decoder_input_ids"}


def keys_of(inputs: Mapping[str, Any], columns: set[str]) -> list[bytes]:
    """Return a key per row: a digest of its unpadded inputs and of which of its tokens have labels.

    columns: the inputs that the teacher reads.
    """
    mask = inputs.get("attention_mask")
    names = sorted(name for name in columns & inputs.keys() - _LEFT_OUT if isinstance(inputs[name], Tensor))
    decodes = "decoder_input_ids" in columns
    return [_key(inputs, names, mask, row, decodes) for row in range(row_count(inputs))]


def refuse_left_padding(kind: Outputs, inputs: Mapping[str, Any]) -> None:
    """Raise DataError where answers name places of a row and those are not counted from its first token."""
    mask = inputs.get("attention_mask")
    if kind.ragged and isinstance(mask, Tensor) and bool((mask[:, 0] == 0).any()):
        raise DataError(
            f"Rows are padded on the left, but kept answers of {kind.what} are places counted from a row's first "
            "token. Pad on the right: padding_side='right'."
        )


def _key(inputs: Mapping[str, Any], names: list[str], mask: Tensor | None, row: int, decodes: bool) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in names:
        if name != "labels":
            digest.update(name.encode())
            digest.update(_bytes(_unpadded(inputs[name], mask, row)))
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        digest.update(b"labels")
        if decodes or not _aligned(inputs, labels):  # an encoder-decoder's labels are its decoder's inputs
            digest.update(_bytes(labels[row][labels[row] != IGNORED]))
        else:
            digest.update(_bytes(_unpadded(labels, mask, row) != IGNORED))
    return digest.digest()


def _aligned(inputs: Mapping[str, Any], labels: Tensor) -> bool:
    return any(name in inputs and inputs[name].shape == labels.shape for name in ("attention_mask", "input_ids"))


def _unpadded(values: Tensor, mask: Tensor | None, row: int) -> Tensor:
    if mask is None and values.dim() == 2 and values.is_floating_point():  # sounds of models that take no mask
        return values[row, : int(lengths_of_sounds(values[row : row + 1]))]
    padded = mask is not None and values.shape[: mask.dim()] == mask.shape
    return values[row][mask[row].bool()] if padded and mask is not None else values[row]


def _bytes(values: Tensor) -> bytes:
    plain = values.detach().cpu()
    plain = plain.to(torch.float32) if plain.is_floating_point() else plain.to(torch.int64)
    return plain.contiguous().numpy().tobytes()
