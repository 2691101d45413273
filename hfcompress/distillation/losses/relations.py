"""Attention relations: how a layer's queries, keys and values relate the tokens to each other."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.distillation.losses.base import FORBID
from hfcompress.distillation.losses.features import (
    FeatureLoss,
    Layered,
    at_least_float32,
    is_decoder,
    mean_of_counted,
    stacks_by_layer,
)
from hfcompress.distillation.losses.layer_map import Layers
from hfcompress.distillation.losses.taps import Tap
from hfcompress.errors import ModelError
from hfcompress.structure import AttentionSite, find_attention

Part = Literal["queries", "keys", "values"]


@dataclass(frozen=True, config=FORBID)
class Relations(FeatureLoss):
    """KL of the relations between a layer's queries, keys and values (MiniLMv2, arXiv 2012.15828).

    A relation is the softmax of scaled products of each token's vector with all others'.  Widths and numbers of heads
    may differ.  It is read off the projections, so any attention implementation can run.
    weight, final_weight: at the first step and, on a line from there, at the last.
    layers: ``auto`` spreads the student's layers evenly over the teacher's, ``last`` compares the last ones, or pairs
    of a student's and a teacher's layer.  of: which vectors.
    heads: into how many pieces both models' vectors are cut; None is the most that fit, of eight features or more.
    """

    projected: ClassVar[bool] = False
    found_by_running: ClassVar[bool] = True
    layers: Layers = "last"
    of: Annotated[tuple[Part, ...], Field(min_length=1)] = ("queries", "keys", "values")
    heads: Annotated[int, Field(ge=1)] | None = None

    def find(self, model: PreTrainedModel) -> Layered:
        """Return the projections of every layer's first, and so its own, attention, if it has heads."""
        found: dict[tuple[str, int], tuple[Tap, ...]] = {}
        for site in find_attention(model):
            if site.layer is not None and site.heads:
                found.setdefault(site.layer, self._taps(model, site))
        return stacks_by_layer(model, found)

    def _taps(self, model: PreTrainedModel, site: AttentionSite) -> tuple[Tap, ...]:
        assert site.layer is not None
        parts = {"queries": site.query, "keys": site.key, "values": site.value}
        decoder = is_decoder(model, site.layer[0])
        return tuple(Tap(parts[one].name, parts[one].features.flatten(), decoder) for one in self.of)

    def rows(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], counted: Tensor) -> Tensor:
        """Return the mean of ``relation_kl`` over the kinds of vectors."""
        pairs = list(zip(student, teacher))
        return torch.stack([relation_kl(own, other, self.heads, counted) for own, other in pairs]).mean(0)


def relation_kl(student: Tensor, teacher: Tensor, heads: int | None, counted: Tensor) -> Tensor:
    """Return KL(teacher's relation || student's) as a mean over relation heads and each row's counted tokens.

    student, teacher: (rows, tokens, width), of different widths.  counted: (rows, tokens); no token relates to one
    that does not count.
    """
    heads = heads or fitting_heads(student.shape[-1], teacher.shape[-1])
    own, other = (_log_relation(vectors, heads, counted) for vectors in (student, teacher))
    divergence = (other.exp() * (other - own)).sum(-1).mean(1)
    return mean_of_counted(divergence, counted)


def fitting_heads(student: int, teacher: int, most: int = 64) -> int:
    """Return the largest number of heads of at least eight features each into which both widths can be cut."""
    common = math.gcd(student, teacher)
    limit = max(1, min(most, min(student, teacher) // 8))
    return max(count for count in range(1, limit + 1) if common % count == 0)


def _log_relation(vectors: Tensor, heads: int, counted: Tensor) -> Tensor:
    """Return log-probabilities, (rows, heads, tokens, tokens)."""
    rows, tokens, width = vectors.shape
    if width % heads:
        raise ModelError(f"relations: {heads} heads do not divide vectors of {width} features. Give another number.")
    pieces = at_least_float32(vectors).reshape(rows, tokens, heads, width // heads).transpose(1, 2)
    scores = pieces @ pieces.transpose(-1, -2) / math.sqrt(width // heads)
    # The smallest number instead of minus infinity: a row without counted tokens must not become NaN.
    return scores.masked_fill(~counted[:, None, None, :], torch.finfo(scores.dtype).min).log_softmax(-1)
