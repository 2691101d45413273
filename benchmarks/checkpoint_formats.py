"""Read any quantized checkpoint of the benchmarks as dense weights, so that one evaluator measures them all."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfcompress.structure import stack_linears


def open_dense(folder: Path, original: Path, device: str = "cpu") -> PreTrainedModel:
    """Return the model of a checkpoint in bfloat16: by Transformers, or GPTQ's and torchao's formats unpacked here.

    Transformers reads these only with packages that this environment does not have.
    """
    placed = {} if device == "cpu" else {"device_map": {"": device}}
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    method = config.get("quant_method")
    if method not in ("gptq", "auto-round", "torchao"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **placed)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16, **placed)
    tensors = _tensors(folder)
    for name, module in stack_linears(model).items():
        if method == "torchao":
            weight = tensors[f"{name}.qdata"] * tensors[f"{name}.scale"]
        else:
            weight = _gptq_weight({part: tensors[f"{name}.{part}"] for part in GPTQ_PARTS}, config["bits"])
        module.weight.data.copy_(weight)
    return model


GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def _gptq_weight(parts: dict[str, Tensor], bits: int) -> Tensor:
    """Return the weight (out, in) of one layer in GPTQ's format, first version: zero points are stored minus one."""
    codes = _unpack(parts["qweight"].T, bits).T
    zeros = _unpack(parts["qzeros"], bits) + 1
    group = parts["g_idx"].long()
    return ((codes - zeros[group]) * parts["scales"].float()[group]).T


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Return codes of 2, 4 or 8 bits, lowest first.  words: (rows, columns) int32.  Returns (rows, more) int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def stored_bits(folder: Path, original: Path) -> float:
    """Return the bits that a checkpoint spends on each weight of the linear layers inside the stack, scales included.

    Every tensor whose name begins with such a layer's name counts, except its bias.
    """
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    linears = stack_linears(model)
    weights = sum(module.weight.numel() for module in linears.values())
    stored = 0
    for name, (first, last) in _offsets(folder).items():
        parts = name.split(".")
        prefixes = {".".join(parts[:stop]) for stop in range(1, len(parts))}
        if not prefixes.isdisjoint(linears) and parts[-1] != "bias":
            stored += last - first
    return stored * 8 / weights


def _offsets(folder: Path) -> dict[str, tuple[int, int]]:
    """Return where each tensor of a folder lies in its file, in bytes."""
    found: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
        found.update({name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"})
    return found
