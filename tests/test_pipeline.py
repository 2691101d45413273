"""The main path: a recipe ends in a checkpoint that loads anywhere, and a killed run ends in the same files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.data import load_splits
from hfcompress.errors import OutputError
from hfcompress.pipeline import compress
from hfcompress.recipe import load_recipe, parse_recipe
from tests.conftest import tiny_bert, tiny_llama
from tests.runs import language_recipe, weights_of, write_reviews, write_text


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    tiny_llama(layers=4).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def finished(sources: Path) -> Path:
    """One uninterrupted run, shared by the tests that look at its result."""
    return compress(language_recipe(sources / "llama", sources / "text.jsonl", sources / "out"))


def test_result_loads_with_three_lines_and_generates(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    prompt = tokenizer("the model", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 3
    assert model.config.num_hidden_layers == 2
    assert model.config.use_cache is True


def test_result_holds_everything_and_no_scratch(finished: Path, sources: Path) -> None:
    names = {file.name for file in finished.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "measurements.json"} <= names
    assert {"recipe.yaml", "hfcompress.json"} <= names
    assert "stage.json" not in names
    assert sorted(path.name for path in sources.iterdir()) == ["llama", "out", "text.jsonl"]
    assert load_recipe(finished / "recipe.yaml").output == str(finished)


def test_measurements_are_of_the_files_on_disk(finished: Path) -> None:
    facts = json.loads((finished / "measurements.json").read_text())
    assert [stage["name"] for stage in facts["stages"]] == ["original", "drop_layers", "distill", "quantize"]
    last = facts["stages"][-1]["measurement"]
    summary = inspect_checkpoint(finished)
    assert last["parameters"] == summary.total.parameters
    assert last["nonzero"] == summary.total.nonzero
    assert last["bytes_on_disk"] == (finished / "model.safetensors").stat().st_size
    assert facts["loads_without_hfcompress"] is True
    assert facts["verification"]["stock"]["max_logit_difference"] == 0.0
    assert all(stage["measurement"]["metrics"]["perplexity"] > 1 for stage in facts["stages"])
    assert len(facts["quantization_report"]) == 2 * 7


def test_pruned_weights_stay_zero_through_quantization(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))  # the stock loader unpacks at the first forward
    weights = [m.weight for name, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros >= 0.5 - 1e-4


def test_a_finished_output_is_not_overwritten_unasked(finished: Path, sources: Path) -> None:
    before = weights_of(finished)
    recipe = language_recipe(sources / "llama", sources / "text.jsonl", finished)
    with pytest.raises(OutputError, match="holds a finished result"):
        compress(recipe)
    with pytest.raises(OutputError, match="holds a finished result"):
        compress(language_recipe(sources / "llama", sources / "text.jsonl", finished, seed=1), resume=True)
    assert compress(recipe, resume=True) == finished
    assert weights_of(finished) == before


RUN = """
import sys
from hfcompress.pipeline import compress
from hfcompress.recipe import load_recipe
compress(load_recipe(sys.argv[1]), resume="resume" in sys.argv)
"""


def start(recipe_file: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUN, str(recipe_file), *words]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen[bytes], reached, patience: float = 120) -> None:
    """SIGKILL the process and its children as soon as a file appears."""
    deadline = time.monotonic() + patience
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("stages/00-original", marks=pytest.mark.slow),
        "training/distill/checkpoint-4",
        pytest.param("training/distill/checkpoint-4/hfcompress_whole", marks=pytest.mark.slow),
        "stages/02-distill",
        pytest.param("stages/03-quantize", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_ends_with_the_same_files(moment: str, finished: Path, sources: Path, tmp_path: Path):
    output = tmp_path / "out"
    recipe = language_recipe(sources / "llama", sources / "text.jsonl", output)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(recipe.to_yaml())
    kill_when(start(recipe_file), (tmp_path / "out.partial" / moment).exists)
    assert not output.exists()
    with pytest.raises(OutputError, match=r"unfinished run of this recipe\. Use --resume"):
        compress(recipe)
    assert start(recipe_file, "resume").wait() == 0
    expected, actual = weights_of(finished), weights_of(output)
    expected.pop("recipe.yaml"), actual.pop("recipe.yaml")  # they name their output folders
    assert actual == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_changes_since_the_kill_are_refused_by_name(sources: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    recipe = language_recipe(sources / "llama", text, tmp_path / "out")
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(recipe.to_yaml())
    kill_when(start(recipe_file), (tmp_path / "out.partial/stages/01-drop_layers").exists)
    stages = json.loads((tmp_path / "out.partial" / "run.json").read_text())
    changed = load_recipe(recipe_file, ["stages.1.distill.steps=9"])
    with pytest.raises(OutputError, match=r"stages\[1\]\.distill\.steps: 8 -> 9"):
        compress(changed, resume=True)
    write_text(text, rows=99)
    with pytest.raises(OutputError, match="the data has changed"):
        compress(recipe, resume=True)
    assert json.loads((tmp_path / "out.partial" / "run.json").read_text()) == stages
    assert (tmp_path / "out.partial/stages/01-drop_layers/model.safetensors").is_file()


def test_classification_from_an_encoder_without_a_head(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_bert().bert.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    write_reviews(tmp_path / "reviews.tsv", rows=400)
    training = {"per_device_train_batch_size": 16, "learning_rate": 5e-3}
    recipe = parse_recipe(
        {
            "name": "tiny",
            "task": "sequence-classification",
            "model": {"id": str(tmp_path / "encoder")},
            "data": {"files": str(tmp_path / "reviews.tsv"), "max_length": 16},
            "output": str(tmp_path / "out"),
            "stages": [
                {"finetune": {"epochs": 3, "training": training}},
                {"distill": {"teacher": "finetune", "epochs": 2, "prune": {"sparsity": 0.8}, "training": training}},
                {"quantize": {"method": "rtn", "bits": 8}},
            ],
        }
    )
    folder = compress(recipe)
    facts = json.loads((folder / "measurements.json").read_text())
    accuracy = [stage["measurement"]["metrics"].get("accuracy") for stage in facts["stages"]]
    assert accuracy[0] is None  # its head was never trained
    assert min(accuracy[1:]) > 0.95
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "0", 1: "1"}
    layers = inspect_checkpoint(folder).layers
    share = 1 - sum(layer.nonzero for layer in layers) / sum(layer.parameters for layer in layers)
    assert share > 0.75


def test_interrupted_from_the_keyboard_says_how_to_go_on(sources: Path, tmp_path: Path) -> None:
    recipe = language_recipe(sources / "llama", sources / "text.jsonl", tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "hfcompress", "run", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    marker = tmp_path / "out.partial/training/distill/checkpoint-2"
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 1
    assert messages.rstrip().endswith("Interrupted. Finished work is kept; the same command with --resume goes on.")
    assert "Traceback" not in messages
    resumed = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, check=True)
    assert [stage["name"] for stage in json.loads(resumed.stdout)["stages"]][-1] == "quantize"
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_kill_just_after_publishing_leaves_nothing_behind(finished: Path, sources: Path) -> None:
    scratch = finished.with_name("out.partial")
    (scratch / "stages").mkdir(parents=True)
    (scratch / "run.json").write_text("{}")
    assert compress(language_recipe(sources / "llama", sources / "text.jsonl", finished), resume=True) == finished
    assert not scratch.exists()


def test_a_new_head_is_the_same_in_every_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Also the first weights of an untrained head come from the recipe's seed."""
    tiny_bert().bert.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    write_reviews(tmp_path / "reviews.tsv")
    for name in ("one", "two"):
        torch.manual_seed(len(name) if name == "one" else 99)
        recipe = parse_recipe(
            {
                "name": "tiny",
                "task": "sequence-classification",
                "model": {"id": str(tmp_path / "encoder")},
                "data": {"files": str(tmp_path / "reviews.tsv"), "max_length": 16},
                "output": str(tmp_path / name),
                "stages": [{"finetune": {"steps": 2}}],
            }
        )
        compress(recipe)
    assert weights_of(tmp_path / "one")["model.safetensors"] == weights_of(tmp_path / "two")["model.safetensors"]


def test_no_held_out_text_is_in_the_training_text() -> None:
    """The demo's documents: no topic stands inside another, and the parts share no topic."""
    recipe = load_recipe("smollm2_python_docs")
    parts = load_splits(recipe.data, recipe.seed, needs_calibration=True)
    titles = [title for part in parts.values() for title in part["title"]]
    assert len(titles) == len(set(titles)) > 50
    texts = [" ".join(text.split()) for part in parts.values() for text in part["text"]]
    assert not [
        text[:60] for one, text in enumerate(texts) for two, whole in enumerate(texts) if one != two and text in whole
    ]
