"""One run at a time works in a workspace, goes on only with what it began with, and leaves none without work in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest
import torch
from datasets import DatasetInfo
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from hfcompress import data, pipeline, workspace
from hfcompress.checkpoint import locks
from hfcompress.checkpoint.atomic import MARKER
from hfcompress.checkpoint.locks import locked
from hfcompress.data import data_digest
from hfcompress.errors import CheckpointError, DataError, HFCompressError, ModelError, OutputError
from hfcompress.measuring import evaluate_folder
from hfcompress.opening import model_digest
from hfcompress.pipeline import compress
from hfcompress.recipe import DataSpec, ModelSpec, Recipe
from hfcompress.workspace import LOCK, RUN, STAGE, Workspace
from tests.conftest import tiny_llama
from tests.runs import language_recipe, write_text

ONE_STAGE = [{"drop_layers": {"keep": 1}}]


@pytest.fixture
def recipe(llama_dir: Path, tmp_path: Path) -> Recipe:
    return language_recipe(llama_dir, write_text(tmp_path / "text.jsonl"), tmp_path / "out", stages=ONE_STAGE)


def finish_original(recipe: Recipe) -> Path:
    """Leave an unfinished workspace with one finished stage, as a kill does."""
    with Workspace.open(recipe) as space:
        space.begin()
        folder = space.stage_folder(0, "original")
        folder.mkdir(parents=True)
        (folder / STAGE).write_text(json.dumps({"fingerprint": space.fingerprint(0)}))
    return space.folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"restart": True}], ids=["plain", "resume", "restart"])
@pytest.mark.parametrize("has_work", [False, True])
def test_two_runs_do_not_work_in_one_workspace(how: dict[str, bool], has_work: bool, recipe: Recipe) -> None:
    pytest.importorskip("fcntl")
    folder = finish_original(recipe) if has_work else Path(recipe.output + ".partial")
    with locked(folder / LOCK, "held by the test"):
        before = names(folder)
        with pytest.raises(OutputError, match=f"{folder} is in use by another process"):
            compress(recipe, **how)
        assert names(folder) == before


def test_a_run_without_locks_works(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    folder = finish_original(recipe)
    assert names(folder) == [RUN, "stages"]
    with Workspace.open(recipe, restart=True) as space:
        space.begin()
    assert not folder.exists()


HOLD = """
import sys, time
from hfcompress.recipe import load_recipe
from hfcompress.workspace import Workspace
with Workspace.open(load_recipe(sys.argv[1]), resume=True) as space:
    space.begin()
    print("working", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_does_not_keep_others_out(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder = finish_original(recipe)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-c", HOLD, str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        with pytest.raises(OutputError, match="is in use by another process"):
            Workspace.open(recipe, resume=True).__enter__()
        process.kill()
    with Workspace.open(recipe, resume=True) as space:
        space.begin()
        assert space.facts_of(0, "original") is not None
    assert (folder / RUN).is_file()


def test_work_of_another_version_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finish_original(recipe)
    before = (folder / RUN).read_text()
    monkeypatch.setattr(workspace, "version", lambda name: "9.9")
    with pytest.raises(OutputError, match=r"version of hfcompress: \S+ -> 9\.9"):
        compress(recipe, resume=True)
    assert (folder / RUN).read_text() == before


def test_a_refusal_before_the_first_stage_leaves_no_workspace(recipe: Recipe, tmp_path: Path, llama_dir: Path) -> None:
    weights = llama_dir / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    for _ in range(2):  # the second try is not asked for --resume or --restart
        with pytest.raises(ModelError, match="holds NaN"):
            compress(recipe)
        assert names(tmp_path) == ["llama", "text.jsonl"]


def test_a_kill_before_the_first_finished_stage_asks_for_nothing(recipe: Recipe) -> None:
    folder = Path(recipe.output + ".partial")
    (folder / "stages" / ".00-original.hfcompress-abc").mkdir(parents=True)
    (folder / "stages" / ".00-original.hfcompress-abc" / STAGE).write_text("{}")
    (folder / RUN).write_text('{"hfcompress": "0.0", "recipe": {}, "inputs": {}}')
    (folder / LOCK).touch()
    with Workspace.open(recipe) as space:
        space.begin()
        assert names(folder) == [LOCK, RUN]
        assert json.loads((folder / RUN).read_text())["recipe"] == recipe.to_dict()
    assert not folder.exists()


def finished_output(recipe: Recipe, output: Path, **changed: str) -> Path:
    """Write what tells a finished result; changed: what it was made from, other than it is now."""
    made_from = {**Workspace(recipe, output).inputs, "version of hfcompress": version("hfcompress"), **changed}
    facts = {"hfcompress": made_from.pop("version of hfcompress"), "inputs": made_from}
    output.mkdir(parents=True)
    (output / MARKER).write_text('{"files": ["recipe.yaml", "measurements.json"]}')
    (output / "recipe.yaml").write_text(recipe.to_yaml())
    (output / "measurements.json").write_text(json.dumps(facts))
    return output


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, f".{RUN}.123"]], ids=str)
def test_a_kill_before_anything_was_written_down_asks_for_nothing(left: list[str], recipe: Recipe) -> None:
    folder = Path(recipe.output + ".partial")
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    with Workspace.open(recipe) as space:
        space.begin()
        assert names(folder) == [LOCK, RUN]
    assert not folder.exists()


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, RUN]], ids=str)
def test_what_a_kill_after_publishing_leaves_is_removed(left: list[str], recipe: Recipe, tmp_path: Path) -> None:
    finished_output(recipe, tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).touch()
    assert compress(recipe, resume=True) == tmp_path / "out"
    assert names(tmp_path) == ["llama", "out", "text.jsonl"]


def test_an_output_where_no_folder_can_be(recipe: Recipe, tmp_path: Path) -> None:
    nowhere = tmp_path / "text.jsonl" / "out"
    inside_a_file = language_recipe(Path(recipe.model.id), tmp_path / "text.jsonl", nowhere, stages=ONE_STAGE)
    with pytest.raises(OutputError, match=r"out\.partial cannot be written: .*Not a directory"):
        compress(inside_a_file)


def test_a_refused_restart_keeps_the_unfinished_work(recipe: Recipe, llama_dir: Path) -> None:
    folder = finish_original(recipe)
    (llama_dir / "config.json").write_text("{")
    with pytest.raises(HFCompressError):
        compress(recipe, restart=True)
    assert names(folder) == [RUN, "stages"]
    with Workspace.open(language_recipe(llama_dir, Path("other"), Path(recipe.output)), restart=True):
        pass  # ended before it began
    assert names(folder) == [RUN, "stages"]


def test_a_restart_killed_while_it_clears_leaves_no_half_stage(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_original(recipe)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace.shutil, "rmtree", killed)
    with Workspace.open(recipe, restart=True) as space:
        with pytest.raises(KeyboardInterrupt):
            space.begin()
        assert (space.folder / RUN).is_file(), "what is left must be known as ours"
        assert not list(space.folder.rglob(STAGE))
        assert (space.folder / "stages" / "00-original").is_dir()
        monkeypatch.undo()


def test_a_finished_output_is_refused_before_data_are_opened(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text('{"files": []}')
    monkeypatch.setattr(pipeline, "Source", None)
    with pytest.raises(OutputError, match="holds a finished result"):
        compress(recipe)
    finished = names(tmp_path)
    (tmp_path / "out" / MARKER).unlink()
    finish_original(recipe)
    with pytest.raises(OutputError, match="Use --resume to go on"):
        compress(recipe)
    assert finished == ["llama", "out", "text.jsonl"]


@pytest.mark.parametrize("changed", ["model", "data", "version of hfcompress", None])
def test_a_finished_result_is_taken_only_while_what_it_was_made_from_is_the_same(
    changed: str | None, recipe: Recipe, tmp_path: Path
) -> None:
    output = finished_output(recipe, tmp_path / "out", **({changed: "before"} if changed else {}))
    if changed is None:
        assert compress(recipe, resume=True) == output
        return
    with pytest.raises(OutputError, match=f"the {changed} changed since"):
        compress(recipe, resume=True)


def test_files_that_a_user_added_to_the_output_survive_a_restart(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text('{"files": []}')
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"did not write: thesis\.txt"):
        compress(recipe, restart=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "out.partial").exists()


def test_home_folders_are_expanded(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "text.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = language_recipe(Path("~/llama"), Path("~/text.jsonl"), Path("~/runs/x"), stages=ONE_STAGE)
    absolute = language_recipe(llama_dir, tmp_path / "text.jsonl", tmp_path / "runs/x", stages=ONE_STAGE)
    with Workspace.open(recipe) as space:
        space.begin()
        assert (tmp_path / "runs/x.partial" / RUN).is_file()
        inputs = space.inputs
    with Workspace.open(absolute) as space:
        assert space.inputs == inputs
    finished_output(recipe, tmp_path / "runs/x")
    assert compress(recipe, resume=True) == tmp_path / "runs/x"


def edit(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(f"{(folder / file).read_text()}\n")


def add(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("x")

    return change


def change_weights(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


CHANGES = {
    "weights": change_weights,
    "config": edit("config.json"),
    "generation config": edit("generation_config.json"),
    "tokenizer": edit("tokenizer.json"),
    "tokenizer config": edit("tokenizer_config.json"),
    "chat template": add("chat_template.jinja"),
    "more chat templates": add("additional_chat_templates/tool_use.jinja"),
    "code": add("modeling_mine.py"),
    "vocabulary": add("vocab.txt"),
    "sentencepiece": add("tokenizer.model"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_of_a_local_model_is_noticed(change: Callable[[Path], None], llama_dir: Path) -> None:
    spec = ModelSpec(id=str(llama_dir))
    before = model_digest(spec)
    assert model_digest(spec) == before
    change(llama_dir)
    assert model_digest(spec) != before


def test_what_does_not_decide_is_not_part_of_the_model(llama_dir: Path, tmp_path: Path) -> None:
    spec = ModelSpec(id=str(llama_dir))
    before = model_digest(spec)
    add("README.md")(llama_dir)
    add("runs/config.json")(llama_dir)
    add(".cache.json")(llama_dir)
    assert model_digest(spec) == before
    llama_dir.rename(tmp_path / "moved")
    assert model_digest(ModelSpec(id=str(tmp_path / "moved"))) == before


def test_a_hub_model_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--model"
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        tiny_llama().config.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "refs" / "v1").write_text("b" * 40)
    main, tag = ModelSpec(id="someone/model"), ModelSpec(id="someone/model", revision="v1")
    assert model_digest(main) == model_digest(ModelSpec(id="someone/model", revision="a" * 40))
    assert model_digest(main) != model_digest(tag)
    (repository / "refs" / "main").write_text("b" * 40)
    assert model_digest(main) == model_digest(tag) == "someone/model@" + "b" * 40
    assert model_digest(ModelSpec(id="someone/unknown", revision="v1")) == "someone/unknown@v1"


def test_a_hub_dataset_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was downloaded earlier lies in a folder that is named by the commit."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for age, commit in ((2, "a" * 40), (1, "b" * 40)):
        folder = tmp_path / "someone___texts" / "default" / "0.0.0" / commit
        folder.mkdir(parents=True)
        DatasetInfo(config_name="default").write_to_directory(str(folder))
        os.utime(folder, (1e9 - age, 1e9 - age))
        assert data_digest(DataSpec(id="someone/texts")) == f"someone/texts@{commit}"
    with pytest.raises(DataError, match="Data 'someone/nothing' cannot be opened"):
        data_digest(DataSpec(id="someone/nothing"))


def test_changed_data_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    file = write_text(folder / "text.jsonl", rows=5)
    by_folder, by_file = DataSpec(id=str(folder)), DataSpec(files=str(file))
    before = data_digest(by_folder), data_digest(by_file)
    write_text(file, rows=6)
    after = data_digest(by_folder), data_digest(by_file)
    assert before[0] != after[0]
    assert before[1] != after[1]
    file.unlink()
    with pytest.raises(DataError, match="No such data file"):
        data_digest(by_file)


def test_a_teacher_from_outside_is_part_of_the_inputs(
    llama_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher = tmp_path / "teacher"
    tiny_llama(seed=1).save_pretrained(teacher)
    stages = [
        {"distill": {"teacher": "original", "steps": 1}},
        {"distill": {"teacher": "distill", "steps": 1}},
        {"distill": {"teacher": str(teacher), "steps": 1}},
    ]
    text = write_text(tmp_path / "text.jsonl")
    recipe = language_recipe(llama_dir, text, tmp_path / "out", stages=stages)
    finish_original(recipe)
    with Workspace.open(recipe, resume=True) as space:
        assert sorted(space.inputs) == ["data", "model", "teacher of stage distill-3"]
        space.begin()
    change_weights(teacher)
    with (
        Workspace.open(recipe, resume=True) as space,
        pytest.raises(OutputError, match=r"What changed:\n  the teacher of stage distill-3 has changed\n"),
    ):
        space.begin()


def test_the_published_tokenizer_is_measured(llama_dir: Path, tmp_path: Path, recipe: Recipe) -> None:
    """A checkpoint whose tokenizer differs from the original's is measured with its own, or not at all."""
    whole = evaluate_folder(llama_dir, recipe).metrics["perplexity"]
    original = tmp_path / "original"
    llama_dir.rename(original)
    os.symlink(original, llama_dir)  # where the recipe finds its model
    checkpoint = tmp_path / "checkpoint"
    tiny_llama().save_pretrained(checkpoint)
    with pytest.raises(ModelError, match="has no tokenizer that can be opened"):
        evaluate_folder(checkpoint, recipe)
    for file in original.glob("tokenizer*"):
        (checkpoint / file.name).write_bytes(file.read_bytes())
    assert evaluate_folder(checkpoint, recipe).metrics["perplexity"] == whole
    tokens = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["model"], vocabulary["weight"] = vocabulary["weight"] + 20, vocabulary["model"]
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokens))
    assert evaluate_folder(checkpoint, recipe).metrics["perplexity"] != whole


def test_a_damaged_model_is_refused_before_it_is_hashed(llama_dir: Path) -> None:
    weights = llama_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        model_digest(ModelSpec(id=str(llama_dir)))


def test_files_are_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is read as a whole: models are larger than memory."""
    file = write_text(tmp_path / "text.jsonl")
    spec = DataSpec(files=str(file))
    expected = data_digest(spec)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert data.data_digest(spec) == expected
