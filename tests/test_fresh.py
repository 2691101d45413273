"""Commands in fresh processes: each its own, none with what another left, however they and their server end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hfcompress import fresh
from hfcompress.fresh import FreshProcesses

pytestmark = pytest.mark.skipif(not fresh.forks_are_safe(), reason="an accelerator's driver does not survive a fork")


@pytest.fixture(scope="module")
def processes() -> Iterator[FreshProcesses]:
    with FreshProcesses("hfcompress.measuring") as running:
        yield running


def test_a_command_ends_with_its_own_status_and_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with FreshProcesses() as running:
        assert running.run(["validate", "sst2_minilm"]) == 0
        assert running.run(["eval", str(tmp_path / "none")]) == 1
        assert running.run(["eval", "--no-such-option"]) == 2
    out, errors = capfd.readouterr()
    assert "sst2_minilm is valid" in out
    assert f"hfcompress: No such checkpoint folder: {tmp_path / 'none'}." in errors
    assert "No such option" in errors


def test_measures_as_a_new_interpreter_does(processes: FreshProcesses, finished: Path, tmp_path: Path) -> None:
    """Same metrics and sizes; a peak that holds the libraries, and nothing that an earlier command needed."""
    measured = []
    for name in ("first", "second"):
        assert processes.run(["eval", str(finished), "--output", str(tmp_path / name), "--quiet"]) == 0
        measured.append(json.loads((tmp_path / name).read_text()))
    command = [sys.executable, "-m", "hfcompress", "eval", str(finished), "--json"]
    measured.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    for one in measured:
        assert {k: one[k] for k in ("metrics", "parameters", "nonzero", "bytes_on_disk")} == {
            k: measured[-1][k] for k in ("metrics", "parameters", "nonzero", "bytes_on_disk")
        }
        assert one["peak_memory_bytes"] == pytest.approx(measured[-1]["peak_memory_bytes"], rel=0.25)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def waiting_command(server: int) -> int:
    """Return the process of the command that the server runs, once it is there."""
    deadline = time.monotonic() + 60
    while not children(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return children(server)[0]


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """A command that waits for ever: its recipe is a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "recipe.yaml")
    return ["validate", str(tmp_path / "recipe.yaml")]


def test_a_killed_command_ends_alone(endless: list[str]) -> None:
    with FreshProcesses() as running, ThreadPoolExecutor() as threads:
        status = threads.submit(running.run, endless)
        os.kill(waiting_command(running.server), signal.SIGKILL)
        assert status.result() == -signal.SIGKILL
        assert running.run(["validate", "sst2_minilm"]) == 0


def test_a_killed_server_is_a_failure_and_no_hang(endless: list[str]) -> None:
    with FreshProcesses() as running, ThreadPoolExecutor() as threads:
        status = threads.submit(running.run, endless)
        command = waiting_command(running.server)
        os.kill(running.server, signal.SIGKILL)
        os.kill(command, signal.SIGKILL)
        assert status.result() == -signal.SIGKILL
        assert running.run(["validate", "sst2_minilm"]) == -signal.SIGKILL


def test_ctrl_c_ends_the_command_and_not_the_server(endless: list[str]) -> None:
    with FreshProcesses() as running, ThreadPoolExecutor() as threads:
        status = threads.submit(running.run, endless)
        command = waiting_command(running.server)
        time.sleep(0.5)  # until it waits for its pipe
        for process in (running.server, command):
            os.kill(process, signal.SIGINT)
        assert status.result() != 0
        assert running.run(["validate", "sst2_minilm"]) == 0


def test_the_server_ends_with_the_process_that_started_it() -> None:
    code = (
        "import os\nfrom hfcompress.fresh import FreshProcesses\n"
        "running = FreshProcesses()\nrunning.run(['validate', 'sst2_minilm'])\n"
        "print(running.server, flush=True)\nos.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    server = Path("/proc") / killed.stdout.split()[-1]
    deadline = time.monotonic() + 60
    while server.exists():
        assert time.monotonic() < deadline, "still there a minute later"
        time.sleep(0.01)
