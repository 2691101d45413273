"""Quantize a checkpoint with bitsandbytes while it is loaded, which is what its seconds and its peak are of.

It writes the quantized checkpoint and ``run.json``.
"""

from __future__ import annotations

import torch
from run import Run, grid_arguments
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


def main() -> None:
    parser = grid_arguments(__doc__, CONFIGS)
    options = parser.parse_args()
    placed = {} if options.device == "cpu" else {"device_map": {"": options.device}}
    with Run() as run:
        config = BitsAndBytesConfig(**CONFIGS[options.method])
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16, quantization_config=config, **placed
        )
    model.save_pretrained(options.output)
    run.write(options.output, "bitsandbytes")


if __name__ == "__main__":
    main()
