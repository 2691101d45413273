"""Images in columns of a dataset: paths, bytes, or what ``datasets.Image`` holds."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, Image

from hfcompress.errors import DataError, MissingDependencyError
from hfcompress.progress import track

CHECKED_AT_MOST = 10_000  # images looked at before the first stage; more would take longer than they save


def undecoded(rows: Dataset, column: str) -> Dataset:
    """Return rows whose images stay bytes or paths, so that we open them and can say which one is broken."""
    if isinstance(rows.features[column], Image):
        return rows.cast_column(column, Image(decode=False))
    return rows


def open_image(value: Any, column: str, index: int) -> Any:
    """Return a PIL image in RGB.  value: a path, bytes, or a mapping with either.

    Raises DataError, naming the row, when it is no image that can be read.
    """
    with _reading(value, column, index) as opened:
        return opened.convert("RGB")


def check_images(rows: Dataset, column: str) -> None:
    """Raise DataError for an image that is not there or is no image; pixels are decoded later."""
    few = rows.select(range(min(len(rows), CHECKED_AT_MOST))).select_columns([column])
    for index, row in enumerate(track(few, "looking at the images", len(few))):
        with _reading(row[column], column, index) as opened:
            opened.verify()


@contextmanager
def _reading(value: Any, column: str, index: int) -> Iterator[Any]:
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingDependencyError("Images need Pillow: pip install 'hfcompress[vision]'") from error
    content = value if not isinstance(value, dict) else value.get("bytes") or value.get("path")
    name = content if isinstance(content, str) else value.get("path") if isinstance(value, dict) else None
    described = f"The image in row {index} of column '{column}'{f' ({name})' if name else ''}"
    if not isinstance(content, (str, bytes)) or not content:
        raise DataError(f"{described} is {type(value).__name__}, not a path or the bytes of an image file.")
    try:
        with PIL.Image.open(content if isinstance(content, str) else io.BytesIO(content)) as opened:
            yield opened
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for files that it cannot read
        raise DataError(f"{described} cannot be read: {error}. Remove or replace it.") from error
