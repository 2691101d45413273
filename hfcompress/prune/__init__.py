"""Weight pruning."""

from __future__ import annotations

from hfcompress.prune.callback import PruneCallback
from hfcompress.prune.options import PruneOptions

__all__ = ["PruneCallback", "PruneOptions"]
