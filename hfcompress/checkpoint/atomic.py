"""Write folders and files so that a name never stands for half of its content."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hfcompress.checkpoint.locks import locked
from hfcompress.errors import CheckpointError, OutputError

MARKER = "hfcompress.json"
_HIDDEN, _OLD, _LOCK = ".hfcompress-", ".old", ".hfcompress.lock"


def refuse_foreign(folder: Path) -> None:
    """Raise OutputError when a folder holds anything that hfcompress did not write.

    The marker in the folder lists what hfcompress wrote, so a file that a user added later counts, too.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the result.")
    present = _files_in(folder)
    if not present and not any(folder.iterdir()):
        return
    if not (folder / MARKER).is_file():
        raise OutputError(
            f"{folder} exists and was not written by hfcompress (it has no {MARKER}). Nothing was changed; "
            "name another folder."
        )
    foreign = sorted({*present} - {MARKER, *_marker(folder).get("files", [])})
    if foreign:
        raise OutputError(
            f"{folder} holds files that hfcompress did not write: {', '.join(foreign[:9])}"
            f"{' and more' if len(foreign) > 9 else ''}. Nothing was changed; move them or name another folder."
        )


def list_own_files(folder: Path, names: Iterable[str]) -> None:
    """Add names to the files that the folder's marker lists as ours; a folder without a marker stays without."""
    if (folder / MARKER).is_file():
        marker = _marker(folder)
        marker["files"] = sorted({*marker.get("files", []), *names})
        write_text(folder / MARKER, json.dumps(marker, indent=2) + "\n")


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def _marker(folder: Path) -> dict[str, Any]:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return marker if isinstance(marker, dict) else {}


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

    What the block wrote is flushed to disk and listed in the marker first.  On Linux an old folder and the new one
    are swapped in one step.  Elsewhere a kill between two renames leaves no ``folder``, but whole under a hidden name
    what it held; ``recover``, and so the next ``new_folder``, brings that back.
    Raises OutputError for a folder that is not ours or that another process is writing, CheckpointError when writing
    fails; then nothing has changed.
    """
    folder = Path(os.path.realpath(folder))  # a link stays a link, and what it leads to is replaced
    refuse_foreign(folder)
    try:
        with _only_writer(folder) as alone:
            if alone:
                _recover(folder)
            scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}{_HIDDEN}", dir=folder.parent))
            try:
                yield scratch
                list_own_files(scratch, _files_in(scratch))
                to_disk(scratch)
                _open_to_readers(scratch)
                refuse_foreign(folder)
                _replace(folder, scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}. Nothing was changed.") from error


def _open_to_readers(folder: Path) -> None:
    """Give files and folders the usual modes: temporary folders and safetensors' files are their owner's alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def recover(folder: Path) -> None:
    """Undo what killed processes left beside a folder, unless one is writing it now.

    An old folder that was moved aside, with no new one in its place, comes back; scratch folders are removed.
    """
    folder = Path(os.path.realpath(folder))
    if any(_left_beside(folder)):
        with suppress(OutputError), _only_writer(folder) as alone:
            if alone:
                _recover(folder)


def _only_writer(folder: Path) -> AbstractContextManager[bool]:
    return locked(folder.with_name(f".{folder.name}{_LOCK}"), str(folder))


def _left_beside(folder: Path) -> list[Path]:
    return sorted(folder.parent.glob(f".{glob.escape(folder.name)}{_HIDDEN}*"))


def _recover(folder: Path) -> None:
    for left in _left_beside(folder):
        if left.name.endswith(_OLD) and not folder.exists():
            left.rename(folder)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _replace(folder: Path, scratch: Path) -> None:
    """Give a whole scratch folder its final name; what had that name before is removed, or has the scratch's name."""
    if not folder.exists():
        scratch.rename(folder)
    elif not _swap(folder, scratch):
        old = scratch.with_name(scratch.name + _OLD)
        folder.rename(old)
        try:
            scratch.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):  # the result stands; some file systems cannot flush a folder
        _flush(folder.parent)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, with Linux's renameat2; return False where that cannot be done."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def to_disk(folder: Path) -> None:
    """Flush a folder's files and their names, so that a power cut after a later rename finds them whole."""
    for path in (folder, *folder.rglob("*")):
        if path.is_file():
            _flush(path)
        elif path.is_dir():
            with suppress(OSError):
                _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; raises what the disk or safetensors raise."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, scratch, metadata)
        _flush(scratch)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; it is on the disk, under its name, when this returns."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        _flush(scratch)
        scratch.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}. Nothing was changed.") from error
    finally:
        scratch.unlink(missing_ok=True)
    with suppress(OSError):
        _flush(path.parent)
