"""A run's scratch folder: finished stages with fingerprints, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfcompress.checkpoint.atomic import MARKER, refuse_foreign, write_text
from hfcompress.data import data_digest
from hfcompress.errors import OutputError
from hfcompress.opening import model_digest
from hfcompress.recipe import Recipe, recipe_differences

RUN, STAGE = "run.json", "stage.json"


@dataclass(frozen=True)
class Workspace:
    """``<output>.partial``: run.json, a checkpoint folder per stage, measurements, and the Trainers' checkpoints."""

    recipe: Recipe
    folder: Path
    inputs: dict[str, str]

    @classmethod
    def open(cls, recipe: Recipe, *, resume: bool = False, restart: bool = False) -> Workspace:
        """Make the workspace, or take up an unfinished one.

        Raises OutputError, before anything is changed, when the output folder is not ours or holds another finished
        result, when an unfinished run is there and neither resume nor restart was asked for, or when what it began
        with (recipe, model, data) has changed since.
        """
        output = Path(recipe.output)
        refuse_foreign(output)
        if (output / MARKER).is_file() and not restart:
            raise OutputError(
                f"{output} holds a finished result. Name another output, or use --restart to replace it."
            )
        inputs = {"model": model_digest(recipe.model), "data": data_digest(recipe.data)}
        space = cls(recipe, output.with_name(output.name + ".partial"), inputs)
        if (space.folder / RUN).is_file() and not restart:
            space._go_on(resume)
        else:
            refuse_foreign_workspace(space.folder)
            _remove_workspace(space.folder)
            space.folder.mkdir(parents=True)
            write_text(space.folder / RUN, json.dumps(space._began_with(), indent=2) + "\n")
        return space

    def _began_with(self) -> dict[str, Any]:
        return {"hfcompress": version("hfcompress"), "recipe": self.recipe.to_dict(), "inputs": self.inputs}

    def _go_on(self, resume: bool) -> None:
        began = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        changed = recipe_differences(began["recipe"], self.recipe.to_dict())
        changed += [
            f"the {name} has changed" for name, digest in self.inputs.items() if began["inputs"][name] != digest
        ]
        if changed:
            listed = "\n".join(f"  {line}" for line in changed)
            raise OutputError(
                f"{self.folder} holds an unfinished run of another recipe. What changed:\n{listed}\n"
                "Undo the change to go on with it, name another output, or use --restart to begin anew."
            )
        if not resume:
            raise OutputError(
                f"{self.folder} holds an unfinished run of this recipe. Use --resume to go on, or --restart."
            )
        for leftover in (self.folder / "stages").glob(".*"):
            shutil.rmtree(leftover)

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

    def remove(self) -> None:
        """Remove the workspace once its result stands in the output folder."""
        _remove_workspace(self.folder)


def is_finished(recipe: Recipe) -> bool:
    """Tell whether the output is this recipe's result, and tidy up if a kill came just after it was published."""
    output = Path(recipe.output)
    written = output / "recipe.yaml"
    if not (output / MARKER).is_file() or not written.is_file():
        return False
    if written.read_text(encoding="utf-8") != recipe.to_yaml():
        return False
    scratch = output.with_name(output.name + ".partial")
    if (scratch / RUN).is_file():
        _remove_workspace(scratch)
    return True


def _remove_workspace(folder: Path) -> None:
    """Remove a workspace, run.json last, so that what a kill leaves is still known as ours."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != RUN:
            path.unlink()
    (folder / RUN).unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()


def refuse_foreign_workspace(folder: Path) -> None:
    """Raise OutputError when a folder with a workspace's name holds something else."""
    if folder.exists() and not (folder / RUN).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an unfinished run of hfcompress. Nothing was changed; move it.")
