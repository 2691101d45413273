"""Write folders and files so that a name never stands for half of its content."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hfcompress.errors import CheckpointError, OutputError

MARKER = "hfcompress.json"


def refuse_foreign(folder: Path) -> None:
    """Raise OutputError when a folder holds anything that hfcompress did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the result.")
    if any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise OutputError(
            f"{folder} exists and was not written by hfcompress (it has no {MARKER}). Nothing was changed; "
            "name another folder."
        )


def refuse_full_disk(folder: Path, bytes_needed: int) -> None:
    """Raise CheckpointError when the disk has no room for this many bytes."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise CheckpointError(
            f"{folder} needs {bytes_needed / 1e6:.0f} MB, but its disk has {free / 1e6:.0f} MB left. Nothing was "
            "changed; free some space or name a folder on another disk."
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a scratch folder that takes the place of ``folder`` when the block ends without an error.

    Raises OutputError for a folder that is not ours, CheckpointError when writing fails; then nothing has changed.
    """
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
        _to_disk(scratch)
        scratch.chmod(0o755)
        _replace(folder, scratch)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}. Nothing was changed.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(folder: Path, scratch: Path) -> None:
    if not folder.exists():
        scratch.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old / folder.name)
    scratch.rename(folder)
    shutil.rmtree(old)


def _to_disk(folder: Path) -> None:
    """Flush every file of a folder, so that a power cut after the rename finds them whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}. Nothing was changed.") from error
    finally:
        scratch.unlink(missing_ok=True)
