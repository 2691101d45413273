"""Quantize while loading: ``from_pretrained(id, quantization_config=GPTQ(...).as_config(dataset=...))``.

The model is loaded dense, quantized, and returned packed: what its config then says of quantization is the format that
is saved, and nothing of this module is needed to load it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.calibration.running import Batch
from hfcompress.calibration.texts import Calibration, batches_for
from hfcompress.errors import DataError, ModelError
from hfcompress.quantization.apply import quantize
from hfcompress.quantization.plan import plan_linears

QUANT_METHOD = "hfcompress-quantize"


class QuantizeConfig(QuantizationConfigMixin):
    """What ``from_pretrained`` takes as ``quantization_config`` to quantize a dense model by one of our methods.

    method: its options.  dataset: what it is calibrated on: batches, texts, a ``Dataset``, a file or a dataset's id.
    processor: the tokenizer for texts; None is the one in the model's folder.  rows, length: of texts at most so many
    rows, of so many tokens.
    """

    def __init__(
        self,
        method: Any,
        dataset: Calibration | None = None,
        processor: Any = None,
        rows: int = 128,
        length: int = 512,
    ) -> None:
        if method.needs_calibration and dataset is None:
            raise DataError(
                f"{type(method).__name__} needs calibration data: as_config(dataset=...), with texts, batches, a "
                "Dataset, a file or a dataset's id."
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # the library's own are members of an enum
        self.method, self.dataset, self.processor = method, dataset, processor
        self.rows, self.length = rows, length

    def __deepcopy__(self, memo: Any) -> QuantizeConfig:
        """Transformers copies configs while it loads; data and tokenizers need no copies."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for messages and logs; data that are no name are left out."""
        name = self.dataset if isinstance(self.dataset, str) else None
        own = {"method": type(self.method).__name__, **dataclasses.asdict(self.method)}
        return {"quant_method": QUANT_METHOD, **own, "dataset": name, "rows": self.rows, "length": self.length}


class WhileLoadingQuantizer(HfQuantizer):
    """Lets Transformers load a dense model and quantizes it then; what is wrong is said before weights are loaded."""

    quantization_config: QuantizeConfig

    def __init__(self, quantization_config: QuantizeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.batches: list[Batch] = []

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        asked = self.quantization_config
        del model.config.quantization_config  # it is no description of a checkpoint
        plan_linears(model, asked.method, loaded=False)
        if asked.method.needs_calibration:
            with _outside_of_loading():
                method = type(asked.method).__name__
                self.batches = batches_for(
                    model, method, asked.dataset, asked.processor, rows=asked.rows, length=asked.length
                )
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Quantize the loaded model and leave it as ``hfcompress.quantize`` does."""
        devices = set(getattr(model, "hf_device_map", {}).values())
        if len(devices - {"disk"}) > 1:
            raise ModelError(
                f"device_map spreads {type(model).__name__} over {', '.join(sorted(map(str, devices)))}, but it is "
                "quantized on one device. Load it onto one, such as device_map='cpu', and leave on disk what it lacks "
                "room for."
            )
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        quantize(model, self.quantization_config.method, self.batches)
        return model

    def is_serializable(self) -> bool:
        """The model that is returned can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes and scales are constants; everything else can be trained."""
        return True


@contextmanager
def _outside_of_loading() -> Iterator[None]:
    """Undo what Transformers sets while it builds a model: tensors on the meta device, floats of the model's dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(QUANT_METHOD)(QuantizeConfig)
if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantizer(QUANT_METHOD)(WhileLoadingQuantizer)
