"""Quantize a checkpoint with auto-round; run by the Python of a virtual environment that has it.

    python -m venv PEERS/auto_round
    PEERS/auto_round/bin/pip install auto-round==0.16.1 --extra-index-url https://download.pytorch.org/whl/cpu

It imports nothing of hfcompress, and writes the quantized checkpoint and ``run.json`` with seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from peak import peak_mib
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help="safetensors file with `calibration`, (rows, length)")
    parser.add_argument("--method", choices=["autoround", "rtn"], required=True)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()

    rows = load_file(options.tokens)["calibration"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    before = peak_mib()
    started = time.perf_counter()
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
        device_map="cpu",
    )
    rounding.quantize_and_save(str(options.output), format="auto_gptq")
    seconds = time.perf_counter() - started
    peak = peak_mib()
    facts = {"seconds": seconds, "loaded_mib": before, "peak_mib": peak}
    facts["version"] = f"auto-round {version('auto-round')}, torch {torch.__version__}"
    (options.output / "run.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
