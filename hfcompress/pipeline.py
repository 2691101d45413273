"""The main path: a recipe in, a smaller, verified and documented checkpoint out."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from transformers import set_seed

from hfcompress.checkpoint import save_compressed
from hfcompress.checkpoint.atomic import new_folder, write_text
from hfcompress.checks import check_before_work
from hfcompress.clock import begin_attempt
from hfcompress.errors import HFCompressError
from hfcompress.evaluate import describe_machine
from hfcompress.fresh import FreshProcesses
from hfcompress.gathering import benchmark_entry, gather_facts
from hfcompress.job import Job, Source
from hfcompress.progress import say
from hfcompress.publish import write_model_card
from hfcompress.recipe import Recipe, Stage
from hfcompress.stages import Outcome, run_stage
from hfcompress.workspace import MEASUREMENTS, ORIGINAL, STAGE, Workspace, is_finished, output_folder

EVAL_RESULTS = ".eval_results"  # where the Hub looks for results on registered benchmarks


def compress(recipe: Recipe, *, resume: bool = False, restart: bool = False) -> Path:
    """Run a recipe and return its output folder: checkpoint, model card, measurements and recipe.

    resume goes on with an unfinished run of the same recipe; restart discards an unfinished or finished one.
    Every row of the measurements is taken in a fresh process on the checkpoint as it lies on disk.
    Raises HFCompressError for whatever is wrong with the recipe, model, data or output, before the first stage where
    that can be known.
    """
    if resume and is_finished(recipe):
        return output_folder(recipe)
    with Workspace.open(recipe, resume=resume, restart=restart) as space:
        say("checking the model and the data")
        source = Source(recipe)
        check_before_work(source)
        space.begin()
        job = Job(source, space.stage_folder(0, ORIGINAL), space.work_folder(ORIGINAL))
        stages: list[Stage | None] = [None, *recipe.stages]
        with FreshProcesses("hfcompress.measuring") as fresh:
            for position, stage in enumerate(stages):
                name = stage.name if stage else ORIGINAL
                folder = space.stage_folder(position, name)
                if space.facts_of(position, name) is None:
                    _run_and_save(space, position, stage, job, is_last=position == len(stages) - 1)
                with_metrics = stage is not None or not source.head_is_new
                _measure_once(fresh, space, position, folder, with_metrics)
                job = job.after(name, folder, _work_of_next(space, recipe, position))
        return _publish(space, job.folder)


def _work_of_next(space: Workspace, recipe: Recipe, position: int) -> Path:
    following = recipe.stages[position : position + 1]
    return space.work_folder(following[0].name if following else ORIGINAL)


def _run_and_save(space: Workspace, position: int, stage: Stage | None, job: Job, is_last: bool) -> None:
    """Run a stage and leave its checkpoint, with the facts of the stage in the same atomic step."""
    name = stage.name if stage else ORIGINAL
    started = time.monotonic() - begin_attempt(space.work_folder(name))
    say(f"stage {position} of {len(space.recipe.stages)}, {name}")
    # Anew for each stage, so that it ends alike in a resumed run, and for the original, whose head may be new.
    set_seed(space.recipe.seed)
    outcome = run_stage(stage, job) if stage else Outcome(job.source.open_original(), "as it was opened")
    facts = {
        "fingerprint": space.fingerprint(position),
        "summary": outcome.summary,
        "seconds": round(time.monotonic() - started, 1),
        "machine": describe_machine(),
        "report": outcome.report,
    }
    files = {STAGE: json.dumps(facts, indent=2) + "\n"}
    if outcome.report_file is not None:
        files[outcome.report_file] = json.dumps(outcome.report, indent=2) + "\n"
    save_compressed(
        outcome.model,
        space.stage_folder(position, name),
        outcome.processor or job.processor,
        verify=is_last,
        inputs=job.example(outcome.model) if is_last and outcome.processor is None else None,
        extra_files=files,
    )
    shutil.rmtree(space.work_folder(name), ignore_errors=True)


def _measure_once(fresh: FreshProcesses, space: Workspace, position: int, folder: Path, with_metrics: bool) -> None:
    """Measure a stage's checkpoint in a fresh process, unless that has been done."""
    file = space.measurement_file(position, folder.name.partition("-")[2])
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    recipe_file = space.folder / "recipe.yaml"
    write_text(recipe_file, space.recipe.to_yaml())
    words = ["eval", str(folder), "--recipe", str(recipe_file), "--output", str(file), "--quiet"]
    if fresh.run([*words, *([] if with_metrics else ["--without-metrics"])]) != 0:
        raise HFCompressError(f"Measuring {folder} in a fresh process failed; its message stands above.")


def _publish(space: Workspace, folder: Path) -> Path:
    """Put the last checkpoint, its measurements and its card into the output folder, in one step."""
    output = output_folder(space.recipe)
    with new_folder(output) as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STAGE))
        facts = gather_facts(space, folder)
        (scratch / MEASUREMENTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (scratch / "recipe.yaml").write_text(space.recipe.to_yaml(), encoding="utf-8")
        benchmark = benchmark_entry(space.recipe, facts)
        if benchmark is not None:
            (scratch / EVAL_RESULTS).mkdir()
            (scratch / EVAL_RESULTS / "hfcompress.yaml").write_text(benchmark, encoding="utf-8")
        write_model_card(scratch)
    space.clear()
    return output
