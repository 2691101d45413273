"""Names that checkpoints carry; what writes them and what reads them live in different packages."""

from __future__ import annotations

METHOD = "hfcompress"  # quantization_config's quant_method where a checkpoint needs our loader
VERSION = 1  # of what stands beside it; a reader refuses a later one
