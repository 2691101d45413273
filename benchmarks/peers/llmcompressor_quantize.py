"""Quantize a checkpoint with llm-compressor; run by the Python of a virtual environment that has it.

    python -m venv PEERS/llmcompressor
    PEERS/llmcompressor/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

It imports nothing of hfcompress, and writes the quantized checkpoint and ``run.json`` with seconds and peak memory.
"""

from __future__ import annotations

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor_data import dataset_of
from run import Run, calibration_rows, grid_arguments
from transformers import AutoModelForCausalLM

MODIFIERS = {"gptq": GPTQModifier, "rtn": QuantizationModifier}


def main() -> None:
    options = grid_arguments(__doc__, MODIFIERS).parse_args()
    rows = calibration_rows(options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": options.group_size,
    }
    modifier = MODIFIERS[options.method](
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    data = {} if options.method == "rtn" else dataset_of(rows)
    with Run() as run:
        oneshot(model=model, recipe=modifier, **data)
    model.save_pretrained(options.output, save_compressed=True)
    run.write(options.output, "llmcompressor")


if __name__ == "__main__":
    main()
