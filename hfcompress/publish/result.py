"""What the end of a run looks like in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hfcompress.publish.facts import Facts
from hfcompress.publish.loading import loading_lines, runs_own_code
from hfcompress.publish.sections import headline
from hfcompress.publish.tables import stage_table


def print_result(folder: Path, facts: Facts, console: Console) -> None:
    """Print what the run cost and gave: the table, the change, a text before and after, and how to load it."""
    console.print(stage_table(facts))
    console.print(Text(headline(facts).strip("*"), style="bold"))
    prompt = (facts.recipe.get("evaluate") or {}).get("prompt")
    if facts.before.continuation and facts.after.continuation:
        goes_on = f"{prompt!r} goes on" if prompt else "The model goes on"
        for moment, found in (("before", facts.before), ("after", facts.after)):
            console.print(Text(f"\n{goes_on} like this {moment}:"))
            console.print(Padding(Text(str(found.continuation).strip(), style="italic"), (0, 0, 0, 2)))
    loads = "Load it with stock Transformers" if facts.loads_without_hfcompress else "Load it"
    console.print(f"\n{loads}:")
    trusted = runs_own_code(facts.recipe, {})
    lines = loading_lines(facts.task, str(folder), bool(facts.loads_without_hfcompress), trusted)
    for line in lines.splitlines():
        console.print(Text(f"  {line}"), soft_wrap=True)  # never cut or broken: it is there to be copied
    console.print(f"\nModel card: {folder / 'README.md'}", soft_wrap=True, highlight=False)
