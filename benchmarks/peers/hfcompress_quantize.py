"""Quantize a checkpoint with hfcompress, as the peers' scripts do: a process that imports what quantizing takes.

It writes the quantized checkpoint and ``run.json`` with seconds and peak memory.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from run import Run, calibration_rows, grid_arguments
from transformers import AutoModelForCausalLM

import hfcompress
from hfcompress.quantization import METHODS


def main() -> None:
    parser = grid_arguments(__doc__, METHODS, bits=lambda text: text if text == "auto" else int(text))
    parser.add_argument("--quality", help="preset of GPTQ")
    parser.add_argument("--tuning_steps", type=int, help="of GPTQ, instead of the preset's")
    parser.add_argument("--rounding_steps", type=int, help="of GPTQ with the preset best")
    parser.add_argument("--average_bits", type=float, help="with --bits auto")
    parser.add_argument("--batch-size", type=int, required=True)
    options = parser.parse_args()

    given = {name: getattr(options, name) for name in ("quality", "average_bits", "tuning_steps", "rounding_steps")}
    chosen = {name: value for name, value in given.items() if value is not None}
    method = METHODS[options.method](bits=options.bits, group_size=options.group_size, **chosen)
    rows = calibration_rows(options.tokens).to(options.device)
    batches = [{"input_ids": part} for part in rows.split(options.batch_size)]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(options.device)
    with Run() as run:
        report = hfcompress.quantize(model, method, batches if method.needs_calibration else None)
    model.save_pretrained(options.output)
    run.write(options.output, "hfcompress", tuning=report.tuning and asdict(report.tuning))


if __name__ == "__main__":
    main()
