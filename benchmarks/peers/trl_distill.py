"""Distil a causal language model with TRL's GKDTrainer; run by the Python of a virtual environment that has it.

    python -m venv PEERS/trl
    PEERS/trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.24.0

Off-policy (lmbda 0), so that it learns from the same texts.  It imports nothing of hfcompress, and writes the student
and ``run.json`` with the seconds of its steps and its peak memory.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from run import peak_mib
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, default_data_collator
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Clock(TrainerCallback):
    """Notes when every step begins."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.begins.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--tokens", required=True, help="safetensors file with `train`, (rows, length)")
    parser.add_argument("--arguments", required=True, help="TrainingArguments as JSON")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()

    rows = load_file(options.tokens)["train"]
    columns = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    clock = Clock()
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.bfloat16),
        # SFTTrainer turns gradient checkpointing on, which would cost it a forward more.
        args=GKDConfig(
            **json.loads(options.arguments),
            lmbda=0.0,
            beta=options.beta,
            gradient_checkpointing=False,
            max_length=None,
        ),
        data_collator=default_data_collator,
        train_dataset=Dataset.from_dict({name: column.tolist() for name, column in columns.items()}),
        processing_class=AutoTokenizer.from_pretrained(options.student),
        callbacks=[clock],
    )
    trainer.train()
    trainer.model.save_pretrained(options.output)
    facts = {
        "seconds": [after - before for before, after in pairwise(clock.begins)],
        "peak_mib": peak_mib(),
        "version": f"trl {version('trl')}, torch {torch.__version__}",
    }
    (options.output / "run.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
