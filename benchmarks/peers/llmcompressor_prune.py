"""Prune a checkpoint with llm-compressor; run by the Python of a virtual environment that has it.

    python -m venv llmcompressor-venv
    llmcompressor-venv/bin/pip install llmcompressor==0.14.0.1 --extra-index-url https://download.pytorch.org/whl/cpu

It imports nothing of hfcompress, and writes the pruned checkpoint and ``run.json`` with seconds and peak memory.
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
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from peak import peak_mib
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help="safetensors file with `calibration`, (rows, length)")
    parser.add_argument("--method", choices=MODIFIERS, required=True)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--pattern", help="N:M")
    parser.add_argument("--batch-size", type=int, default=1, help="llm-compressor's own default is 1")
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()

    rows = load_file(options.tokens)["calibration"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    structure = "0:0"
    if options.pattern:
        kept, group = map(int, options.pattern.split(":"))
        structure = f"{group - kept}:{group}"  # llm-compressor's N are the pruned ones
    modifier = MODIFIERS[options.method](
        sparsity=options.sparsity, mask_structure=structure, targets=[r"re:model\.layers\..*_proj$"]
    )
    before = peak_mib()
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=modifier,
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        batch_size=options.batch_size,
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - started
    peak = peak_mib()
    model.save_pretrained(options.output)
    facts = {"seconds": seconds, "loaded_mib": before, "peak_mib": peak}
    facts["version"] = f"llmcompressor {version('llmcompressor')}, torch {torch.__version__}"
    (options.output / "run.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
