"""Commands in fresh interpreters: each its own, and none is left behind however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hfcompress.fresh import FreshProcesses


def test_a_command_ends_with_its_own_status_and_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with FreshProcesses() as running:
        assert running.run(["--help"]) == 0
        assert running.run(["eval", str(tmp_path / "none")]) == 1
        assert running.run(["eval", "--no-such-option"]) == 2
    out, errors = capfd.readouterr()
    assert "Compress Hugging Face models" in out
    assert f"hfcompress: No such checkpoint folder: {tmp_path / 'none'}." in errors
    assert "No such option" in errors


def test_measures_as_a_new_interpreter_does(finished: Path, tmp_path: Path) -> None:
    """Same metrics and sizes; a peak that holds the libraries, and nothing that an earlier command needed."""
    measured = []
    with FreshProcesses("hfcompress.measuring") as running:
        for name in ("first", "second"):
            assert running.run(["eval", str(finished), "--output", str(tmp_path / name), "--quiet"]) == 0
            measured.append(json.loads((tmp_path / name).read_text()))
    command = [sys.executable, "-m", "hfcompress", "eval", str(finished), "--json"]
    measured.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    for one in measured:
        assert {k: one[k] for k in ("metrics", "parameters", "nonzero", "bytes_on_disk")} == {
            k: measured[-1][k] for k in ("metrics", "parameters", "nonzero", "bytes_on_disk")
        }
        assert one["peak_memory_bytes"] == pytest.approx(measured[-1]["peak_memory_bytes"], rel=0.25)


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """A command that waits for ever: its recipe is a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "recipe.yaml")
    return ["validate", str(tmp_path / "recipe.yaml")]


def test_a_killed_command_ends_alone(endless: list[str]) -> None:
    with FreshProcesses() as running, ThreadPoolExecutor() as threads:
        command = running.spare
        status = threads.submit(running.run, endless)
        os.kill(command, signal.SIGKILL)
        assert status.result() == -signal.SIGKILL
        assert running.run(["--help"]) == 0


def test_ctrl_c_is_for_the_command_and_not_for_the_one_that_waits() -> None:
    with FreshProcesses() as running:
        time.sleep(2)  # until it waits
        os.kill(running.spare, signal.SIGINT)
        assert running.run(["--help"]) == 0


def test_the_one_that_waits_ends_with_the_process_that_started_it() -> None:
    code = (
        "import os\nfrom hfcompress.fresh import FreshProcesses\n"
        "print(FreshProcesses().spare, flush=True)\nos.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    spare = Path("/proc") / killed.stdout.strip()
    deadline = time.monotonic() + 60
    while spare.exists():
        assert time.monotonic() < deadline, "still there a minute later"
        time.sleep(0.01)
