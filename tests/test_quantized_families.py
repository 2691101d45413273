"""Every family, quantized by every method, is the same model once stock Transformers has reloaded it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.packed import packed_layers
from hfcompress.packed.bytes import byte_layers
from hfcompress.quantization import GPTQ, RTN, Float8, QuantizationReport, SmoothQuant, quantize
from tests.families import FAMILIES, inputs_of

METHODS = {
    "rtn": RTN(bits=4, group_size=16),
    "affine": RTN(bits=4, symmetric=False),
    "gptq": GPTQ(bits=3, group_size=16),
}
# Weights and inputs in 8 bits; the rest is refused, with the reason.
BYTES = {"w8a8": RTN(activations=8), "smoothquant": SmoothQuant(), "fp8": Float8(activations=True)}
FAMILIES_OF_BYTES = ("bert", "llama", "gemma3", "gpt_neox", "vit", "modernbert", "clip")
ROOT = Path(__file__).parents[1]
CASES = [(family, method) for family in FAMILIES for method in METHODS]
CASES += [(family, method) for family in FAMILIES_OF_BYTES for method in BYTES]
CASES += [(family, "float8") for family in ("bert", "llama", "vit")]
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
    """A quantized model, and where it was saved."""

    folder: Path
    model: PreTrainedModel
    report: QuantizationReport
    expected: dict[str, Tensor]

    def found(self, plugins: int) -> dict[str, Any]:
        """Return what the process with so many plugins imported found."""
        facts = json.loads((self.folder / f"found{plugins}.json").read_text())
        assert "error" not in facts, facts["error"]
        return {**facts, **load_file(self.folder / f"found{plugins}.safetensors")}


Cases = dict[tuple[str, str], Case]


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor], output: str, generates: bool) -> dict[str, Tensor]:
    found = {}
    if generates:
        found["tokens"] = model.generate(inputs[model.main_input_name], do_sample=False, max_new_tokens=4)
    with torch.no_grad():
        found["logits"] = model(**inputs)[output].contiguous()
    return found


def quantized_case(family: str, method: str, folder: Path) -> Case:
    spec = FAMILIES[family]
    model, inputs = spec.model(), inputs_of(spec)
    report = quantize(model, {**METHODS, **BYTES, "float8": Float8()}[method], calibration=[inputs])
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "model")
    output = "logits_per_image" if family == "clip" else "logits"
    expected = outputs(model, inputs, output, model.can_generate())
    facts = {"class": type(model).__name__, "output": output, "generates": model.can_generate()}
    (folder / "facts.json").write_text(json.dumps(facts))
    save_file(inputs, folder / "inputs.safetensors")
    return Case(folder, model, report, expected)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    root = tmp_path_factory.mktemp("families")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*calibration tokens are fewer")
        warnings.filterwarnings("ignore", message="Group sizes that do not divide")
        warnings.filterwarnings("ignore", message="No norm of .* feeds linear layers alone")
        made = {case: quantized_case(*case, root / "all" / "-".join(case)) for case in CASES}
    for plugin in ([], ["hfcompress"]):
        command = [sys.executable, "-c", RELOAD, str(root / "all"), *plugin]
        environment = {**os.environ, "PYTHONPATH": str(ROOT) if plugin else ""}
        subprocess.run(command, cwd=tmp_path_factory.mktemp("empty"), env=environment, check=True)
    return made


def same_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "method"), CASES)
def test_stock_reload_gives_the_same_logits(family: str, method: str, cases: Cases) -> None:
    case = cases[family, method]
    found = case.found(plugins=0)
    assert found["loading"] == {}
    assert {row.name for row in case.report.rows} == {*packed_layers(case.model), *byte_layers(case.model)}
    same_logits(found["logits"], case.expected["logits"])
    if found["generates"]:
        assert torch.equal(found["tokens"], case.expected["tokens"])


@pytest.mark.parametrize(("family", "method"), CASES)
def test_loaded_run_and_saved_again_it_is_still_packed(family: str, method: str, cases: Cases) -> None:
    case = cases[family, method]
    same_logits(case.found(plugins=1)["logits"], case.expected["logits"])
    first, again = (load_file(case.folder / name / "model.safetensors") for name in ("model", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    configs = [json.loads((case.folder / name / "config.json").read_text()) for name in ("model", "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
