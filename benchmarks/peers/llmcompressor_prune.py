"""Prune a checkpoint with llm-compressor; run by the Python of a virtual environment that has it.

    python -m venv llmcompressor-venv
    llmcompressor-venv/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

It imports nothing of hfcompress, and writes the pruned checkpoint and ``run.json`` with seconds and peak memory.
"""

from __future__ import annotations

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from llmcompressor_data import dataset_of
from run import Run, arguments, calibration_rows
from transformers import AutoModelForCausalLM

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main() -> None:
    parser = arguments(__doc__, MODIFIERS)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--pattern", help="N:M")
    parser.add_argument("--batch-size", type=int, default=1, help="llm-compressor's own default is 1")
    options = parser.parse_args()

    rows = calibration_rows(options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    structure = "0:0"
    if options.pattern:
        kept, group = map(int, options.pattern.split(":"))
        structure = f"{group - kept}:{group}"  # llm-compressor's N are the pruned ones
    modifier = MODIFIERS[options.method](
        sparsity=options.sparsity, mask_structure=structure, targets=[r"re:model\.layers\..*_proj$"]
    )
    data = dataset_of(rows)
    with Run() as run:
        oneshot(model=model, recipe=modifier, batch_size=options.batch_size, **data)
    model.save_pretrained(options.output)
    run.write(options.output, "llmcompressor")


if __name__ == "__main__":
    main()
