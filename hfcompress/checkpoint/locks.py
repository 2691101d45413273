"""Locks between processes: the kernel drops the lock of a process that ends, however it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hfcompress.errors import OutputError
from hfcompress.progress import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(file: Path, what: str) -> Iterator[bool]:
    """Hold the lock that ``file`` stands for; the file and its folder are made, and the file removed at the end.

    what: the thing that is locked, named in messages.  Yields False, after saying so, where the system or the file
    system has no locks: then nothing keeps two processes apart.  Raises OutputError when another process has the lock,
    or when the file cannot be made.
    """
    handle = _open_and_lock(file, what)
    try:
        held = handle is not None
        if not held:
            say(f"{what} cannot be locked on this system: do not use it from two processes at once")
        yield held
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)  # before the lock is dropped, so that nobody else's file is removed
            os.close(handle)


def _open_and_lock(file: Path, what: str) -> int | None:
    """Return the handle that holds the lock, None where there are no locks."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                return None
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the process that held the lock has just removed the folder
            continue
        except OSError as error:
            raise OutputError(f"{what} cannot be written: {error}. Name another output.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(file)):
                    return handle
        except BlockingIOError:
            os.close(handle)
            raise OutputError(
                f"{what} is in use by another process. Wait until that ends, or name another output."
            ) from None
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS_HERE:
                file.unlink(missing_ok=True)
                return None
            raise
        os.close(handle)  # its holder removed the file before this lock came: there is a new file by now, or none
