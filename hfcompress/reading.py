"""Rows as they are: read from files of every kind, from datasets of the Hub, and from packages."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, DatasetDict, Image, load_dataset

from hfcompress.bundled import is_packaged, packaged_documents
from hfcompress.errors import DataError
from hfcompress.progress import quiet_bars

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    # The convention of tab-separated corpora (GLUE among them): a quotation mark is a character like any other.
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document"}),
    ".md": ("text", {"sample_by": "document"}),
}


def refuse_missing(path: Path) -> None:
    """Raise DataError when there is no such file or folder."""
    if not path.exists():
        raise DataError(f"No such data file: {path}.")


def read_files(paths: Sequence[Path]) -> Dataset:
    """Return the rows of files of one kind, in order.  Raises DataError for missing, unknown or damaged files."""
    for path in paths:
        refuse_missing(path)
        if path.is_dir():
            raise DataError(f"{path} is a folder. A split is files, or one folder of images or sounds as all are.")
        if path.suffix not in READERS:
            raise DataError(f"{path}: '{path.suffix}' files cannot be read. Known: {', '.join(READERS)}.")
    suffixes = {path.suffix for path in paths}
    if len(suffixes) != 1:
        raise DataError(f"The files of one split must be of one kind, not {', '.join(sorted(suffixes))}.")
    builder, options = READERS[suffixes.pop()]
    try:
        with quiet_bars():
            return load_dataset(builder, data_files=[str(path) for path in paths], split="train", **options)
    except Exception as error:  # the readers raise many kinds; each means that the file is not what its name says
        raise DataError(f"{paths[0]} cannot be read as {builder}: {error}") from error


def read_folders(folders: Mapping[str, Path]) -> DatasetDict:
    """Return folders of images or sounds by split, whatever their files are called.

    Read together, as only so a class has one number in all of them.  Raises DataError for folders of anything else.
    """
    first = next(iter(folders.values()))
    with opening_dataset(str(first)), quiet_bars():
        patterns = {split: str(folder.resolve() / "**") for split, folder in folders.items()}
        splits = load_dataset(str(first), data_files=patterns)
    if not any(isinstance(feature, (Audio, Image)) for feature in next(iter(splits.values())).features.values()):
        raise DataError(f"{first} is a folder, but not one of images or sounds: name its files.")
    return splits


def open_dataset(name: str, config: str | None, revision: str | None, text_column: str) -> DatasetDict:
    """Return all splits of a dataset on the Hub, of a local dataset folder, or of ``package:<name>``.

    config: of a dataset that has several.  revision: a branch, tag or commit.  text_column: what to call the text of
    a package.  Raises DataError when there is none.
    """
    if is_packaged(name):
        documents = packaged_documents(name)
        rows = {"title": list(documents), text_column: list(documents.values())}
        return DatasetDict({"train": Dataset.from_dict(rows)})
    with opening_dataset(name):
        return load_dataset(name, config, revision=revision)


@contextmanager
def opening_dataset(name: str) -> Iterator[None]:
    """Turn what the datasets library raises for a dataset that it cannot find or read into one DataError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(
            f"Data '{name}' cannot be opened: it is neither on the Hub as this machine reaches it, nor a local "
            f"path (local files go under data.files). {type(error).__name__}: {error}"
        ) from error
