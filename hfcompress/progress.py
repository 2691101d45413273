"""Progress: a moving display in a terminal or notebook, else a plain line on standard error every few seconds."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def _moving_display() -> Console | None:
    """Return where a display can move: a terminal, or a notebook that has widgets; None is for lines of text."""
    console = Console(file=sys.stderr)
    with_widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return console if console.is_terminal or with_widgets else None


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Meter:
    """Advance a count of steps; ``note`` is a short text shown beside the count."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self._done_before = 0
        self.note = ""
        self._started = time.monotonic()
        self._bar: Progress | None = None
        console = _moving_display()
        if console is not None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task(description, total=total, note="")

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Count ``steps`` more as done."""
        self.advance_to(self.done + steps, note)

    def advance_to(self, done: int, note: str | None = None) -> None:
        """Set the count of steps done."""
        self.done = done
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=self.note)

    def begin(self, total: int, done: int) -> None:
        """Set the total once it is known, and what an earlier run had done already."""
        self.total, self.done, self._done_before = total, done, done
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar, or print a line every few seconds, for the length of a ``with`` block."""
        if self._bar is not None:
            with self._bar:
                yield
                self._bar.refresh()  # of itself a notebook's display stays where it was some moments ago
            return
        say(self.description)
        with _repeating(self._print_line):
            yield

    def _print_line(self) -> None:
        spent = time.monotonic() - self._started
        left = ""
        done_here = self.done - self._done_before
        if self.total and done_here:
            left = f", {_clock(spent * max(0, self.total - self.done) / done_here)} left"
        _print(f"{self.description}: {self.done}/{self.total or '?'} in {_clock(spent)}{left}  {self.note}")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _repeating(report: Callable[[], None]) -> Iterator[None]:
    """Call ``report`` every few seconds from a thread, so that a step of any length is not silent."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            report()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def say(what: str) -> None:
    """Print what is going on now, for steps that take no time or show their own progress."""
    _print(f"{what} ...")


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show that something is going on that cannot be counted, for the length of a ``with`` block."""
    console = _moving_display()
    if console is not None:
        columns = (TextColumn("{task.description}"), SpinnerColumn("line"), TimeElapsedColumn())
        with Progress(*columns, console=console, refresh_per_second=4) as shown:
            shown.add_task(what, total=None)
            yield
        return
    started = time.monotonic()
    say(what)
    with _repeating(lambda: _print(f"{what}: {_clock(time.monotonic() - started)}")):
        yield


@contextmanager
def meter(description: str, total: int | None = None) -> Iterator[Meter]:
    """Show a ``Meter`` for the length of a ``with`` block."""
    counted = Meter(description, total)
    with counted.shown():
        yield counted


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how many have been worked on."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with meter(description, total) as shown:
        for item in items:
            yield item
            shown.advance()


@contextmanager
def quiet_bars(quiet: bool = True) -> Iterator[None]:
    """Hide the libraries' own bars for work of a second or two; downloads and conversions keep theirs."""
    import datasets
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not (quiet and shown):
        yield
        return
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        datasets.enable_progress_bars()
