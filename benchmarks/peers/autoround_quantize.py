"""Quantize a checkpoint with auto-round; run by the Python of a virtual environment that has it.

    python -m venv PEERS/auto_round
    PEERS/auto_round/bin/pip install torch==2.13.0 auto-round==0.16.1

It imports nothing of hfcompress, and writes the quantized checkpoint and ``run.json`` with seconds and peak memory.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from run import Run, calibration_rows, grid_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = grid_arguments(__doc__, ["autoround", "rtn"])
    parser.add_argument("--iterations", type=int, default=50)
    options = parser.parse_args()

    rows = calibration_rows(options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with Run() as run:
        rounding = AutoRound(
            model,
            tokenizer,
            bits=options.bits,
            group_size=options.group_size,
            sym=True,
            iters=0 if options.method == "rtn" else options.iterations,
            dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows],
            nsamples=len(rows),
            seqlen=rows.shape[1],
            device_map=options.device,
        )
        rounding.quantize_and_save(str(options.output), format="auto_gptq")
    run.write(options.output, "auto-round")


if __name__ == "__main__":
    main()
