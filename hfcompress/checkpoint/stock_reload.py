"""Reload a checkpoint with Transformers and compare its logits.  Run as a script; imports nothing of ours by itself.

Usage: stock_reload.py CHECKPOINT CLASS PROBE DEVICE [PLUGIN [TRUST]].  PROBE is a safetensors file with the inputs
(``input.*``) and the logits that the model gave in memory.  DEVICE is where it ran, ``auto`` for several.  PLUGIN is
imported first, as the checkpoint's users do; empty for none.  TRUST, if not empty, runs the checkpoint's own code.
Prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

ANSWERS = (("logits",), ("start_logits", "end_logits"), ("last_hidden_state",))


def answer_of(output: Mapping[str, Any]) -> torch.Tensor:
    """Return what a model says, on the CPU: its logits, those of both ends of a span, or its last hidden state."""
    names = next(names for names in ANSWERS if all(name in output for name in names))
    return torch.stack([output[name].cpu() for name in names])


def main(folder: str, class_name: str, probe_file: str, device: str, plugin: str = "", trust: str = "") -> None:
    """Compare and print: the largest difference of a logit, the largest logit, and the seconds that loading took."""
    if plugin:
        importlib.import_module(plugin)
    probe = load_file(probe_file)
    expected = probe["logits"]
    inputs = {name.removeprefix("input."): value for name, value in probe.items() if name.startswith("input.")}
    started = time.perf_counter()
    spread = {"device_map": "auto"} if device == "auto" else {}
    model = getattr(transformers, class_name).from_pretrained(folder, trust_remote_code=bool(trust), **spread).eval()
    if device not in ("cpu", "auto"):
        model = model.to(device)
    seconds = time.perf_counter() - started
    with torch.inference_mode():
        logits = answer_of(model(**{name: value.to(model.device) for name, value in inputs.items()}))
    result = {
        "max_logit_difference": float((logits.double() - expected.double()).abs().max()),
        "max_logit": float(expected.abs().max()),
        "seconds": round(seconds, 2),
        "class": class_name,
        "hfcompress_imported": "hfcompress" in sys.modules,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
