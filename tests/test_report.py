"""One HTML file compares runs: it holds what was measured, loads nothing, and does what its controls say."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hfcompress.errors import CheckpointError, DataError, OutputError
from hfcompress.publish import write_report
from tests.browser import MISSING, WANTED, Browser
from tests.test_publish import measurements

HOSTILE = "b </script><script>document.title='run'</script> {{data}}"


def second() -> dict[str, Any]:
    """Another run: smaller, worse, with heads removed, and a name that tries to leave its place."""
    values = copy.deepcopy(measurements())
    values["name"] = HOSTILE
    values["recipe"]["seed"] = 11
    values["recipe"]["stages"] = values["recipe"].get("stages", [])[:1]
    rows = [{**row, "name": row["name"].replace("q_proj", "o_proj")} for row in values["quantization_report"]]
    values["quantization_report"] += rows
    values["structure"] = {"heads": {"model.layers.0": [9, 3], "model.layers.1": [9, 9]}}
    values["stages"] = values["stages"][:3]
    values["stages"][1]["measurement"]["metrics"] = {"perplexity": math.inf}
    values["stages"][2]["measurement"] |= {"bytes_on_disk": 50_000_000, "metrics": {"perplexity": 99.5}}
    return values


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, values in {"a": measurements(), "b": second()}.items():
        (folder / name).mkdir()
        (folder / name / "measurements.json").write_text(json.dumps(values))
    return write_report([folder / "a", folder / "b"], folder / "report.html")


def held(page: Path) -> dict[str, Any]:
    """Return the values that a page holds, as its own script reads them."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    values: dict[str, Any] = json.loads(found[1])
    return values


def test_the_page_holds_what_was_measured_and_nothing_else(page: Path) -> None:
    first, other = held(page)["runs"]
    assert other["name"] == HOSTILE
    stages = measurements()["stages"]
    assert [stage["name"] for stage in first["stages"]] == [stage["name"] for stage in stages]
    assert first["stages"][-1]["values"] == {
        "bytes_on_disk": 102.345678, "parameters": 113.275, "nonzero": 105.020003, "tokens_per_second": 41.76,
        "latency_ms": 35.4, "latency_p95_ms": 41.2, "peak_memory_bytes": 987.654321, "seconds": 61.2,
        "perplexity": 40.83,
    }  # fmt: skip
    assert first["stages"][0]["values"]["seconds"] is None
    assert other["stages"][1]["values"]["perplexity"] == {"infinite": True}  # JSON knows no infinity
    assert other["kept"] == {"heads": {"0": [9, 3], "1": [9, 9]}}


def test_the_page_loads_nothing(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|fetch\(|import\(|XMLHttpRequest""", text)
    assert text.count("<script") == 2  # the data and the page's own, whatever runs are called


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "measurements.json").write_text(json.dumps(measurements()))
    report = write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "report.html")
    assert [run["name"] for run in held(report)["runs"]] == ["smollm2-small (one)", "smollm2-small (two)"]
    for name in ("three", "four"):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / "measurements.json").write_text(json.dumps(measurements()))
    report = write_report([tmp_path / "three/out", tmp_path / "four/out"], tmp_path / "report.html")
    names = [run["name"] for run in held(report)["runs"]]
    assert names == ["smollm2-small (three/out)", "smollm2-small (four/out)"]
    with pytest.raises(DataError, match="Two folders hold a run called smollm2-small"):
        write_report([tmp_path / "one", tmp_path / "one"], tmp_path / "report.html")


def test_the_page_names_no_path_of_the_machine(tmp_path: Path) -> None:
    values = measurements()
    values["base_model"] = "/home/somebody/models/bert"
    values["stages"][2]["summary"] = "teacher /home/somebody/teacher, 400 steps"
    (tmp_path / "measurements.json").write_text(json.dumps(values))
    page = write_report([tmp_path], tmp_path / "report.html")
    assert "somebody" not in page.read_text()
    (run,) = held(page)["runs"]
    assert run["base"] == "bert"
    assert [stage["summary"] for stage in run["stages"]][2] == "teacher teacher, 400 steps"


def test_a_run_of_one_stage_has_nothing_to_compare(tmp_path: Path) -> None:
    values = measurements()
    values["stages"] = values["stages"][:1]
    (tmp_path / "measurements.json").write_text(json.dumps(values))
    (run,) = held(write_report([tmp_path], tmp_path / "report.html"))["runs"]
    assert run["changes"] == []


@pytest.mark.parametrize(("metric", "less"), [("mse", True), ("wer", True), ("perplexity", True), ("accuracy", False)])
def test_the_page_knows_which_way_is_better(metric: str, less: bool, tmp_path: Path) -> None:
    values = measurements()
    for stage in values["stages"]:
        stage["measurement"]["metrics"] = {metric: 0.5}
    (tmp_path / "measurements.json").write_text(json.dumps(values))
    assert held(write_report([tmp_path], tmp_path / "report.html"))["metrics"][metric]["less"] is less


def test_bad_input_is_one_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no measurements\.json"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(DataError, match="at least one folder"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(OutputError, match="cannot be the report"):
        write_report([tmp_path], tmp_path / "nowhere" / "report.html")
    assert not list(tmp_path.iterdir())


needs_browser = pytest.mark.skipif(not WANTED, reason=MISSING)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@needs_browser
def test_its_controls_do_what_they_say(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    assert browser.run("return document.title").startswith("hfcompress: ")  # no name of a run was run as a script
    assert len(browser.find("#chart circle")) == 4 + 2  # a stage of infinite perplexity has no place

    browser.click("#runs button")  # hide the first run
    assert len(browser.find("#chart circle")) == 2
    browser.click("#runs button")

    browser.click('#chart circle[data-stage="quantize"]')
    assert "size on disk (MB) 102.3, perplexity 40.83" in browser.texts("#tip")[0]
    assert browser.texts("#stages tr.on td")[:2] == ["smollm2-small", "quantize"]

    column = "#stages tbody tr td:nth-child(3)"
    browser.click('#stages button[data-key="perplexity"]')
    assert browser.texts(column) == ["29.29", "29.29", "36.05", "40.83", "71.48", "99.50", "infinite"]
    browser.click('#stages button[data-key="perplexity"]')
    assert browser.texts(column) == ["infinite", "99.50", "71.48", "40.83", "36.05", "29.29", "29.29"]

    browser.choose("#y", "tokens/s")
    assert len(browser.find("#chart circle")) == 4 + 3
    assert browser.texts("#chart text.stage")
    browser.click("#log")
    assert "more is better" in " ".join(browser.texts("#chart text"))

    assert browser.texts("#changes tbody tr:first-child td") == [
        "smollm2-small", "perplexity", "29.29", "40.83", "+11.54", "not measured"]  # fmt: skip
    assert len(browser.find("#layers rect")) == 3  # the one linear layer of each layer
    assert not browser.find("#layers circle")

    browser.choose("#run", HOSTILE)
    assert len(browser.find("#layers circle")) == 2 * 3
    assert not browser.find("#layers rect")
    assert browser.texts("#layers .heat td") == ["3", "9"]
    browser.click("#only")
    assert "+ seed: 11" in browser.texts("#diff span.add")
    assert not browser.find("#diff span.same")
    browser.choose("#right", "smollm2-small")
    assert browser.texts("#diff") == ["No differences."]
    assert browser.complaints() == []


def brightness(colour: str) -> float:
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_its_window_and_can_be_read(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return document.querySelector('#chart svg').getBoundingClientRect().width") > 0.85 * width - 50
    paper = brightness(browser.run("return getComputedStyle(document.body).backgroundColor"))
    ink = browser.run(
        "return ['body', 'td', 'svg text', '#diff .add', 'select'].map((one) => {"
        " const style = getComputedStyle(document.querySelector(one));"
        " return one.startsWith('svg') ? style.fill : style.color; })"
    )
    assert (paper < 60) is dark
    assert all(abs(brightness(one) - paper) > 120 for one in ink), ink
    # No two labels of the chart lie over one another.
    boxes = browser.run(
        "return [...document.querySelectorAll('#chart text')].map((one) => { const box = one.getBoundingClientRect();"
        " return [box.left, box.top, box.right, box.bottom]; })"
    )
    for index, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
