"""Quantized and shrunk models, written to disk and reloaded by fresh processes, with and without hfcompress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.checkpoint import save_compressed
from hfcompress.checkpoint.verify import Verification
from hfcompress.quantization import QuantizationReport
from tests.runs import model_files

ROOT = Path(__file__).parents[1]
ROUNDING = 2**-20  # of the largest logit


def same_but_for_rounding(verification: Verification) -> bool:
    """Tell whether a fresh process gave the same logits: on some CPUs their last bits depend on where tensors lie."""
    return verification.max_logit_difference <= ROUNDING * verification.max_logit


# Run as text in an empty folder: a fresh process with nothing of ours on its path.
RELOAD = """
import json, sys, warnings
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
root, *plugin = sys.argv[1:]
for name in plugin:
    __import__(name)
for folder in sorted(Path(root).iterdir()):
    facts = json.loads((folder / "facts.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    found = {}
    try:
        model, info = getattr(transformers, facts["class"]).from_pretrained(folder / "model", output_loading_info=True)
        facts["loading"] = {key: sorted(map(str, value)) for key, value in info.items() if value}
        model.eval()
        if facts["generates"]:
            name = model.main_input_name
            found["tokens"] = model.generate(inputs[name], do_sample=False, max_new_tokens=4)
        with torch.no_grad():
            found["logits"] = model(**inputs)[facts["output"]].contiguous()
        if plugin:
            model.save_pretrained(folder / "again")
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    save_file(found, folder / f"found{len(plugin)}.safetensors")
    (folder / f"found{len(plugin)}.json").write_text(json.dumps(facts))
assert plugin or "hfcompress" not in sys.modules
"""


@dataclass(frozen=True)
class Case:
    """A quantized or shrunk model, where it was saved, and its outputs after that."""

    folder: Path
    model: PreTrainedModel
    report: QuantizationReport | None
    expected: dict[str, Tensor]

    @classmethod
    def write(
        cls,
        folder: Path,
        model: PreTrainedModel,
        report: QuantizationReport | None,
        inputs: dict[str, Tensor],
        output: str = "logits",
    ) -> Case:
        """Save a model before and after it is called, and what a fresh process needs to run it.

        output: the field that is compared.
        """
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder / "model")
        facts = {"class": type(model).__name__, "output": output, "generates": model.can_generate()}
        (folder / "facts.json").write_text(json.dumps(facts))
        save_file(inputs, folder / "inputs.safetensors")
        case = cls(folder, model, report, outputs(model, inputs, output))
        model.save_pretrained(folder / "after")
        save_compressed(model, folder / "ours")
        return case

    def reloads_alike(self, plugins: int) -> None:
        """Check what the process with so many plugins imported found."""
        facts = json.loads((self.folder / f"found{plugins}.json").read_text())
        assert "error" not in facts, facts["error"]
        assert facts["loading"] == {}
        found = load_file(self.folder / f"found{plugins}.safetensors")
        assert found.keys() == self.expected.keys()
        same_logits(found["logits"], self.expected["logits"])
        if "tokens" in found:
            assert torch.equal(found["tokens"], self.expected["tokens"])

    def saved_alike(self) -> None:
        """Check that a call, and our own way to save, change no file of the model."""
        first, after, ours = (model_files(self.folder / name) for name in ("model", "after", "ours"))
        assert {"config.json", "model.safetensors"} <= first.keys()
        assert after == first
        assert ours == first

    def saved_again_alike(self) -> None:
        """Check that what was loaded, called and saved with hfcompress has the files that were loaded."""
        first, again = (load_file(self.folder / name / "model.safetensors") for name in ("model", "again"))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
        configs = [json.loads((self.folder / name / "config.json").read_text()) for name in ("model", "again")]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


Cases = dict[tuple[str, str], Case]


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor], output: str = "logits") -> dict[str, Any]:
    """Return a few generated tokens, where the model generates, and then one field of its output."""
    found = {}
    if model.can_generate():
        found["tokens"] = model.generate(inputs[model.main_input_name], do_sample=False, max_new_tokens=4)
    with torch.no_grad():
        found["logits"] = model(**inputs)[output].contiguous()
    return found


def same_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def reload_all(cases: Path, empty: Path, plugins: Sequence[Sequence[str]] = ((), ("hfcompress",))) -> None:
    """Reload every case below a folder in a process of stock Transformers and in one that imports hfcompress.

    empty: an empty folder to run them in.  plugins: what each process imports.
    """
    for plugin in plugins:
        environment = {**os.environ, "PYTHONPATH": str(ROOT) if plugin else ""}
        subprocess.run([sys.executable, "-c", RELOAD, str(cases), *plugin], cwd=empty, env=environment, check=True)
