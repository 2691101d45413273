"""Our own command in fresh interpreters, each of which has imported what it needs before it is asked for.

An interpreter takes seconds to import torch and transformers.  The next one does so beside the caller's work, and then
waits for its command.
"""

from __future__ import annotations

import importlib
import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence


class FreshProcesses:
    """Runs ``hfcompress WORDS`` in interpreters of their own, one after another; a context manager.

    preload: the modules that the commands need, imported ahead.
    """

    def __init__(self, *preload: str) -> None:
        self._command = [sys.executable, "-m", __name__, *preload]
        self._spare = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, text=True)

    @property
    def spare(self) -> int:
        """Return the number of the process that the next command will run in."""
        return self._spare.pid

    def __enter__(self) -> FreshProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        """End the process that waits."""
        self._spare.kill()
        self._spare.communicate()

    def run(self, words: Sequence[str]) -> int:
        """Run ``hfcompress WORDS`` to its end and return its exit status, negative for a signal."""
        self._spare.communicate(json.dumps(list(words)))
        status = self._spare.returncode
        # Not before the command has ended: what it measures would share the processor with these imports.
        self._spare = self._start()
        return status


def _wait_for_words() -> list[str] | None:
    """Return the words of the command, None when whoever might ask has ended."""
    line = sys.stdin.read()
    words: list[str] | None = json.loads(line) if line else None
    return words


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for a command that runs and for who asked for it
    for name in sys.argv[1:]:
        importlib.import_module(name)
    asked = _wait_for_words()
    if asked is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["hfcompress", *asked]
        runpy.run_module("hfcompress", run_name="__main__", alter_sys=True)
