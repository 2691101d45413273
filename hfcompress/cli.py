"""The ``hfcompress`` command: thin, each command one call and one table."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hfcompress.errors import CheckpointError, HFCompressError, OutputError, RecipeError

app = typer.Typer(
    help="Compress Hugging Face models: prune, distil, quantize, measure and document.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
DEMO_RECIPE = "smollm2_python_docs"


def _path(text: str) -> Path:
    """Read a path as shells do, also where one leaves the ``~`` of a quoted or ``--output=~/x`` path alone."""
    return Path(text).expanduser()


Folder = Annotated[Path, typer.Argument(parser=_path, metavar="FOLDER", help="A checkpoint folder.")]
RecipePath = Annotated[str, typer.Argument(help="A recipe file, or the name of a bundled recipe.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Override: stages.1.distill.steps=50; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run of this recipe.")]
Restart = Annotated[bool, typer.Option("--restart", help="Discard an unfinished or finished run and begin anew.")]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


@app.command()
def run(
    recipe: RecipePath,
    changes: Changes = None,
    resume: Resume = False,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: stages, measurements, verified checkpoint, model card."""
    from hfcompress.recipe import load_recipe

    _run(load_recipe(recipe, changes or []), resume, restart, as_json)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run of about a minute.")] = False,
    resume: Resume = False,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Run the bundled recipe on SmolLM2-135M-Instruct and Python's documentation, with no network."""
    from hfcompress.recipe import load_recipe

    changes = QUICK if quick else []
    _run(load_recipe(DEMO_RECIPE, changes), resume, restart or (quick and not resume), as_json)


QUICK = [
    "output=runs/smollm2-python-docs-quick",
    "stages.1.distill.steps=3",
    "stages.1.distill.training.per_device_train_batch_size=1",
    "stages.1.distill.training.save_strategy=no",
    "stages.2.quantize.calibration_rows=4",
    "stages.2.quantize.calibration_length=128",
    "evaluate.max_rows=4",
    "evaluate.new_tokens=8",
]


def _run(recipe: Any, resume: bool, restart: bool, as_json: bool) -> None:
    from hfcompress.devices import keep_freed_memory
    from hfcompress.pipeline import compress
    from hfcompress.publish import load_facts, print_result

    if resume and restart:
        raise HFCompressError("--resume goes on with a run and --restart discards it; use one of them.")
    keep_freed_memory()
    try:
        folder = compress(recipe, resume=resume, restart=restart)
    except KeyboardInterrupt:
        raise HFCompressError("Interrupted. Finished work is kept; the same command with --resume goes on.") from None
    if as_json:
        _print_json(json.loads((folder / "measurements.json").read_text(encoding="utf-8")))
    else:
        print_result(folder, load_facts(folder), Console())


@app.command()
def validate(
    recipe: Annotated[str | None, typer.Argument(help="A recipe file, or the name of a bundled recipe.")] = None,
    changes: Changes = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a recipe, all faults at once, without running it."""
    from hfcompress.recipe import load_recipe, recipe_schema

    if schema:
        _print_json(recipe_schema())
        return
    if recipe is None:
        raise HFCompressError("Name a recipe to check, or use --schema.")
    checked = load_recipe(recipe, changes or [])
    if as_json:
        _print_json(checked.to_dict())
    else:
        print(
            f"{recipe} is valid: {checked.task}, {len(checked.stages)} stages "
            f"({', '.join(stage.name for stage in checked.stages)})."
        )


@app.command(name="eval")
def evaluate(
    folder: Folder,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe with the data and metrics; default: the folder's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(parser=_path, metavar="FILE", help="Also write the measurement to this JSON file.")
    ] = None,
    without_metrics: Annotated[bool, typer.Option(help="Measure size, speed and memory alone.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint: task metrics, size, speed and peak memory."""
    from hfcompress.checkpoint.atomic import write_text
    from hfcompress.devices import keep_freed_memory
    from hfcompress.measuring import evaluate_folder
    from hfcompress.publish import measurement_table
    from hfcompress.recipe import load_recipe

    named = _recipe_for(folder, recipe)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise OutputError(f"--output {output} cannot be written: name a file in a folder that exists.")
    keep_freed_memory()
    measured = evaluate_folder(folder, load_recipe(named), f"measure {folder.name}", not without_metrics)
    if output is not None:
        write_text(output, json.dumps(measured.to_dict(), indent=2, allow_nan=False) + "\n")
    if as_json:
        _print_json(measured.to_dict())
    elif not quiet:
        Console().print(measurement_table(measured))


def _recipe_for(folder: Path, named: str | None) -> str:
    """Return the recipe to measure a checkpoint by: the one named, else the one that made it."""
    if not folder.is_dir():
        raise CheckpointError(f"No such checkpoint folder: {folder}.")
    own = folder / "recipe.yaml"
    if named is None and not own.is_file():
        raise RecipeError(f"{folder} has no recipe.yaml; name a recipe with data and metrics by --recipe.")
    return named or str(own)


_INNER = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_INNER, add_help_option=False)
def prune(context: typer.Context) -> None:
    """Prune a checkpoint in one shot, without training, and verify what is written."""
    _one_shot(context, "wanda")


@app.command(context_settings=_INNER, add_help_option=False)
def quantize(context: typer.Context) -> None:
    """Store a checkpoint's layers in few bits, and verify what is written."""
    _one_shot(context, "gptq")


def _one_shot(context: typer.Context, method: str) -> None:
    """Hand the words over to a command whose options are the methods' own: to make them takes seconds of imports."""
    from hfcompress.commands import one_shot_command

    command = one_shot_command(str(context.info_name), method, context.command.help)
    command(args=context.args, prog_name=context.command_path, standalone_mode=False)


@app.command(name="cache-teacher")
def cache_teacher(
    recipe: RecipePath,
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=_path, metavar="FOLDER", help="Folder for the answers.")
    ],
    teacher: Annotated[str, typer.Option(help="A model id or folder; original is the recipe's model.")] = "original",
    k: Annotated[int | None, typer.Option(help="Classes kept per token; by default 64, or all of up to 256.")] = None,
    temperature: Annotated[float, typer.Option(help="At which probabilities are taken.", min=1e-3)] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward pass.", min=1)] = 8,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Write a teacher's answers to a recipe's training rows, so that distilling needs no teacher; resumable."""
    from hfcompress.devices import keep_freed_memory
    from hfcompress.recipe import load_recipe
    from hfcompress.teaching import cache_recipe_teacher

    checked = load_recipe(recipe, changes or [])
    keep_freed_memory()
    report = cache_recipe_teacher(
        checked, output, teacher=teacher, k=k, temperature=temperature, batch_size=batch_size
    )
    if as_json:
        _print_json(dataclasses.asdict(report))
    else:
        print(
            f"{report.folder} holds the answers to {report.examples:,} rows ({report.found:,} were there before), "
            f"{report.answers:,} places, {report.bytes / 1e6:,.1f} MB. Use it as `teacher:` of a distill stage."
        )


@app.command()
def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds: parameters, zeros, bits and bytes per part and layer."""
    from hfcompress.checkpoint import inspect_checkpoint
    from hfcompress.publish import inspection_tables

    summary = inspect_checkpoint(folder)
    if as_json:
        _print_json(summary.to_dict())
    else:
        for table in inspection_tables(summary):
            Console().print(table)


@app.command()
def card(
    folder: Folder,
    repo: Annotated[str | None, typer.Option(help="Repository that the loading example names.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's model card and its pictures from its measurements."""
    from hfcompress.describing import write_model_card

    written = write_model_card(folder, repo)
    if as_json:
        _print_json({"card": str(written)})
    else:
        print(written)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(parser=_path, metavar="FOLDER...", help="Folders of finished runs.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", parser=_path, help="The HTML file.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Compare runs in one HTML file: trade-off chart, sortable table, layers, and what their recipes differ in."""
    from hfcompress.publish import write_report

    written = write_report(folders, output)
    if as_json:
        _print_json({"report": str(written), "runs": len(folders)})
    else:
        print(f"{len(folders)} run{'s' * (len(folders) > 1)} compared in {written}; open it in a browser.")


@app.command()
def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(help="Where to: USER/NAME, or NAME for your own.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a repository made now.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint with its card to the Hub: all in one commit, or nothing."""
    import dataclasses

    from hfcompress.publish import push

    pushed = push(folder, repo, private=private, revision=revision, create_pr=create_pr)
    if as_json:
        _print_json(dataclasses.asdict(pushed))
        return
    print(f"{len(pushed.files)} files {'pushed' if pushed.changed else 'were there already'}: {pushed.url}")
    if pushed.left_out:
        print(f"Not uploaded, as they are not part of the checkpoint: {', '.join(pushed.left_out)}")


def _print_warning(message: Warning | str, *where: Any) -> None:
    print(f"hfcompress: {message}", file=sys.stderr)


def main() -> None:
    """Run the command; a user's error is one clear message and exit status 1, without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _print_warning  # type: ignore[assignment]  # it takes more than it needs
    try:
        app(standalone_mode=True)
    except HFCompressError as error:
        print(f"hfcompress: {error}", file=sys.stderr)
        raise SystemExit(1) from None
