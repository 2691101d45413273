"""Calibration tokens as llm-compressor takes them."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor


def dataset_of(rows: Tensor) -> dict[str, Any]:
    """Return the arguments of ``oneshot`` that have it see all rows, (rows, length), in their order."""
    return {
        "dataset": Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}),
        "num_calibration_samples": len(rows),
        "max_seq_length": rows.shape[1],
        "shuffle_calibration_samples": False,
    }
