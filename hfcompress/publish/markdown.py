"""Small pieces of Markdown that hold whatever text is put into them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def cell(text: str) -> str:
    """Return text for a cell of a Markdown table: one line, its bars escaped."""
    return " ".join(str(text).split()).replace("|", r"\|")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right_from: int = 1) -> str:
    """Return a Markdown table; columns from ``right_from`` on are set to the right."""
    rule = [":--" if position < right_from else "--:" for position in range(len(headers))]
    return "\n".join(f"| {' | '.join(cell(one) for one in line)} |" for line in (headers, rule, *rows))


def fenced(text: str, language: str = "text") -> str:
    """Return a code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def code(text: str) -> str:
    """Return text as inline code, on one line, between longer runs of backticks than it holds."""
    line, longest = " ".join(text.split()), _longest_run(text)
    return f"{'`' * (longest + 1)} {line} {'`' * (longest + 1)}" if longest else f"`{line}`"


def plain(text: str) -> str:
    """Return text as it reads, on one line: what would be markup is escaped."""
    return re.sub(r"([\\`*<\[])", r"\\\1", " ".join(text.split()))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
