"""Record a model's uneven shapes, so that both ``save_pretrained`` and ``save_compressed`` write what loads."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.formats import METHOD
from hfcompress.loading.quantizer import HFCompressConfig, HFCompressQuantizer
from hfcompress.packed import packed_linears
from hfcompress.structure.shapes import Shapes, record_shapes, resize_


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


def from_config(config: PreTrainedConfig, auto_class: Any) -> PreTrainedModel:
    """Build a model with fresh weights in the uneven shapes of a checkpoint's config, to train it from scratch.

    ``AutoModel.from_config`` itself does not look at ``quantization_config`` and builds dense shapes.  auto_class: an
    Auto class of Transformers, or a model class.  A quantization beside the shapes is not applied.
    """
    model: PreTrainedModel = (
        auto_class.from_config(config) if hasattr(auto_class, "from_config") else auto_class(config)
    )
    recorded = getattr(config, "quantization_config", None)
    values = recorded if isinstance(recorded, dict) or recorded is None else recorded.to_dict()
    if values and values.get("quant_method") == METHOD:
        resize_(model, values["modules"])
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    record_uneven(model)
    return model
