"""How a teacher's answers are stored: tensors of one safetensors file, whose rows are found by their keys.

A place takes 2 bytes for each of k class numbers and k + 1 logarithms: 4 k + 2.  Class numbers are in rising order, so
their lower 16 bits are enough where it is known how many of the k reach each multiple of 65,536.  Logarithms of
probabilities are never above 0, so their k + 1 sign bits are free to hold these counts, each in as many bits as k has:
with k = 64 there is room for 9.  Counts that find none take a byte each, at most 2 for up to 262,144 classes.
A row takes 24 bytes more, for its key and where it ends, and a file, of up to 256 rows, less than 1,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from hfcompress.checkpoint.atomic import write_tensors
from hfcompress.distillation.losses.targets import TopK
from hfcompress.distillation.teachers.keys import KEY_BYTES
from hfcompress.errors import CheckpointError
from hfcompress.outputs import ABSENT

LARGEST_K = 255
_LOW_BITS = 16
Stored = TopK | Tensor


def write_shard(file: Path, keys: Sequence[bytes], answers: Sequence[Stored], classes: int) -> None:
    """Write the answers of some examples, whole or not at all.

    answers: one per key: a ``TopK``, or logits in float32, (places, classes), of as many classes as the row has.
    """
    lengths = torch.tensor([len(one.classes) if isinstance(one, TopK) else len(one) for one in answers])
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, KEY_BYTES),
        "ends": lengths.cumsum(0),
    }
    if isinstance(answers[0], TopK):
        parts = [_packed(one, classes) for one in answers if isinstance(one, TopK)]
        tensors |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    else:
        tensors["logits"] = joined([one for one in answers if isinstance(one, Tensor)])
    write_tensors(file, tensors)


def joined(logits: Sequence[Tensor], classes: int = 0) -> Tensor:
    """Return the logits of several rows one after another, padded with absent classes to the widest."""
    classes = max(classes, *(one.shape[-1] for one in logits))
    return torch.cat([F.pad(one, (0, classes - one.shape[-1]), value=ABSENT) for one in logits])


def _packed(answer: TopK, classes: int) -> dict[str, Tensor]:
    order = answer.classes.argsort(dim=-1)
    rising = answer.classes.gather(-1, order)
    low = rising & (1 << _LOW_BITS) - 1
    reach = (rising[..., None] >> _LOW_BITS >= torch.arange(1, 1 + (classes - 1 >> _LOW_BITS))).sum(1)
    logarithms = torch.cat([answer.log_probabilities.gather(-1, order), answer.log_tail[:, None]], dim=-1)
    signs, left = _counts_to_bits(reach, logarithms.shape[-1])
    return {
        "low": torch.where(low >= 1 << 15, low - (1 << 16), low).to(torch.int16),
        "reach": left.to(torch.uint8),
        "logarithms": _half_magnitude(logarithms).copysign(0.5 - signs.half()),
    }


def _half_magnitude(logarithms: Tensor) -> Tensor:
    return logarithms.neg().clamp(0, torch.finfo(torch.float16).max).to(torch.float16)


def _counts_to_bits(counts: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Return ``room`` bits a place and the counts that are not in them.  counts: (places, any), from 0 to room - 1."""
    width = (room - 1).bit_length()
    held = min(counts.shape[-1], room // width)
    bits = (counts[:, :held, None] >> torch.arange(width) & 1).flatten(1)
    return F.pad(bits, (0, room - bits.shape[-1])), counts[:, held:]


def _bits_to_counts(bits: Tensor) -> Tensor:
    """Return what ``_counts_to_bits`` wrote, followed by 0 where there was room for more."""
    room = bits.shape[-1]
    width = (room - 1).bit_length()
    held = room // width
    return (bits[:, : held * width].unflatten(-1, (held, width)).long() << torch.arange(width)).sum(-1)


class Shard:
    """One file of answers, of which only what is asked for is read.

    Raises CheckpointError for a damaged file.
    """

    def __init__(self, file: Path) -> None:
        try:
            self.file = safe_open(file, framework="pt")
            self.keys = [row.tobytes() for row in self.file.get_tensor("keys").numpy()]
            self.ends: list[int] = self.file.get_tensor("ends").tolist()
        except Exception as error:  # safetensors raises several kinds
            raise CheckpointError(f"{file} is damaged: {error}. Remove it and run cache-teacher again.") from error

    def read(self, row: int, temperature: float) -> Stored:
        """Return one example's answers in float32."""
        part = slice(self.ends[row - 1] if row else 0, self.ends[row])
        if "logits" in self.file.keys():  # noqa: SIM118 (not a mapping)
            logits: Tensor = self.file.get_slice("logits")[part]
            return logits
        low, left, logarithms = (self.file.get_slice(name)[part] for name in ("low", "reach", "logarithms"))
        reach = torch.cat([_bits_to_counts(logarithms.signbit()), left.long()], dim=-1)
        k = low.shape[-1]
        high = (torch.arange(k) >= k - reach[..., None]).sum(1)
        classes = (low.long() & (1 << _LOW_BITS) - 1) + (high << _LOW_BITS)
        log = -logarithms.float().abs()
        return TopK(classes, log[:, :k], log[:, k], temperature)
