"""Record a model's uneven shapes, so that both ``save_pretrained`` and ``save_compressed`` write what loads."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hfcompress.loading.quantizer import HFCompressConfig, HFCompressQuantizer
from hfcompress.packed import packed_linears
from hfcompress.structure.shapes import Shapes, record_shapes


def record_uneven(model: PreTrainedModel) -> Shapes:
    """Write what the config cannot say of a model's shapes into its config, and return it.

    An uneven model with packed layers also gets our quantizer, which has a say in what ``save_pretrained`` writes.
    """
    shapes = record_shapes(model)
    if shapes and packed_linears(model):
        quantizer: Any = HFCompressQuantizer(HFCompressConfig(**model.config.quantization_config))
        model.hf_quantizer = quantizer
    elif isinstance(getattr(model, "hf_quantizer", None), HFCompressQuantizer):
        del model.hf_quantizer
    return shapes
