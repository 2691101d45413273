"""A folder's name stands for the old content or the new, whole, whenever a process is killed; one writes at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hfcompress.checkpoint import atomic
from hfcompress.checkpoint.atomic import MARKER, list_own_files, new_folder, recover, refuse_foreign
from hfcompress.checkpoint.locks import locked
from hfcompress.errors import OutputError
from tests.forks import Forks


def write(folder: Path, text: str) -> None:
    """Write a small result of ours, in two folders deep."""
    with new_folder(folder) as scratch:
        (scratch / MARKER).write_text("{}")
        (scratch / "weights").write_text(text)
        (scratch / "deeper").mkdir()
        (scratch / "deeper" / "file").write_text(text)


def content(folder: Path) -> tuple[str, str]:
    return (folder / "weights").read_text(), (folder / "deeper" / "file").read_text()


KILL_AT_EVERY_STEP = """
import json, os, signal, sys
from pathlib import Path
from hfcompress.checkpoint import atomic
from hfcompress.errors import HFCompressError
from tests.test_atomic import content, write

root, swap = Path(sys.argv[1]), sys.argv[2] == "swap"
if not swap:
    atomic._swap = lambda one, other: False
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def write_and_die(out, before):
    seen = 0
    def at_change(event, arguments):
        nonlocal seen
        if event in CHANGES and str(root) in str(arguments[0]):
            seen += 1
            if seen == before:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(at_change)
    write(out, "new")
    os._exit(0)

found, before = [], 0
while True:
    before += 1
    out = root / str(before) / "out"
    write(out, "old")
    child = os.fork()
    if child == 0:
        write_and_die(out, before)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    gone = not out.exists()
    atomic.recover(out)
    found.append([killed, gone, *content(out)])
    write(out, "next")
    assert content(out) == ("next", "next")
    assert [path.name for path in out.parent.iterdir()] == ["out"], list(out.parent.iterdir())
    if not killed:
        break
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("way", ["swap", "two renames"])
def test_a_kill_before_any_change_of_a_file_loses_nothing(way: str, tmp_path: Path, forks: Forks) -> None:
    """Each step of replacing a folder is the last one of some process; what it leaves is tidied up by the next."""
    run = forks.run(["-c", KILL_AT_EVERY_STEP, str(tmp_path), way])
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    states = [tuple(words) for _, _, *words in found]
    assert set(states) == {("old", "old"), ("new", "new")}
    assert states == sorted(states, reverse=True), "once the new content stands, it stays"
    assert [killed for killed, *_ in found].count(False) == 1
    assert len(found) > 10
    vanished = sum(gone for _, gone, *_ in found)
    if way == "two renames":
        assert vanished > 0, "the gap between the renames was not hit"
    elif sys.platform == "linux":
        assert vanished == 0, "the folder was missing for a moment"


def test_scratch_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as scratch:
        (scratch / MARKER).write_text("{}")
        recover(out)
        assert scratch.is_dir()
        with pytest.raises(OutputError, match=f"{out} is in use by another process"):
            write(out, "other")
        assert scratch.is_dir()
    assert (out / MARKER).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_hidden_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (".out.old", ".out", ".output.hfcompress-abc", ".out2.hfcompress-abc"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.hfcompress-abc").mkdir()
    write(tmp_path / "out", "new")
    assert {path.name for path in tmp_path.iterdir()} == {
        "out", ".out.old", ".out", ".output.hfcompress-abc", ".out2.hfcompress-abc",
    }  # fmt: skip


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, "old")
    monkeypatch.setattr(atomic, "_swap", lambda one, other: False)
    plain = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target) == out and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(atomic.CheckpointError, match=r"Input/output error\. Nothing was changed"):
        write(out, "new")
    assert content(out) == ("old", "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "disk" / "out") == ("new", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_everything_is_flushed_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    out = tmp_path / "out"
    plain = os.fsync

    def fsync(handle: int) -> None:
        flushed.append((os.path.realpath(f"/proc/self/fd/{handle}"), out.exists()))
        plain(handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell which file is flushed")
    monkeypatch.setattr(os, "fsync", fsync)
    write(out, "new")
    before = {Path(path).name for path, named in flushed if not named}
    assert {MARKER, "weights", "deeper", "file"} <= before
    assert flushed[-1] == (str(tmp_path), True)


@pytest.mark.parametrize("name", ["notes.txt", "deeper/notes.txt", ".hidden", "model-00001-of-00001.safetensors"])
def test_files_added_to_our_folder_are_not_lost(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    refuse_foreign(out)
    (out / name).write_text("years of work")
    with pytest.raises(OutputError, match=f"holds files that hfcompress did not write: {name}. Nothing was changed"):
        write(out, "new")
    assert content(out) == ("old", "old")
    assert (out / name).read_text() == "years of work"


def test_a_file_added_while_the_new_content_is_written_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    writing = new_folder(out)
    (writing.__enter__() / MARKER).write_text("{}")
    (out / "notes.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"did not write: notes\.txt"):
        writing.__exit__(None, None, None)
    assert (out / "notes.txt").read_text() == "years of work"
    assert content(out) == ("old", "old")


@pytest.mark.parametrize("marker", ["", "[]", "{}", '{"files": []}'])
def test_a_marker_without_the_list_makes_nothing_ours(marker: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    (out / MARKER).write_text(marker)
    with pytest.raises(OutputError, match="did not write: deeper/file, weights"):
        write(out, "new")


def test_files_that_hfcompress_adds_later_are_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    (out / "README.md").write_text("a card")
    list_own_files(out, ["README.md"])
    write(out, "new")
    assert content(out) == ("new", "new")
    list_own_files(tmp_path, ["README.md"])
    assert not (tmp_path / MARKER).exists()


HOLD = """
import sys, time
from pathlib import Path
from hfcompress.checkpoint.locks import locked
with locked(Path(sys.argv[1]), "it") as held:
    print(held, flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    file = tmp_path / "folder" / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with pytest.raises(OutputError, match=r"^it is in use by another process\. Wait until that ends"):
            locked(file, "it").__enter__()
        assert file.exists()
        process.send_signal(signal.SIGKILL)
    assert file.exists()
    with locked(file, "it") as held:
        assert held
    assert not file.exists()


def test_a_lock_file_removed_by_its_holder_is_not_mistaken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, its holder may end, and another process may make a new file."""
    fcntl = pytest.importorskip("fcntl")
    file = tmp_path / "lock"
    plain, calls = fcntl.flock, 0

    def flock(handle: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            file.unlink()
            file.touch()
        plain(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(file, "it"), pytest.raises(OutputError):
        locked(file, "it").__enter__()
    assert calls == 3


def test_where_there_are_no_locks_it_is_said_and_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from hfcompress.checkpoint import locks

    monkeypatch.setattr(locks, "fcntl", None)
    (tmp_path / ".out.hfcompress-abc").mkdir()
    write(tmp_path / "out", "new")
    assert content(tmp_path / "out") == ("new", "new")
    write(tmp_path / "deeper" / "out", "new")
    assert content(tmp_path / "deeper" / "out") == ("new", "new")
    assert f"{tmp_path / 'out'} cannot be locked on this system" in capfd.readouterr().err
    assert (tmp_path / ".out.hfcompress-abc").is_dir(), "whether it is in use cannot be known"
