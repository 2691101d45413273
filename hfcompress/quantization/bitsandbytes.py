"""bitsandbytes: LLM.int8 (arXiv 2208.07339), and the 4-bit floats nf4 and fp4 of QLoRA (arXiv 2305.14314).

A thin wrapper: Transformers' own config and the package's own layers, put into a model in memory, so that stock
``from_pretrained`` reads what ``save_pretrained`` writes.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hfcompress.calibration.hessian import relative_error
from hfcompress.errors import MissingDependencyError, ModelError
from hfcompress.packed.bitsandbytes import bitsandbytes_layers, dequantized
from hfcompress.quantization.checks import check_values, chosen_layers
from hfcompress.quantization.options import FORBID_UNKNOWN, WhileLoading
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.structure.experts import fused_experts
from hfcompress.structure.offload import is_offloaded
from hfcompress.structure.stack import LINEAR_TYPES

BLOCK = 64  # weights that share a scale in 4 bits
OUTPUTS = 32  # the 4-bit kernel for processors with AVX512-BF16 takes multiples of these only
LARGEST_FLOAT16 = 65504.0
ALL_IN_MEMORY = (
    "bitsandbytes takes the whole dense model in memory; load it there, or use RTN, GPTQ or AWQ, which read one layer "
    "at a time."
)


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class BitsAndBytes(WhileLoading):
    """Store weights as bitsandbytes does: 4-bit floats by blocks of 64 weights, or LLM.int8; needs no data.

    bits: 8 is LLM.int8, whose activations are rounded too.  kind: of the 4-bit floats.
    double_quantization: store the scales of 4-bit blocks in 8 bits.
    outlier_threshold: activations of this size or more stay in float16 beside LLM.int8; 0 rounds all of them.
    exclude: name patterns (``fnmatch``) of linear layers that stay as they are.
    """

    needs_calibration: ClassVar[bool] = False
    package: ClassVar[str] = "bitsandbytes"
    group_size: ClassVar[None] = None
    symmetric: ClassVar[bool] = True
    embeddings: ClassVar[bool] = False
    head: ClassVar[bool] = False

    bits: Literal[4, 8] = 4
    kind: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = False
    outlier_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 6.0
    exclude: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What the method does, for people."""
        four = f"{self.kind}, a scale per {BLOCK} weights" + ", in 8 bits" * self.double_quantization
        return "bitsandbytes, " + ("LLM.int8, a scale per row" if self.bits == 8 else four)


def plan_bitsandbytes(model: PreTrainedModel, method: BitsAndBytes) -> tuple[list[PlannedLinear], HfQuantizer]:
    """Return the layers that are replaced, and Transformers' quantizer, whose config names all that are not.

    Layers that Transformers itself would leave dense, and 4-bit layers of sizes that some processors have no kernel
    for, stay dense with a warning.  Raises MissingDependencyError without the package, ModelError when the model is
    quantized already, has layers on disk, has NaN, or has no layer that can be replaced.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError("BitsAndBytes needs the package: pip install 'hfcompress[bnb]' for that.")
    if is_offloaded(model):
        raise ModelError(f"{type(model).__name__} has layers on disk. {ALL_IN_MEMORY}")
    asked = chosen_layers(model, method.exclude)
    _refuse_experts(model, method)
    for name, module in asked.items():
        check_values(name, module)
        _check_range(name, module, method)
    fitting = {name: module for name, module in asked.items() if _fits(module, method)}
    config = _config(model, method, fitting)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    kept = quantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
    chosen = {name: module for name, module in fitting.items() if should_convert_module(name, kept)}
    if not chosen:
        raise ModelError(
            f"No linear layer of {type(model).__name__} can be stored in {method.bits} bits by bitsandbytes: its "
            f"4-bit kernels take multiples of {BLOCK} inputs and {OUTPUTS} outputs. Use bits=8, or RTN or GPTQ."
        )
    _warn_about_dense([name for name in asked if name not in chosen], method)
    group = None if method.bits == 8 else BLOCK
    return [PlannedLinear(name, one, method.bits, group, group) for name, one in chosen.items()], quantizer


def _refuse_experts(model: PreTrainedModel, method: BitsAndBytes) -> None:
    """Raise ModelError for experts that are slices of one tensor, unless they are to stay dense."""
    for name, fused in fused_experts(model).items():
        if not any(fnmatchcase(name, pattern) for pattern in method.exclude):
            raise ModelError(
                f"{name} holds its experts as slices of one tensor ({', '.join(fused)}), which bitsandbytes leaves "
                f"dense. exclude=('*.{name.rpartition('.')[2]}',) says that they may stay so."
            )


def _check_range(name: str, module: nn.Module, method: BitsAndBytes) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
    if method.bits == 8 and largest > LARGEST_FLOAT16:
        raise ModelError(
            f"{name}.weight holds {largest:g}, but LLM.int8 goes through float16, which ends at {LARGEST_FLOAT16:g}; "
            "exclude the layer, or use bits=4."
        )


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Return how many outputs and inputs a layer has."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _fits(module: nn.Module, method: BitsAndBytes) -> bool:
    """Tell whether Transformers replaces such a layer and, in 4 bits, whether any processor can run it."""
    if not isinstance(module, Conv1D) and type(module) is not nn.Linear:
        return False
    outputs, inputs = _sizes(module)
    return method.bits == 8 or (outputs % OUTPUTS == 0 and inputs % BLOCK == 0)


def _config(model: PreTrainedModel, method: BitsAndBytes, chosen: Mapping[str, nn.Module]) -> BitsAndBytesConfig:
    """Return Transformers' config, with the names of all linear layers that are not ``chosen``.

    The names lack the base model's prefix, because the class with a head and the one without read them by their ends.
    """
    prefix = f"{model.base_model_prefix}."
    linears = (name for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES))
    dense = [name.removeprefix(prefix) for name in linears if name not in chosen]
    if method.bits == 8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=method.outlier_threshold, llm_int8_skip_modules=dense
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.kind,
        bnb_4bit_use_double_quant=method.double_quantization,
        bnb_4bit_compute_dtype=model.dtype,  # in another one, a call would cast the biases for good
        llm_int8_skip_modules=dense,
    )


def _warn_about_dense(names: list[str], method: BitsAndBytes) -> None:
    if names:
        warnings.warn(
            f"{len(names)} linear layers, such as {names[0]}, stay dense: Transformers leaves them so"
            + (
                f", or their sizes are no multiples of {BLOCK} inputs and {OUTPUTS} outputs." * (method.bits == 4)
                or "."
            ),
            stacklevel=4,
        )


def replaced(one: PlannedLinear, config: BitsAndBytesConfig) -> tuple[nn.Module, float, float]:
    """Return a layer of bitsandbytes for a dense one, its relative error (of the weight), and the seconds it took."""
    started = time.perf_counter()
    library: Any = importlib.import_module("bitsandbytes")
    outputs, inputs = _sizes(one.module)
    weight = one.weight.contiguous()
    with torch.device("meta"):
        layer: Any
        if one.bits == 8:
            layer = library.nn.Linear8bitLt(
                inputs, outputs, False, has_fp16_weights=False, threshold=config.llm_int8_threshold
            )
        else:
            layer = library.nn.Linear4bit(
                inputs, outputs, False, config.bnb_4bit_compute_dtype, config.bnb_4bit_use_double_quant,
                config.bnb_4bit_quant_type, config.bnb_4bit_quant_storage,
            )  # fmt: skip
    if one.bits == 8:
        layer.weight = library.nn.Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
    else:
        layer.weight = library.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type, quant_storage=config.bnb_4bit_quant_storage, module=layer,
        ).to(weight.device)  # fmt: skip
    layer.bias = one.module.bias
    layer.source_cls = type(one.module)  # Transformers looks here for whether to transpose
    layer.train(one.module.training)
    error = relative_error(one.weight, dequantized(layer).to(one.weight.dtype))
    return layer, error, time.perf_counter() - started


def finish_(model: Any, quantizer: HfQuantizer) -> None:
    """Leave a model as ``from_pretrained`` with this quantizer would."""
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    for layer in bitsandbytes_layers(model).values():
        layer.requires_grad_(False)
