"""What makes a weight worth keeping: each criterion maps a weight to non-negative scores of the same shape."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hfcompress.pruning.criteria.magnitude import magnitude

CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": magnitude}
