"""Round to nearest: every weight goes to the nearest point of its group's grid."""

from __future__ import annotations

import torch
from torch import Tensor

from hfcompress.packed.packing import code_range
from hfcompress.quantization.grids import absmax_scale


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Quantize a weight without data.

    weight: (out, in).  group_size: input columns that share a scale, a divisor of ``in``; None is all.
    Returns codes (out, in) int8 and scale (out, groups) in the weight's dtype. Zeros stay zeros.
    """
    rows, columns = weight.shape
    groups = weight.detach().float().view(rows, -1, group_size or columns)
    scale = absmax_scale(groups, bits, weight.dtype)
    codes = torch.round(groups / scale).clamp_(*code_range(bits)).to(torch.int8)
    return codes.view(rows, columns), scale.squeeze(-1).to(weight.dtype)
