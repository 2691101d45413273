"""Quantize a checkpoint with GPTQModel; run by the Python of a virtual environment that has it.

    python -m venv PEERS/gptqmodel
    PEERS/gptqmodel/bin/pip install torch==2.14.1 setuptools wheel ninja
    PEERS/gptqmodel/bin/pip install --no-build-isolation gptqmodel==7.7.0

It imports nothing of hfcompress, and writes the quantized checkpoint and ``run.json`` with seconds and peak memory. On
two cores it starts with GPTQMODEL_CPU_WORKERS=2 only.
"""

from __future__ import annotations

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from run import Run, calibration_rows, grid_arguments


def main() -> None:
    options = grid_arguments(__doc__, ["gptq"]).parse_args()
    rows = calibration_rows(options.tokens)
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=True, offload_to_disk=False)
    model = GPTQModel.load(options.model, config, dtype=torch.bfloat16, device=options.device)
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    with Run() as run:
        model.quantize(data, batch_size=1)
    model.save(str(options.output))
    run.write(options.output, "gptqmodel")


if __name__ == "__main__":
    main()
