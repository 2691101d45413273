"""The quantizer that Transformers calls for a checkpoint whose ``quant_method`` is ``hfcompress``.

It resizes the freshly built model, which is still on the meta device, before any weight is loaded.  What needs the
whole of Transformers is imported inside the methods: this module runs while Transformers itself is being imported.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.formats import METHOD, VERSION
from hfcompress.loading import bitsandbytes, repack

TRIPWIRE = "weight"


class HFCompressConfig(QuantizationConfigMixin):
    """What ``config.json`` of an unevenly pruned checkpoint holds under ``quantization_config``.

    modules: the numbers and shapes that differ from the config's own model, by module name (the model's own names, not
    those of the file).  quantization: the quantization of the resized model, as any ``quantization_config``.

    Made by a user, it quantizes an unevenly pruned checkpoint while that is loaded:
    ``from_pretrained(folder, quantization_config=HFCompressConfig(quantization=BitsAndBytesConfig(...)))``.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        version: int = VERSION,
        quantization: Any = None,
        quant_method: str = METHOD,
    ) -> None:
        if version > VERSION:
            raise ValueError(
                f"This checkpoint was written by a newer hfcompress (its format has version {version}, this one reads "
                f"{VERSION}). Install a newer hfcompress, as its README says."
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # the library's own are members of an enum
        self.version = version
        self.modules = modules or {}
        self.quantization = (
            quantization if isinstance(quantization, dict) or not quantization else quantization.to_dict()
        )
        self.quantize_while_loading = False

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a config given to ``from_pretrained`` changes in that of the checkpoint: its quantization."""
        return {"quantization": self.quantization, "quantize_while_loading": True} if self.quantization else {}

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved.  A model that was quantized while it was loaded is saved quantized."""
        saved = {"quant_method": METHOD, "version": self.version, "modules": self.modules}
        return saved | ({"quantization": self.quantization} if self.quantization else {})


class _Uneven:
    """Resizes the model before its weights are loaded; stands before a quantizer class that does the rest."""

    shapes: HFCompressConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hfcompress.structure.shapes import resize_

        resize_(model, self.shapes.modules)
        return super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        done = super().postprocess_model(model, **kwargs)  # type: ignore[misc]
        model.config.quantization_config = self.shapes
        return done

    def remove_quantization_config(self, model: Any) -> None:
        """Forget the quantization of a model that was dequantized; its shapes stay uneven."""
        super().remove_quantization_config(model)  # type: ignore[misc]
        model.config.quantization_config = HFCompressConfig(self.shapes.modules, self.shapes.version)


class HFCompressQuantizer(_Uneven, HfQuantizer):
    """Loads unevenly pruned models, dense or packed; any other quantization is left to its own quantizer."""

    def __new__(cls, quantization_config: HFCompressConfig, **kwargs: Any) -> Any:
        """Return a quantizer of this class, or the inner quantization's own with the resizing put before it."""
        from hfcompress.packed.install import is_packable

        inner = quantization_config.quantization
        if not inner or (is_packable(inner) and not quantization_config.quantize_while_loading):
            return super().__new__(cls)
        return _on_top(quantization_config, inner)

    def __init__(self, quantization_config: HFCompressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.shapes = quantization_config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        super()._process_model_before_weight_loading(model, **kwargs)
        if self.shapes.quantization:
            from hfcompress.packed.install import install_packed_
            from hfcompress.structure.shapes import names_across_heads

            placed = install_packed_(model, self.shapes.quantization, lambda name: names_across_heads(model, name))
            tripwires = {rf"^{re.escape(name)}\.{TRIPWIRE}$" for name in placed}
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *tripwires}
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Leave a model that trains, casts, compiles and saves like any other of its class."""
        model.config.quantization_config = self.shapes
        model.is_quantized = False
        del model.quantization_method
        if not self.shapes.quantization:
            del model.hf_quantizer
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the state dict to save, with an empty ``weight`` beside the codes of each packed layer.

        Stock Transformers passes over a quantization that it does not know and would fill all weights that the
        checkpoint lacks with random numbers, under a mere warning.  A weight of the wrong shape makes it stop.
        """
        from hfcompress.packed.format import packed_layers

        state = model.state_dict()
        for name in packed_layers(model):
            state[f"{name}.{TRIPWIRE}"] = torch.zeros(0, dtype=torch.int32)
        return state, {}

    def is_serializable(self) -> bool:
        """Uneven models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Uneven models can be trained; the codes of packed layers stay as they are."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Uneven models can be trained whole, without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Uneven models can be compiled."""
        return True


def _on_top(config: HFCompressConfig, inner: dict[str, Any]) -> HfQuantizer:
    """Return the inner quantization's own quantizer, which resizes the model before it does anything else."""
    settings = auto.AutoQuantizationConfig.from_dict(dict(inner))
    pre_quantized = not config.quantize_while_loading
    kind = type(auto.AutoHfQuantizer.from_config(settings, pre_quantized=pre_quantized))
    uneven = type(f"Uneven{kind.__name__}", (_Uneven, kind), {"shapes": config})
    return uneven(settings, pre_quantized=pre_quantized)


def register() -> None:
    """Add the loader to Transformers' tables, once."""
    repack.register()
    bitsandbytes.register()
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(HFCompressConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(HFCompressQuantizer)
    # The types of configs whose loading attributes from_pretrained takes from its caller.
    if HFCompressConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        types: Any = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, HFCompressConfig)
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = types
