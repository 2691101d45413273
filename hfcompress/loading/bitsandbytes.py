"""Checkpoints of bitsandbytes, loaded by Transformers' own quantizers, that can be saved again, also after calls."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer


class _Savable:
    """Stands before one of Transformers' own quantizers; what it made is saved as it was before its calls."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize

        from hfcompress.packed.bitsandbytes import keep_savable_

        keep_savable_(model)
        if hasattr(model, "_weight_conversions"):
            # They cannot be undone, so Transformers refuses to save; nor need they: the layers name what they save.
            own = (Bnb4bitDeserialize, Bnb8bitDeserialize)
            model._weight_conversions = [
                one for one in model._weight_conversions if not any(isinstance(op, own) for op in _operations(one))
            ]
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]


def _operations(conversion: Any) -> Any:
    return getattr(conversion, "operations", ())


class SavableBnb4BitQuantizer(_Savable, Bnb4BitHfQuantizer):
    """Transformers' quantizer for nf4 and fp4."""


class SavableBnb8BitQuantizer(_Savable, Bnb8BitHfQuantizer):
    """Transformers' quantizer for LLM.int8."""


def register() -> None:
    """Let the tables of Transformers hand out these quantizers for checkpoints and configs of bitsandbytes."""
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = SavableBnb4BitQuantizer
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] = SavableBnb8BitQuantizer
