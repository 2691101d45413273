"""Record a model's uneven shapes, so that both ``save_pretrained`` and ``save_compressed`` write what loads."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.formats import METHOD, VERSION
from hfcompress.loading.quantizer import HFCompressConfig, HFCompressQuantizer
from hfcompress.packed import packed_layers
from hfcompress.packed.bitsandbytes import bitsandbytes_layers
from hfcompress.packed.format import schemes_of, stock_reads_at_first_call
from hfcompress.structure.shapes import Shapes, meta_twin, record_shapes, resize_


def record_uneven(model: PreTrainedModel) -> Shapes:
    """Write what the config cannot say of a model's shapes into its config, and return it.

    A packed model that only our loader reads, because it is uneven or of more schemes than stock Transformers takes in
    such a model, also gets our quantizer, which has a say in what ``save_pretrained`` writes.
    """
    shapes = record_shapes(model)
    if not shapes and needs_our_loader(model):
        inner = model.config.quantization_config
        model.config.quantization_config = {"quant_method": METHOD, "version": VERSION, "quantization": inner}
    if (packed_layers(model) or bitsandbytes_layers(model)) and is_ours(model.config):
        config = HFCompressConfig(**model.config.quantization_config)
        model.config.quantization_config["quantization"] = config.quantization
        quantizer: Any = HFCompressQuantizer(config)
        model.hf_quantizer = quantizer
    elif isinstance(getattr(model, "hf_quantizer", None), HFCompressQuantizer):
        del model.hf_quantizer
    return shapes


def needs_our_loader(model: PreTrainedModel) -> bool:
    """Tell whether a model's packed layers are more than stock Transformers can be told to read.

    It unpacks one scheme while it loads, but several only at the first call of the model; some architectures (T5,
    ModernBERT) read weights before that.
    """
    if len(schemes_of(model)) < 2:
        return False
    return not stock_reads_at_first_call(model) or _initialisation_reads_linear_weights(model)


def _initialisation_reads_linear_weights(model: PreTrainedModel) -> bool:
    twin = meta_twin(model)
    for name in packed_layers(model):
        del twin.get_submodule(name).weight
    try:
        for module in twin.modules():
            twin._init_weights(module)
    except AttributeError:
        return True
    return False


def is_ours(config: PreTrainedConfig) -> bool:
    """Tell whether a model's config asks for our loader."""
    return _recorded(config).get("quant_method") == METHOD


def says_shapes_alone(config: PreTrainedConfig) -> bool:
    """Tell whether a model's config asks for our loader because of uneven shapes, and names no quantization."""
    return is_ours(config) and not _recorded(config).get("quantization")


def _recorded(config: PreTrainedConfig) -> dict[str, Any]:
    recorded = getattr(config, "quantization_config", None)
    return (recorded if isinstance(recorded, dict) or recorded is None else recorded.to_dict()) or {}


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
        resize_(model, values.get("modules") or {})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    record_uneven(model)
    return model
