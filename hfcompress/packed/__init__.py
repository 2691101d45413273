"""Integer codes with scales: packing, the packed linear layer, and its checkpoint format."""

from __future__ import annotations

from hfcompress.packed.format import compressed_tensors_config, packed_linears
from hfcompress.packed.linear import PackedLinear
from hfcompress.packed.packing import code_range, pack_codes, unpack_codes

__all__ = ["PackedLinear", "code_range", "compressed_tensors_config", "pack_codes", "packed_linears", "unpack_codes"]
