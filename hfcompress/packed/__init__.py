"""Integer codes with scales: packing, the packed linear layer, and its checkpoint format."""

from __future__ import annotations

from hfcompress.packed.format import compressed_tensors_config, packed_layers
from hfcompress.packed.linear import PackedConv1D, PackedEmbedding, PackedLinear, has_packed_form, packed_twin
from hfcompress.packed.packing import code_range, pack_codes, unpack_codes
from hfcompress.packed.weight import PackedWeight, unpacked, values_of

__all__ = [
    "PackedConv1D",
    "PackedEmbedding",
    "PackedLinear",
    "PackedWeight",
    "code_range",
    "compressed_tensors_config",
    "has_packed_form",
    "pack_codes",
    "packed_layers",
    "packed_twin",
    "unpack_codes",
    "unpacked",
    "values_of",
]
