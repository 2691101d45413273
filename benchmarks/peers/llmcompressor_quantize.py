"""Quantize a checkpoint with llm-compressor; run by the Python of a virtual environment that has it.

    python -m venv PEERS/llmcompressor
    PEERS/llmcompressor/bin/pip install llmcompressor==0.14.0.1 --extra-index-url https://download.pytorch.org/whl/cpu

It imports nothing of hfcompress, and writes the quantized checkpoint and ``run.json`` with seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from peak import peak_mib
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MODIFIERS = {"gptq": GPTQModifier, "rtn": QuantizationModifier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help="safetensors file with `calibration`, (rows, length)")
    parser.add_argument("--method", choices=MODIFIERS, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()

    rows = load_file(options.tokens)["calibration"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
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
    before = peak_mib()
    started = time.perf_counter()
    if options.method == "rtn":
        oneshot(model=model, recipe=modifier)
    else:
        oneshot(
            model=model,
            dataset=data,
            recipe=modifier,
            num_calibration_samples=len(rows),
            max_seq_length=rows.shape[1],
            shuffle_calibration_samples=False,
        )
    seconds = time.perf_counter() - started
    peak = peak_mib()
    model.save_pretrained(options.output, save_compressed=True)
    facts = {"seconds": seconds, "loaded_mib": before, "peak_mib": peak}
    facts["version"] = f"llmcompressor {version('llmcompressor')}, torch {torch.__version__}"
    (options.output / "run.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
