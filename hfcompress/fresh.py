"""Our own command in fresh processes, each forked from one that has imported what it needs and done nothing else.

An interpreter takes seconds to import torch and transformers.  The one started here does so beside the caller's work,
and then forks for every command: the process that runs it has opened no model and started no thread before.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NoReturn

import torch


def forks_are_safe() -> bool:
    """Tell whether a process that has imported torch can be forked: an accelerator's driver does not survive that."""
    return sys.platform.startswith("linux") and not torch.accelerator.is_available()


class FreshProcesses:
    """Runs ``hfcompress WORDS`` in processes of their own; a context manager.

    preload: the modules that the commands need, imported once.  Where forks are not safe, every command starts an
    interpreter.
    """

    def __init__(self, *preload: str) -> None:
        self._connection: Connection | None = None
        if forks_are_safe():
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", __name__, str(theirs.fileno()), *preload]
                self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            self._connection = Connection(ours.detach())

    @property
    def server(self) -> int:
        """Return the serving process's number."""
        return self._server.pid

    def __enter__(self) -> FreshProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        """End the serving process, after the command that it may still run."""
        if self._connection is not None:
            self._connection.close()
            self._server.wait()

    def run(self, words: Sequence[str]) -> int:
        """Run ``hfcompress WORDS`` to its end and return its exit status, negative for a signal."""
        if self._connection is None:
            return subprocess.run([sys.executable, "-m", "hfcompress", *words], check=False).returncode
        try:
            self._connection.send(list(words))
            status: int = self._connection.recv()
        except (EOFError, BrokenPipeError):  # the serving process was killed
            return self._server.wait()
        return status


def serve(requests: Connection) -> None:
    """Fork for each command that is asked for, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command and for who asked for it
    while True:
        try:
            words = requests.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            requests.close()
            _become(words)
        requests.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _become(words: list[str]) -> NoReturn:
    """Run the command in this fork and leave as an interpreter would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status: object = 1
    try:
        sys.argv = ["hfcompress", *words]
        runpy.run_module("hfcompress", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # so that a fork's collections touch, and copy, none of this
    serve(Connection(int(sys.argv[1])))
