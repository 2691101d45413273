"""Tables for the terminal: what each stage changed, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from hfcompress.checkpoint.inspect import CheckpointSummary, Part
from hfcompress.evaluate import Measurement
from hfcompress.publish.facts import Facts, StageFacts
from hfcompress.publish.numbers import NOT_MEASURED, count, megabytes, metric, millions, percent, rate

NONE, NOT_KNOWN = "-", "unrecorded"
_ANY_WIDTH = 10_000


def speed_note(facts: Facts) -> str:
    """Say what the column of tokens a second counts: one kind for all stages, or each stage's own."""
    kinds = {stage.name: stage.measurement.speed_kind for stage in facts.stages if stage.measurement.speed_kind}
    if len(set(kinds.values())) > 1:
        return "; ".join(f"{name}: {kind}" for name, kind in kinds.items())
    return next(iter(kinds.values()), NOT_MEASURED)


def dtype_note(facts: Facts) -> str:
    """Say which dtype and device each stage was measured in, and what its weight files hold."""
    ran: dict[str, list[str]] = {}
    stored: dict[str, list[str]] = {}
    for stage in facts.stages:
        found = stage.measurement
        ran.setdefault(f"{found.dtype or NOT_KNOWN} on {found.device or NOT_KNOWN}", []).append(stage.name)
        if found.stored_dtypes:
            stored.setdefault(", ".join(found.stored_dtypes), []).append(stage.name)
    was_run = any(stage.measurement.dtype or stage.measurement.device for stage in facts.stages)
    text = f"Measured in {_by_stage(ran)}" if was_run else "Counted in the weight files, of which none was run"
    return f"{text}; stored in {_by_stage(stored)}" if stored else text


def _by_stage(found: dict[str, list[str]]) -> str:
    """Write what holds for every stage once, else with the stages that it holds for."""
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in found.items())


def stage_headers(facts: Facts) -> list[str]:
    """Return the titles of the columns that ``stage_cells`` fills."""
    return ["stage", "parameters", "non-zeros", "size on disk", *facts.metric_names, "tokens/s", "peak memory"]


def stage_cells(facts: Facts, stage: StageFacts) -> list[str]:
    """Return one stage's row: every cell is a number of its measurement or ``not measured``."""
    found = stage.measurement
    return [
        stage.name,
        millions(found.parameters),
        millions(found.nonzero),
        megabytes(found.bytes_on_disk),
        *(metric(name, found.metrics.get(name)) for name in facts.metric_names),
        rate(found.tokens_per_second),
        megabytes(found.peak_memory_bytes),
    ]


@dataclass(frozen=True)
class StageTable:
    """The table of stages for ``rich.print``; where it is wider than the console, its columns go on below."""

    facts: Facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        headers = stage_headers(self.facts)
        rows = [stage_cells(self.facts, stage) for stage in self.facts.stages]
        yield Text(self.facts.name, style="table.title")
        shown: list[int] = []
        for position in range(1, len(headers)):
            wider = _columns(headers, rows, [0, *shown, position])
            if shown and console.measure(wider, options=options.update(width=_ANY_WIDTH)).minimum > options.max_width:
                yield _columns(headers, rows, [0, *shown])
                shown = []
            shown.append(position)
        yield _columns(headers, rows, [0, *shown])
        yield Text(f"tokens/s: {speed_note(self.facts)}. {dtype_note(self.facts)}.", style="table.caption")


def stage_table(facts: Facts) -> StageTable:
    """Return the table of stages, for ``rich.print``; nothing in it is cut at any width that holds two columns."""
    return StageTable(facts)


def _columns(headers: list[str], rows: list[list[str]], positions: list[int]) -> Table:
    """Return some columns as a table that breaks headers and ``not measured`` between words, and nothing else."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for position in positions:
        cells = [row[position] for row in rows]
        pieces = [piece for cell in cells for piece in (cell.split() if cell == NOT_MEASURED else [cell])]
        widest = max(map(len, (*headers[position].split(), *pieces)))
        table.add_column(headers[position], justify="right" if position else "left", min_width=widest)
    for row in rows:
        table.add_row(*(row[position] for position in positions), style="bold" if row is rows[-1] else None)
    return table


def measurement_table(found: Measurement) -> Table:
    """Return one measurement as a table of names and values."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right", overflow="fold")
    rows = {
        "parameters": millions(found.parameters),
        "non-zeros": millions(found.nonzero),
        "sparsity": percent(found.sparsity),
        "size on disk": megabytes(found.bytes_on_disk),
        **{name: metric(name, value) for name, value in found.metrics.items()},
        "rows, tokens": f"{count(found.rows)}, {count(found.tokens)}",
        f"tokens/s ({found.speed_kind})" if found.speed_kind else "tokens/s": rate(found.tokens_per_second),
        "peak memory": megabytes(found.peak_memory_bytes),
        "measured in": f"{found.dtype or NOT_KNOWN} on {found.device or NOT_KNOWN}",
        "stored in": ", ".join(found.stored_dtypes) if found.stored_dtypes else NOT_MEASURED,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def inspection_tables(summary: CheckpointSummary) -> list[Table]:
    """Return what ``inspect_checkpoint`` found as three tables: the checkpoint, its parts and its layers."""
    whole = Table(show_header=False)
    whole.add_column(style="bold")
    whole.add_column(overflow="fold")
    groups = [
        f"int{group.bits}, {f'group size {group.group_size}' if group.group_size else 'one scale per row'}"
        for group in summary.groups
    ]
    rows = {
        "folder": summary.folder,
        "architecture": ", ".join(summary.architectures) or "not named",
        "model type": summary.model_type or "not named",
        "format": summary.format + (f" ({'; '.join(groups)})" if groups else ""),
        "files": f"{len(summary.files)}, {megabytes(summary.bytes_on_disk)}",
        "parameters": f"{millions(summary.parameters)} ({summary.parameters:,})",
        "zeros": f"{percent(summary.sparsity)} ({summary.parameters - summary.nonzero:,})",
        "bits per weight": f"{summary.total.bits_per_weight:.2f}",
        "recipe.yaml": "present" if summary.has_recipe else "absent",
        "measurements.json": "present" if summary.has_measurements else "absent",
    }
    for name, value in rows.items():
        whole.add_row(name, value)
    tables = [whole, _parts_table("parts", (*summary.parts, summary.total))]
    if summary.layers:
        tables.append(_parts_table("layers", summary.layers))
    if summary.uneven:
        tables.append(_uneven_table(summary.uneven))
    return tables


def _uneven_table(uneven: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("module", "differs from config.json", title="uneven shapes", title_justify="left")
    for name, values in uneven.items():
        table.add_row(name, ", ".join(f"{key} {value}" for key, value in values.items()))
    return table


def _parts_table(title: str, parts: tuple[Part, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for position, header in enumerate(("", "parameters", "non-zeros", "sparsity", "bits/weight", "size", "dtype")):
        table.add_column(header, justify="right" if 0 < position < 6 else "left")
    for part in parts:
        table.add_row(
            part.name,
            millions(part.parameters),
            millions(part.nonzero),
            percent(part.sparsity),
            f"{part.bits_per_weight:.2f}" if part.parameters else NONE,
            megabytes(part.bytes),
            ", ".join(part.dtypes) or NONE,
            style="bold" if part.name == "total" else None,
        )
    return table
