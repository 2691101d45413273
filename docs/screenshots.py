"""Takes the documentation's screenshots again, of the real thing: ``python -m docs.screenshots``.

What is shown comes from the measurements of cards in ``model_cards/``: a report of the four that have one task, and
what the command prints at the end of a run.  Needs Chromium and its driver, see CONTRIBUTING.md.
"""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path

from rich.console import Console

from docs.measured import CARDS, ROOT
from hfcompress.publish import load_facts, print_result, write_report
from tests.browser import Browser

IMAGES = ROOT / "docs" / "images"
RUN = CARDS / "smollm2-4bit"
COMPARED = sorted(file.parent for file in CARDS.glob("sst2-*/measurements.json"))
REPORT_WIDTH = 1100
TERMINAL_COLUMNS = 110


def screenshots(folder: Path) -> list[Path]:
    """Write every screenshot to a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        browser = Browser(Path(scratch) / "profile")
        try:
            page = write_report(COMPARED, Path(scratch) / "report.html")
            terminal = Path(scratch) / "run.svg"
            drawing = end_of_run()
            terminal.write_text(drawing, encoding="utf-8")
            made = []
            for dark, name in ((False, "light"), (True, "dark")):
                browser.open(page, REPORT_WIDTH, dark=dark)
                browser.choose("#y", "accuracy")
                made.append(browser.picture(folder / f"report-{name}.png", down_to="#chart"))
            browser.open(terminal, *_size(drawing))
            return [*made, browser.picture(folder / "run.png")]
        finally:
            browser.close()


def end_of_run() -> str:
    """Return as SVG what ``hfcompress run`` printed when the run was done."""
    facts = load_facts(RUN)
    console = Console(record=True, width=TERMINAL_COLUMNS, file=io.StringIO(), force_terminal=True)
    print_result(Path(facts.recipe["output"]), facts, console)
    return console.export_svg(title=f"hfcompress run {RUN.name.replace('-', '_')}")


def _size(drawing: str) -> tuple[int, int]:
    """Return the size that a drawing has by itself."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    assert found
    return round(float(found[1])), round(float(found[2]))


if __name__ == "__main__":
    for path in screenshots(IMAGES):
        print(path.relative_to(ROOT), f"{path.stat().st_size / 1e3:.0f} kB")
