"""Open the data that a recipe names, and split it into parts that never overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset_builder

from hfcompress.bundled import is_packaged, packaged_documents
from hfcompress.checkpoint.files import digest_of
from hfcompress.errors import DataError, did_you_mean
from hfcompress.reading import open_dataset, opening_dataset, read_files, read_folders, refuse_missing
from hfcompress.recipe import DataSpec

HELD_OUT_NAMES = ("validation", "dev", "test")


def load_splits(spec: DataSpec, seed: int, needs_calibration: bool) -> DatasetDict:
    """Return the splits ``train``, ``held_out`` and, if needed, ``calibration``, as raw rows.

    A held-out part is taken from the data's own held-out split where there is one, else cut from the training rows;
    the calibration part is always cut from the training rows.  Rows are shuffled with ``seed`` before a cut, and a
    row goes to one part only.  Raises DataError for missing files, columns, splits, or a part without rows.
    """
    raw = _open(spec)
    train = _only(raw, spec.splits.train if spec.splits else None, ("train",), "train")
    named = spec.splits.held_out if spec.splits else None
    _refuse_overlap(spec)
    has_own = named is not None or any(name in raw for name in HELD_OUT_NAMES)
    parts = DatasetDict()
    if has_own:
        parts["held_out"] = _only(raw, named, HELD_OUT_NAMES, "held-out")
    train = train.shuffle(seed=seed)
    if not has_own:
        train, parts["held_out"] = _cut(train, spec.held_out_share, "held-out")
    if needs_calibration:
        train, parts["calibration"] = _cut(train, spec.held_out_share, "calibration")
    if spec.max_train_rows is not None:
        train = train.select(range(min(spec.max_train_rows, len(train))))
    parts["train"] = train
    for name, part in parts.items():
        if len(part) == 0:
            raise DataError(f"The {name} part of {describe(spec)} has 0 rows.")
    return parts


def _refuse_overlap(spec: DataSpec) -> None:
    """Raise DataError when the held-out part is the training part by its name or by its files."""
    if spec.splits and spec.splits.held_out is not None and spec.splits.held_out == (spec.splits.train or "train"):
        raise DataError(f"data.splits names '{spec.splits.held_out}' for training and held-out rows; name two splits.")
    if spec.id is None:
        owner: dict[Path, str] = {}
        for split, paths in _files_by_split(spec).items():
            for path in paths:
                if owner.setdefault(path.resolve(), split) != split:
                    raise DataError(f"{path} is in data.files for both {owner[path.resolve()]} and {split}.")
        for path, split in owner.items():
            for folder in path.parents:
                if owner.get(folder, split) != split:
                    raise DataError(
                        f"{path} ({split}) lies in {folder} ({owner[folder]}), which data.files names, too."
                    )


def load_train_rows(spec: DataSpec) -> Dataset:
    """Return the raw training rows, all of them in their order.  Raises DataError for missing files or splits."""
    return _only(_open(spec), spec.splits.train, ("train",), "train")


def require_columns(rows: Dataset, columns: Iterable[str], spec: DataSpec) -> None:
    """Raise DataError, naming the columns that exist, unless every named one does."""
    for column in columns:
        if column not in rows.column_names:
            raise DataError(
                f"{describe(spec)} has no column '{column}'. {did_you_mean(column, rows.column_names)}"
                f"Its columns: {', '.join(rows.column_names)}."
            )
        # As Arrow holds them: nothing is decoded for this.
        empty = rows.select_columns([column]).with_format("arrow")[:][column].null_count
        if empty:
            raise DataError(f"{describe(spec)} has {empty} rows without a value in column '{column}'; remove them.")


def describe(spec: DataSpec) -> str:
    """Return a short name of the data for messages and cards."""
    if spec.id is not None:
        return f"Data '{spec.id}'"
    return f"Data in {', '.join(str(path) for paths in _files_by_split(spec).values() for path in paths)}"


def data_digest(spec: DataSpec) -> str:
    """Return a digest of the data's content, or a Hub dataset's id and the commit that its revision is.

    Raises DataError when there are no such data.
    """
    with _naming_what_writes(spec):
        return _digest(spec)


def _digest(spec: DataSpec) -> str:
    if spec.id is None:
        digest = hashlib.sha256()
        for split, paths in sorted(_files_by_split(spec).items()):
            for path in paths:
                refuse_missing(path)
                content = digest_of(path.parent, [path]) if path.is_file() else _digest_of_folder(path)
                digest.update(f"{split}\0{content}\n".encode())
        return digest.hexdigest()[:16]
    if is_packaged(spec.id):
        return hashlib.sha256(repr(packaged_documents(spec.id)).encode()).hexdigest()[:16]
    folder = Path(spec.id)
    if folder.is_dir():
        return _digest_of_folder(folder)
    with opening_dataset(spec.id):
        # The builder's hash is the commit, of what is on the Hub and of what was downloaded from there earlier.
        return f"{spec.id}@{load_dataset_builder(spec.id, spec.name, revision=spec.revision).hash}"


def _digest_of_folder(folder: Path) -> str:
    return digest_of(folder, sorted(path for path in folder.rglob("*") if path.is_file()))


def _files_by_split(spec: DataSpec) -> dict[str, list[Path]]:
    files = spec.files
    if not isinstance(files, dict):
        files = {"train": files}  # type: ignore[dict-item]
    listed = {split: [named] if isinstance(named, str) else list(named) for split, named in files.items()}
    return {split: [Path(name).expanduser() for name in names] for split, names in listed.items()}


def _open(spec: DataSpec) -> DatasetDict:
    with _naming_what_writes(spec):
        if spec.id is not None:
            return open_dataset(spec.id, spec.name, spec.revision, spec.text_column or "text")
        files = _files_by_split(spec)
        if all(len(paths) == 1 and paths[0].is_dir() for paths in files.values()):
            return read_folders({split: path for split, (path,) in files.items()})
        return DatasetDict({split: read_files(paths) for split, paths in files.items()})


@contextmanager
def _naming_what_writes(spec: DataSpec) -> Iterator[None]:
    """Have errors of data that cannot be opened name the command that writes them, where the recipe does."""
    try:
        yield
    except DataError as error:
        if spec.written_by is None:
            raise
        raise DataError(f"{error} The data are written by: {spec.written_by}") from error


def _only(raw: DatasetDict, name: str | None, usual: Iterable[str], role: str) -> Dataset:
    if name is not None:
        if name not in raw:
            raise DataError(f"The data have no split '{name}' ({role}); they have {', '.join(raw)}.")
        return raw[name]
    for candidate in usual:
        if candidate in raw:
            return raw[candidate]
    raise DataError(f"The data have no {role} split named {' or '.join(usual)}; they have {', '.join(raw)}.")


def _cut(rows: Dataset, share: float, role: str) -> tuple[Dataset, Dataset]:
    """Cut the last ``share`` of the rows off, at least one; documents without rows to spare are an error."""
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise DataError(
            f"{len(rows)} rows are too few to cut a {role} part off; give more data or a split of its own."
        )
    return rows.select(range(len(rows) - count)), rows.select(range(len(rows) - count, len(rows)))
