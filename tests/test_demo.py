"""The demo: its data never overlap, its result is as small as promised, and a smoke run shows what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfcompress.checkpoint import save_compressed
from hfcompress.data import load_splits
from hfcompress.opening import open_model
from hfcompress.publish import load_facts
from hfcompress.publish.tables import stage_cells
from hfcompress.quantization import RTN, quantize
from hfcompress.recipe import load_recipe
from hfcompress.structure import DropLayers, drop_layers
from hfcompress.tasks import TASKS
from tests.conftest import tiny_llama

LARGEST_SHARE = 0.45  # of the bfloat16 original's bytes


def bytes_of_weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_no_held_out_text_is_in_the_training_text() -> None:
    """No topic stands inside another, and the parts share no topic."""
    recipe = load_recipe("smollm2_python_docs")
    parts = load_splits(recipe.data, recipe.seed, needs_calibration=True)
    titles = [title for part in parts.values() for title in part["title"]]
    assert len(titles) == len(set(titles)) > 50
    texts = [" ".join(text.split()) for part in parts.values() for text in part["text"]]
    assert not [
        text[:60] for one, text in enumerate(texts) for two, whole in enumerate(texts) if one != two and text in whole
    ]


def test_the_recipe_keeps_its_promise_of_size_at_smollm2_s_proportions(tmp_path: Path) -> None:
    """The recipe's layers and bits, on a model far smaller with SmolLM2's share of embeddings."""
    options = {stage.kind: stage.options for stage in load_recipe("smollm2_python_docs").stages}
    method = options["quantize"].method
    model = tiny_llama(
        layers=10,
        vocab_size=5461,
        hidden_size=192,
        intermediate_size=512,
        num_attention_heads=3,
        num_key_value_heads=1,
    ).to(torch.bfloat16)
    embeddings = model.get_input_embeddings().weight.numel()
    assert embeddings / model.num_parameters() == pytest.approx(49152 * 576 / 134_515_008, rel=0.01)
    layers = model.num_parameters() - embeddings
    save_compressed(model, tmp_path / "original")
    kept = options["drop_layers"].keep / 30
    drop_layers(model, DropLayers(keep=round(10 * kept)))
    quantize(model, RTN(bits=method.bits, group_size=method.group_size))
    save_compressed(model, tmp_path / "small")
    before, after = bytes_of_weights(tmp_path / "original"), bytes_of_weights(tmp_path / "small")
    assert after < LARGEST_SHARE * before
    per_weight = method.bits / 8 + 2 / method.group_size  # a bfloat16 scale for each group
    assert after == pytest.approx(2 * embeddings + per_weight * kept * layers, rel=0.01)


QuickRun = tuple["subprocess.CompletedProcess[str]", Path]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    """One run of the smoke demo as a user starts it: how it ended, and the folder that it was started in."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "hfcompress", "demo", "--quick"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False), folder


@pytest.mark.slow
class TestQuickDemo:
    OUTPUT = Path("runs") / "smollm2-python-docs-quick"
    STAGES = ("original", "drop_layers", "distill", "quantize")

    def test_leaves_the_result_and_nothing_else(self, quick: QuickRun) -> None:
        run, folder = quick
        assert run.returncode == 0, run.stderr
        names = {file.name for file in (folder / self.OUTPUT).iterdir()}
        model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        assert {*model, "README.md", "measurements.json", "recipe.yaml", "hfcompress.json"} <= names
        assert [path.name for path in (folder / "runs").iterdir()] == [self.OUTPUT.name]
        assert all(f"stage {place} of 3, {name}" in run.stderr for place, name in enumerate(self.STAGES))

    def test_screen_and_card_show_what_was_measured(self, quick: QuickRun) -> None:
        run, folder = quick
        facts = load_facts(folder / self.OUTPUT)
        card = (folder / self.OUTPUT / "README.md").read_text(encoding="utf-8")
        assert tuple(stage.name for stage in facts.stages) == self.STAGES
        for stage in facts.stages:
            assert None not in stage.measurement.metrics.values()
            cells = stage_cells(facts, stage)
            assert any(line.split() == " ".join(cells).split() for line in run.stdout.splitlines()), (
                cells,
                run.stdout,
            )
            assert any(all(cell in line for cell in cells) for line in card.splitlines() if line.startswith("|"))
        words = " ".join(run.stdout.split())
        for moment, found in (("before", facts.before), ("after", facts.after)):
            assert found.continuation is not None
            assert f"{moment}: {' '.join(found.continuation.split())}" in words
        assert card.startswith("---\n")
        assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
        assert f"Model card: {self.OUTPUT / 'README.md'}" in run.stdout

    def test_the_lines_on_screen_load_it(self, quick: QuickRun) -> None:
        run, folder = quick
        lines = [line.strip() for line in run.stdout.partition("Load it with stock Transformers:")[2].splitlines()]
        program = "\n".join(line for line in lines if line and not line.startswith("Model card"))
        check = "\nimport sys; print(model.config.num_hidden_layers, 'hfcompress' in sys.modules)"
        loaded = subprocess.run(
            [sys.executable, "-c", program + check], cwd=folder, capture_output=True, text=True, check=True
        )
        assert loaded.stdout.split() == ["24", "False"]

    def test_weighs_less_than_45_percent_of_the_original(self, quick: QuickRun, tmp_path: Path) -> None:
        _, folder = quick
        original = open_model(load_recipe("smollm2_python_docs").model, TASKS["causal-lm"])
        assert original.dtype == torch.bfloat16
        original.save_pretrained(tmp_path)
        before, after = bytes_of_weights(tmp_path), bytes_of_weights(folder / self.OUTPUT)
        assert after < LARGEST_SHARE * before
        stages = json.loads((folder / self.OUTPUT / "measurements.json").read_text())["stages"]
        assert stages[0]["measurement"]["bytes_on_disk"] == pytest.approx(before, rel=1e-4)
        assert stages[-1]["measurement"]["bytes_on_disk"] == after
