"""A run killed at any moment goes on without doing anything twice, and ends in the same files."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hfcompress.errors import OutputError
from hfcompress.pipeline import compress
from hfcompress.recipe import Recipe, load_recipe
from tests.forks import Forks, Spy
from tests.runs import language_recipe, model_files, write_text

TRAINING = "out.partial/training/distill"


@dataclass(frozen=True)
class Moment:
    """at: the note of the spy at which the run is killed.  finished: how many of original, drop_layers, distill and
    quantize have their checkpoints by then.  steps: the training steps that are left to the resumed run."""

    at: str
    finished: int
    steps: Iterable[int]


NONE, ALL = range(0), range(8)
MOMENTS = {
    "saving the original": Moment("rename out.partial/stages/00-original", 0, ALL),
    "measuring the original": Moment("rename out.partial/measurements/original-*", 1, ALL),
    "training before a checkpoint": Moment("step 1", 2, ALL),
    "writing a training checkpoint": Moment(f"write {TRAINING}/checkpoint-4/trainer_state.json", 2, range(2, 8)),
    "training after a checkpoint": Moment("step 5", 2, range(4, 8)),
    "saving the trained model": Moment("rename out.partial/stages/02-distill", 2, range(6, 8)),
    "measuring the trained model": Moment("rename out.partial/measurements/distill-*", 3, NONE),
    "saving the last stage": Moment("write out.partial/stages/.03-quantize.*/hfcompress.json", 3, NONE),
    "measuring the last stage": Moment("rename out.partial/measurements/quantize-*", 4, NONE),
    "publishing": Moment("rename out", 4, NONE),
}


@dataclass(frozen=True)
class Runs:
    """Runs of one recipe file in processes of their own, each under a spy."""

    forks: Forks
    folder: Path
    recipe: Recipe

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.file.write_text(self.recipe.to_yaml())

    @property
    def file(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def notes(self) -> Path:
        return self.folder.with_name("notes")

    def killed(self, at: str, *words: str) -> None:
        """Run until a moment, and prove that it was reached."""
        spy = Spy(self.folder, self.notes, at)
        run = self.forks.hfcompress("run", self.file, *words, spy=spy)
        assert run.returncode == -signal.SIGKILL, f"never came to {at!r}:\n{run.stderr}\n{self.notes.read_text()}"

    def ended(self, *words: str) -> None:
        """Run to the end."""
        run = self.forks.hfcompress("run", self.file, *words, spy=Spy(self.folder, self.notes))
        assert run.returncode == 0, run.stderr

    def steps(self) -> list[int]:
        """Return the training steps that the last run took."""
        return [int(note.removeprefix("step ")) for note in self.notes.read_text().splitlines() if "step " in note]

    def stage_files(self) -> dict[str, tuple[int, int]]:
        """Return inode and time of change of every file of the finished stages; files left alone keep both."""
        folder = self.folder / "out.partial" / "stages"
        files = [file for stage in folder.glob("[0-9]*") for file in stage.rglob("*") if file.is_file()]
        found = {str(file.relative_to(folder)): file.stat() for file in files}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.fixture
def runs(forks: Forks, sources: Path, tmp_path: Path) -> Runs:
    folder = tmp_path / "runs"
    return Runs(forks, folder, language_recipe(sources / "llama", sources / "text.jsonl", folder / "out"))


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=[name.replace(" ", "-") for name in MOMENTS])
def test_killed_and_resumed_ends_with_the_same_files(moment: Moment, runs: Runs, finished: Path) -> None:
    output = runs.folder / "out"
    runs.killed(moment.at)
    before = runs.stage_files()
    assert {name.partition("/")[0][:2] for name in before} == {f"{stage:02d}" for stage in range(moment.finished)}
    assert not output.exists()

    # Killed once more just before the result gets its name, while the stages can still be looked at.
    runs.killed("rename out", "--resume")
    after = runs.stage_files()
    assert {name: after.get(name) for name in before} == before
    assert runs.steps() == list(moment.steps)
    assert not output.exists()

    runs.ended("--resume")
    assert runs.steps() == []
    assert model_files(output) == model_files(finished)
    assert sorted(path.name for path in runs.folder.iterdir()) == ["out", "recipe.yaml"]


def test_a_resumed_stage_took_the_time_before_the_kill_too(runs: Runs) -> None:
    runs.killed("step 5")
    clock = runs.folder / TRAINING / "clock.json"
    began = json.loads(clock.read_text())
    last = max(file.stat().st_mtime for file in clock.parent.rglob("*") if file.is_file())
    clock.write_text(json.dumps({**began, "began": began["began"] - 1000}))
    os.utime(clock, (last, last))
    runs.ended("--resume")
    stages = json.loads((runs.folder / "out" / "measurements.json").read_text())["stages"]
    spent = {stage["name"]: stage["seconds"] for stage in stages}
    assert 1000 < spent["distill"] < 1300
    assert max(spent["drop_layers"], spent["quantize"]) < 300
    assert all(stage["machine"]["threads"] for stage in stages)


def test_quantization_goes_on_after_its_finished_layers(runs: Runs, finished: Path) -> None:
    layer = "rename out.partial/training/quantize/layers/model.layers.{}.safetensors"
    runs.killed(layer.format(1))
    assert layer.format(0) in runs.notes.read_text()
    runs.ended("--resume")
    assert [note for note in runs.notes.read_text().splitlines() if "/layers/" in note and "rename" in note] == [
        layer.format(1)
    ]
    assert model_files(runs.folder / "out") == model_files(finished)
    report = json.loads((runs.folder / "out" / "quantization_report.json").read_text(encoding="utf-8"))
    card = (runs.folder / "out" / "README.md").read_text(encoding="utf-8")
    for row in report["rows"]:
        shown = rf"\| {re.escape(row['name'])} \| {row['bits']} \|.*\| {row['relative_error']:.4f} \|"
        assert re.search(shown, card), row
    assert len(report["rows"]) == 2 * 7


def test_killed_while_tidying_up_leaves_nothing_behind(runs: Runs, finished: Path) -> None:
    output = runs.folder / "out"
    runs.killed("remove out.partial/stages")
    published = {file.name: file.stat().st_ino for file in output.iterdir()}
    assert (runs.folder / "out.partial").exists()
    runs.ended("--resume")
    assert {file.name: file.stat().st_ino for file in output.iterdir()} == published
    assert model_files(output) == model_files(finished)
    assert sorted(path.name for path in runs.folder.iterdir()) == ["out", "recipe.yaml"]


def test_an_unfinished_run_is_taken_up_only_when_asked(runs: Runs) -> None:
    runs.killed("rename out.partial/measurements/original-*")
    before = runs.stage_files()
    with pytest.raises(OutputError, match=r"unfinished run of this recipe\. Use --resume"):
        compress(runs.recipe)
    assert runs.stage_files() == before


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_restart_ends_like_a_fresh_run(state: str, runs: Runs, sources: Path, finished: Path) -> None:
    """The run before was of another seed, so whatever were taken over from it would be seen in the files."""
    other = language_recipe(sources / "llama", sources / "text.jsonl", runs.folder / "out", seed=1)
    earlier = Runs(runs.forks, runs.folder, other)
    if state == "unfinished":
        earlier.killed("step 5")
    else:
        earlier.ended()
        assert model_files(runs.folder / "out") != model_files(finished)
    runs.file.write_text(runs.recipe.to_yaml())
    runs.ended("--restart")
    assert runs.steps() == list(ALL)
    assert model_files(runs.folder / "out") == model_files(finished)
    assert load_recipe(runs.folder / "out" / "recipe.yaml") == runs.recipe
    facts = json.loads((runs.folder / "out" / "measurements.json").read_text())
    expected = json.loads((finished / "measurements.json").read_text())
    for stage, same in zip(facts["stages"], expected["stages"], strict=True):
        assert stage["measurement"]["metrics"] == same["measurement"]["metrics"]
    assert sorted(path.name for path in runs.folder.iterdir()) == ["out", "recipe.yaml"]


def test_changes_since_the_kill_are_refused_by_name(forks: Forks, sources: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    runs = Runs(forks, tmp_path / "runs", language_recipe(sources / "llama", text, tmp_path / "runs" / "out"))
    runs.killed("rename out.partial/measurements/drop_layers-*")
    before, began = runs.stage_files(), (runs.folder / "out.partial" / "run.json").read_bytes()
    with pytest.raises(OutputError, match=r"stages\[1\]\.distill\.steps: 8 -> 9"):
        compress(load_recipe(runs.file, ["stages.1.distill.steps=9"]), resume=True)
    write_text(text, rows=99)
    with pytest.raises(OutputError, match="the data has changed"):
        compress(runs.recipe, resume=True)
    assert (runs.folder / "out.partial" / "run.json").read_bytes() == began
    assert runs.stage_files() == before


def test_interrupted_from_the_keyboard_says_how_to_go_on(runs: Runs, finished: Path) -> None:
    spy = Spy(runs.folder, runs.notes, "step 5", signal.SIGINT)
    run = runs.forks.hfcompress("run", runs.file, spy=spy)
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("Interrupted. Finished work is kept; the same command with --resume goes on.")
    assert "Traceback" not in run.stderr
    resumed = runs.forks.hfcompress("run", runs.file, "--resume", "--json", spy=Spy(runs.folder, runs.notes))
    assert [stage["name"] for stage in json.loads(resumed.stdout)["stages"]][-1] == "quantize"
    assert runs.steps() == list(range(4, 8))
    assert model_files(runs.folder / "out") == model_files(finished)
