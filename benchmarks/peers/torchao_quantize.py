"""Quantize a checkpoint's weights to int8 with torchao; run by the Python of a virtual environment that has it.

    python -m venv PEERS/torchao
    PEERS/torchao/bin/pip install torch==2.13.0 torchao==0.18.0 transformers==5.24.0

It imports nothing of hfcompress, and writes codes and scales of each linear layer, and ``run.json`` with seconds and
peak memory. Transformers reads what torchao saves only where torchao is, so the benchmark reads plain tensors.
"""

from __future__ import annotations

import torch
from run import Run, grid_arguments
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM


def main() -> None:
    options = grid_arguments(__doc__, ["int8"]).parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(options.device)
    chosen = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"}
    with Run() as run:
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in chosen)
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for name, module in chosen.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.qdata": module.weight.qdata, f"{name}.scale": module.weight.scale}
    model.config.quantization_config = {"quant_method": "torchao"}
    model.config.save_pretrained(options.output)
    save_file({name: one.contiguous().cpu() for name, one in tensors.items()}, options.output / "model.safetensors")
    run.write(options.output, "torchao")


if __name__ == "__main__":
    main()
