"""A run's scratch folder: finished stages with fingerprints, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfcompress.checkpoint.atomic import MARKER, recover, refuse_foreign, write_text
from hfcompress.checkpoint.files import digest_of
from hfcompress.checkpoint.locks import locked
from hfcompress.data import data_digest
from hfcompress.distillation.teachers import INDEX, is_cache
from hfcompress.errors import OutputError
from hfcompress.opening import model_digest
from hfcompress.recipe import Distill, ModelSpec, Recipe, recipe_differences

RUN, STAGE, LOCK, MEASUREMENTS = "run.json", "stage.json", "lock", "measurements.json"
ORIGINAL = "original"  # the name of the model as it was opened, before the first stage


@dataclass(frozen=True)
class Workspace:
    """``<output>.partial``: run.json, a checkpoint folder per stage, measurements, and the Trainers' checkpoints.

    It holds something worth keeping from its first finished stage on; until then it is gone when its run ends.
    """

    recipe: Recipe
    folder: Path
    resume: bool = False
    restart: bool = False

    @classmethod
    @contextmanager
    def open(cls, recipe: Recipe, *, resume: bool = False, restart: bool = False) -> Iterator[Workspace]:
        """Give the recipe's workspace, for this process alone.

        Raises OutputError, before anything is changed, when the output folder is not ours or holds another finished
        result, when another process works here, when an unfinished run is there and neither resume nor restart was
        asked for, or when its recipe or the version of hfcompress was another.  Call ``begin`` before the first stage.
        """
        output = output_folder(recipe)
        folder = output.with_name(output.name + ".partial")
        refuse_foreign_workspace(folder)
        space = cls(recipe, folder, resume, restart)
        try:
            with locked(folder / LOCK, str(folder)):
                try:
                    recover(output)
                    refuse_foreign(output)
                    if (output / MARKER).is_file() and not restart:
                        raise OutputError(
                            f"{output} holds a finished result. Name another output, or use --restart to replace it."
                        )
                    if space._goes_on():
                        space._refuse_another_run()
                    yield space
                finally:
                    if not space._has_work():
                        space.clear()
        finally:
            with suppress(OSError):
                folder.rmdir()  # only if it is empty

    def begin(self) -> None:
        """Write down what the run begins with, or compare that with what an unfinished run began with.

        Raises OutputError, before anything is changed, when the model, the data or a teacher has changed since.
        """
        if self._goes_on():
            before = self._began_with["inputs"]
            both = sorted({*before, *self.inputs})
            self._refuse_changes(
                [f"the {name} has changed" for name in both if before.get(name) != self.inputs.get(name)]
            )
            return
        self.clear()
        began = {"hfcompress": version("hfcompress"), "recipe": self.recipe.to_dict(), "inputs": self.inputs}
        write_text(self.folder / RUN, json.dumps(began, indent=2) + "\n")

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Return a digest of everything that the recipe only names: the model, the data and teachers from outside."""
        known = {"original", *(stage.name for stage in self.recipe.stages)}
        outside = {
            stage.name: [name for name in stage.options.teachers if name not in known]
            for stage in self.recipe.stages
            if isinstance(stage.options, Distill)
        }
        teachers = {
            f"teacher of stage {stage}": " ".join(_teacher_digest(name) for name in names)
            for stage, names in outside.items()
            if names
        }
        return {"model": model_digest(self.recipe.model), "data": data_digest(self.recipe.data), **teachers}

    @property
    def _began_with(self) -> dict[str, Any]:
        began: dict[str, Any] = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        return began

    def _has_work(self) -> bool:
        return (self.folder / RUN).is_file() and bool(self._finished_stages())

    def _finished_stages(self) -> list[Path]:
        return list(self.folder.glob(f"stages/[0-9]*/{STAGE}"))

    def _goes_on(self) -> bool:
        return self._has_work() and not self.restart

    def _refuse_another_run(self) -> None:
        began = self._began_with
        changed = recipe_differences(
            {"version of hfcompress": began["hfcompress"], **began["recipe"]},
            {"version of hfcompress": version("hfcompress"), **self.recipe.to_dict()},
        )
        self._refuse_changes(changed)
        if not self.resume:
            raise OutputError(
                f"{self.folder} holds an unfinished run of this recipe. Use --resume to go on, or --restart."
            )

    def _refuse_changes(self, changed: list[str]) -> None:
        if changed:
            listed = "\n".join(f"  {line}" for line in changed)
            raise OutputError(
                f"{self.folder} holds an unfinished run that began otherwise. What changed:\n{listed}\n"
                "Undo the change to go on with it, name another output, or use --restart to begin anew."
            )

    def stage_folder(self, position: int, name: str) -> Path:
        """Return where the checkpoint of a stage is; position 0 is the original model."""
        return self.folder / "stages" / f"{position:02d}-{name}"

    def work_folder(self, name: str) -> Path:
        """Return where a stage's Trainer keeps its checkpoints."""
        return self.folder / "training" / name

    def measurement_file(self, position: int, name: str) -> Path:
        """Return where the measurement of a stage is, one file for each thing that may have been measured."""
        return self.folder / "measurements" / f"{name}-{self.fingerprint(position)}.json"

    def fingerprint(self, position: int) -> str:
        """Return a digest of everything that decides the weights after this stage."""
        recipe = self.recipe.to_dict()
        decides = {part: recipe[part] for part in ("task", "model", "data", "seed")}
        decides["stages"] = recipe["stages"][:position]
        text = json.dumps([decides, self.inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def facts_of(self, position: int, name: str) -> dict[str, Any] | None:
        """Return what a finished stage recorded, None if it has not finished (or was made by something else)."""
        file = self.stage_folder(position, name) / STAGE
        if not file.is_file():
            return None
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return facts if facts["fingerprint"] == self.fingerprint(position) else None

    def clear(self) -> None:
        """Remove what the workspace holds, in an order that a kill may interrupt anywhere.

        Marks of finished stages go first, so that no half of one is taken up; run.json, which says whose it is, last.
        """
        for mark in self._finished_stages():
            mark.unlink()
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (RUN, LOCK):
                path.unlink()
        (self.folder / RUN).unlink(missing_ok=True)


def output_folder(recipe: Recipe) -> Path:
    """Return the folder of a recipe's result."""
    return Path(recipe.output).expanduser()


def is_finished(recipe: Recipe) -> bool:
    """Tell whether the output is this recipe's result, and tidy up if a kill came just after it was published.

    Raises OutputError when the model, the data, a teacher or hfcompress has changed since it was made.
    """
    output = output_folder(recipe)
    written = output / "recipe.yaml"
    if not all(file.is_file() for file in (output / MARKER, written, output / MEASUREMENTS)):
        return False
    if written.read_text(encoding="utf-8") != recipe.to_yaml():
        return False
    space = Workspace(recipe, output.with_name(output.name + ".partial"))
    _refuse_outdated(output, space.inputs)
    if space.folder.is_dir() and _is_workspace(space.folder):
        with suppress(OutputError), locked(space.folder / LOCK, str(space.folder)):  # in use: its holder tidies up
            space.clear()
        with suppress(OSError):
            space.folder.rmdir()
    return True


def _refuse_outdated(output: Path, inputs: Mapping[str, str]) -> None:
    made_from = json.loads((output / MEASUREMENTS).read_text(encoding="utf-8"))
    now = {**inputs, "version of hfcompress": version("hfcompress")}
    then = {**made_from.get("inputs", {}), "version of hfcompress": made_from["hfcompress"]}
    changed = [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
    if changed:
        raise OutputError(
            f"{output} holds a finished result of this recipe, but the {' and the '.join(changed)} changed since. "
            "Use --restart to replace it, or name another output."
        )


def refuse_foreign_workspace(folder: Path) -> None:
    """Raise OutputError when a folder with a workspace's name holds something else."""
    if folder.exists() and not (folder.is_dir() and _is_workspace(folder)):
        raise OutputError(f"{folder} exists and is not an unfinished run of hfcompress. Nothing was changed; move it.")


def _is_workspace(folder: Path) -> bool:
    """Tell a workspace by its run.json; one that was killed before it had that is empty but for ours."""
    names = [path.name for path in folder.iterdir()]
    return RUN in names or all(name == LOCK or name.startswith(f".{RUN}.") for name in names)


def _teacher_digest(name: str) -> str:
    """Return a digest of a model, or of what a folder of a teacher's answers says of itself."""
    if is_cache(name):
        folder = Path(name).expanduser()
        return digest_of(folder, [folder / INDEX])
    return model_digest(ModelSpec(id=name))
