"""Quantize a checkpoint with GPTQModel; run by the Python of a virtual environment that has it.

    python -m venv PEERS/gptqmodel
    PEERS/gptqmodel/bin/pip install torch==2.14.1 setuptools wheel ninja
    PEERS/gptqmodel/bin/pip install --no-build-isolation gptqmodel==7.7.0

It imports nothing of hfcompress, and writes the quantized checkpoint and ``run.json`` with seconds and peak memory. On
two cores it starts with GPTQMODEL_CPU_WORKERS=2 only.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from peak import peak_mib
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help="safetensors file with `calibration`, (rows, length)")
    parser.add_argument("--method", choices=["gptq"], required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()

    rows = load_file(options.tokens)["calibration"]
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=True, offload_to_disk=False)
    model = GPTQModel.load(options.model, config, dtype=torch.bfloat16, device="cpu")
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    before = peak_mib()
    started = time.perf_counter()
    model.quantize(data, batch_size=1)
    seconds = time.perf_counter() - started
    peak = peak_mib()
    model.save(str(options.output))
    facts = {"seconds": seconds, "loaded_mib": before, "peak_mib": peak}
    facts["version"] = f"gptqmodel {version('gptqmodel')}, torch {torch.__version__}"
    (options.output / "run.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
