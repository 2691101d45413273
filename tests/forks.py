"""Run hfcompress as forks of a process that has imported torch and transformers and done nothing else.

A new interpreter spends seconds on imports that are the same every time, and a run of a recipe starts one for each
measurement. Here these processes are forked instead: the same programs with the same arguments, each in a process of
its own that imports hfcompress itself. What only a new interpreter can show is tested with one, elsewhere.
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
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IMPORTED = (
    "torch",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "evaluate",
    "compressed_tensors",
    "matplotlib.backends.backend_agg",
    "pydantic.dataclasses",
    "rich.progress",
    "typer",
)


@dataclass(frozen=True)
class Spy:
    """Notes what a run and the processes that it starts do below a folder, and may send a signal at one moment.

    A note is a line of the file ``notes``: ``rename PATH``, ``write PATH`` or ``remove PATH`` just before a path below
    the folder gets its name, is opened for writing, or is removed with all that it holds; ``step N`` just before
    training step N, counted from 0. at: the note, as a shell pattern, at which the signal is sent; SIGKILL goes to the
    whole group of processes, any other signal to the run.
    """

    folder: Path
    notes: Path
    at: str = ""
    signal: int = signal.SIGKILL

    def watch(self) -> None:
        """Begin to watch this process, which leads its group, and what will be forked from it."""
        from transformers import TrainerCallback
        from transformers.trainer import DEFAULT_CALLBACKS

        if self.signal == signal.SIGINT:  # which a shell's background job ignores, and so does what it starts
            signal.signal(signal.SIGINT, signal.default_int_handler)
        notes = os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

        def note(text: str) -> None:
            os.write(notes, f"{text}\n".encode())
            if self.at and fnmatch(text, self.at):
                send = os.killpg if self.signal == signal.SIGKILL else os.kill
                send(os.getpgrp(), self.signal)

        def on_event(event: str, arguments: tuple[Any, ...]) -> None:
            verb, path = _meaning(event, arguments)
            if verb and path.startswith(f"{self.folder}/"):
                note(f"{verb} {os.path.relpath(path, self.folder)}")

        class NoteSteps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                note(f"step {state.global_step}")

        DEFAULT_CALLBACKS.append(NoteSteps)
        sys.addaudithook(on_event)


def _meaning(event: str, arguments: tuple[Any, ...]) -> tuple[str, str]:
    if event == "os.rename":
        return "rename", os.fspath(arguments[1])
    if event == "shutil.rmtree":
        return "remove", os.fspath(arguments[0])
    if event == "open" and isinstance(arguments[0], str) and set(arguments[1] or "") & set("wax"):
        return "write", arguments[0]
    return "", ""


class Forks:
    """The other end of a process that forks one process for each request, waits for it and says how it ended."""

    def __init__(self, connection: Connection, process: subprocess.Popen[bytes] | None = None) -> None:
        self.connection, self.process = connection, process

    @classmethod
    def start(cls) -> Forks:
        """Start a new interpreter that imports the libraries and serves until this process ends."""
        ours, theirs = socket.socketpair()
        code = f"from tests.forks import import_and_serve; import_and_serve({theirs.fileno()})"
        # Asking the driver itself for devices would make them unusable in forks.
        environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], cwd=ROOT, env=environment)
        theirs.close()
        return cls(Connection(ours.detach()), process)

    @classmethod
    def fork(cls) -> Forks:
        """Fork this process as it is now into one that serves until this one ends."""
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            _serve(Connection(theirs.detach()))
        theirs.close()
        return cls(Connection(ours.detach()))

    def run(
        self, words: Sequence[str], cwd: Path | str = ROOT, spy: Spy | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run what ``python WORDS`` would (``-m module`` or ``-c code``) to its end; a spied one leads a group."""
        self.connection.send((list(words), str(cwd), spy))
        result: subprocess.CompletedProcess[str] = self.connection.recv()
        return result

    def hfcompress(self, *words: object, spy: Spy | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``python -m hfcompress WORDS``."""
        return self.run(["-m", "hfcompress", *map(str, words)], spy=spy)

    def run_instead(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a Python process as ``subprocess.run`` would, but in the environment of the process that forks it."""
        done = self.run(command[1:], options.get("cwd") or os.getcwd())
        if not options.get("capture_output"):
            print(done.stdout, end="", flush=True)
            print(done.stderr, end="", file=sys.stderr, flush=True)
        if options.get("check"):
            done.check_returncode()
        return done

    def close(self) -> None:
        """End the serving process."""
        self.connection.close()
        if self.process is not None:
            self.process.wait()


def import_and_serve(descriptor: int) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    # A table of a thousand regular expressions, made when a process first opens a model and the same in each.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    gc.freeze()
    _serve(Connection(descriptor))


def _serve(requests: Connection) -> None:
    while True:
        try:
            words, cwd, spy = requests.recv()
        except EOFError:
            os._exit(0)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                requests.close()
                os.dup2(out.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                _become(words, cwd, spy)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            errors.seek(0)
            requests.send(subprocess.CompletedProcess(words, status, out.read().decode(), errors.read().decode()))


def _become(words: list[str], cwd: str, spy: Spy | None) -> None:
    """Run a program in this fresh fork and leave as an interpreter would."""
    status: object = 1
    try:
        if spy is not None:
            os.setsid()
            spy.watch()
        _fork_instead_of_starting()
        os.chdir(cwd)
        _run(words)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


def _run(words: list[str]) -> None:
    kind, program, *arguments = words
    if kind == "-m" or "from hfcompress" in program:
        # A run's own fresh interpreters would begin with the imports that are made here already.
        importlib.import_module("hfcompress.fresh").FreshProcesses = _Forked
    if kind == "-m":
        sys.argv = [program, *arguments]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *arguments]
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


class _Forked(nullcontext["_Forked"]):
    """``FreshProcesses`` by the ``subprocess.run`` that forks."""

    def __init__(self, *preload: str) -> None:
        super().__init__(self)

    def run(self, words: Sequence[str]) -> int:
        return subprocess.run([sys.executable, "-m", "hfcompress", *words], check=False).returncode


def _fork_instead_of_starting() -> None:
    """Let ``subprocess.run`` take its Python processes from a fork of this process, which has run nothing yet."""
    forks, start = Forks.fork(), subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return (forks.run_instead if command[0] == sys.executable else start)(command, **options)

    subprocess.run = run  # type: ignore[assignment]
