"""Prove that a checkpoint reloads to the same model in a fresh process.

The process has never seen hfcompress, unless the checkpoint's format needs it; then it begins with the import that
the checkpoint's users write.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.checkpoint.files import read_json
from hfcompress.checkpoint.stock_reload import answer_of
from hfcompress.errors import CheckpointError, MissingDependencyError
from hfcompress.formats import METHOD
from hfcompress.progress import busy
from hfcompress.structure.inputs import dummy_inputs
from hfcompress.structure.modes import eval_mode

# The same kernels run on the same bits, so only the order of sums may differ: a few units in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMultipleChoice",
    "AutoModelForImageClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModel",
)


_ABOUT_CODE = (
    "\nIt has Python code of its own, which was not run: read it, and pass trust_remote_code=True if you trust it."
)
_EXTRAS = {"compressed_tensors": "ct", "bitsandbytes": "bnb"}


def require_loader(package: str) -> None:
    """Raise MissingDependencyError when the package that loads a checkpoint, and so verifies it, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            "Verifying a quantized checkpoint means loading it: "
            f"pip install 'hfcompress[{_EXTRAS[package]}]' for that."
        )


@dataclass(frozen=True)
class Verification:
    """What the reload showed.  max_logit_difference: absolute; tolerance: what was allowed, of the largest logit.

    with_hfcompress: whether the process had to import hfcompress first.
    """

    max_logit_difference: float
    max_logit: float
    seconds: float
    loaded_by: str
    tolerance: float
    with_hfcompress: bool = False


@dataclass(frozen=True)
class Probe:
    """Inputs, and what the model in memory answers to them: its logits, or its last hidden state where it has none.

    device: where the model ran, and where its reload runs to be compared: kernels of other devices sum in other ways.
    """

    inputs: dict[str, Tensor]
    logits: Tensor
    loaded_by: str
    tolerance: float
    device: str = "cpu"

    @classmethod
    def of(cls, model: PreTrainedModel, inputs: dict[str, Tensor] | None = None) -> Probe:
        """Run the model once, outside any autocast.  inputs: a row of fixed random ones unless given."""
        inputs = inputs or _random_inputs(model)
        with eval_mode(model), torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            logits = answer_of(model(**{name: value.to(model.device) for name, value in inputs.items()}))
        inputs = {name: value.cpu() for name, value in inputs.items()}
        tolerance = TOLERANCE.get(model.dtype, 1e-5)
        return cls(inputs, logits.clone(), auto_class_of(model), tolerance, _device_of(model))


def _device_of(model: PreTrainedModel) -> str:
    """Return the model's device, ``auto`` for one that is spread over several."""
    return str(model.device) if len(set(getattr(model, "hf_device_map", {}).values())) < 2 else "auto"


def _random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    of_texts = model.main_input_name == "input_ids" and not type(model).__name__.endswith("ForMultipleChoice")
    if not of_texts or model.config.is_encoder_decoder:
        return dummy_inputs(model)
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    # A single row: decoders that classify refuse more without a padding token.
    tokens = torch.randint(0, size, (1, 32), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def auto_class_of(model: PreTrainedModel) -> str:
    """Return the name of the Auto class that loads this model, or the model's own class."""
    for name in AUTO_CLASSES:
        mapping: Any = getattr(transformers, name)._model_mapping
        if type(model.config) in mapping and mapping[type(model.config)] is type(model):
            return name
    return type(model).__name__


def verify_checkpoint(folder: str | Path, probe: Probe, trust_remote_code: bool = False) -> Verification:
    """Reload a checkpoint in a fresh process, with stock Transformers where its format allows, and compare logits.

    trust_remote_code: whether Python code that lies in the folder may run; never without it.
    Raises CheckpointError when it does not load, or when a logit differs by more than the tolerance of its dtype
    times the largest logit.
    """
    config = read_json(Path(folder) / "config.json")
    plugin = needs_hfcompress(config)
    with tempfile.TemporaryDirectory() as scratch:
        probe_file = Path(scratch) / "probe.safetensors"
        tensors = {f"input.{name}": value.contiguous() for name, value in probe.inputs.items()}
        save_file({**tensors, "logits": probe.logits.contiguous()}, probe_file)
        # Run as text and in an empty folder: a script's own folder would come first on the import path.
        script = Path(__file__).with_name("stock_reload.py").read_text(encoding="utf-8")
        command = [sys.executable, "-c", script, str(Path(folder).absolute()), probe.loaded_by, str(probe_file)]
        command += [probe.device, METHOD if plugin else "", "trust" if trust_remote_code else ""]
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", **(_import_path() if plugin else {})}
        with busy("verifying in a fresh process"):
            run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
    if run.returncode != 0:
        tail = "\n".join(run.stderr.strip().splitlines()[-3:])
        hint = "" if trust_remote_code or not config.get("auto_map") else _ABOUT_CODE
        raise CheckpointError(f"{folder} does not load with {probe.loaded_by}.from_pretrained:\n{tail}{hint}")
    found = json.loads(run.stdout.strip().splitlines()[-1])
    if found["hfcompress_imported"] and not plugin:
        raise CheckpointError(
            "The verifying process imported hfcompress, so it proves nothing about stock Transformers."
        )
    if not found["max_logit_difference"] <= probe.tolerance * found["max_logit"]:
        raise CheckpointError(
            f"{folder} reloads to a different model: logits differ by {found['max_logit_difference']:.2e} "
            f"(largest logit {found['max_logit']:.2e}, allowed share {probe.tolerance:g})."
        )
    return Verification(
        found["max_logit_difference"], found["max_logit"], found["seconds"], probe.loaded_by, probe.tolerance, plugin
    )


def needs_hfcompress(config: Mapping[str, Any]) -> bool:
    """Tell from a checkpoint's ``config.json`` whether its users must import hfcompress."""
    return (config.get("quantization_config") or {}).get("quant_method") == METHOD


def _import_path() -> dict[str, str]:
    """Let the fresh process import the package that runs now, which may be a checkout."""
    here = str(Path(__file__).parents[2])
    return {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
