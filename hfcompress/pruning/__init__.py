"""Weight pruning."""

from __future__ import annotations

from hfcompress.pruning.callback import PruneCallback
from hfcompress.pruning.options import PruneOptions

__all__ = ["PruneCallback", "PruneOptions"]
