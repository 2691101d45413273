"""Something is always shown: lines where nobody watches a terminal, a moving display where somebody does."""

from __future__ import annotations

import importlib.machinery
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

import hfcompress
from hfcompress import AWQ, GPTQ, RTN, BitsAndBytes, DistillationTrainer, SmoothQuant, Wanda, progress
from hfcompress.calibration.texts import pack
from hfcompress.training import train
from tests.conftest import tiny_llama, token_batches, word_tokenizer
from tests.runs import WORDS
from tests.vocabularies import CASES


@contextmanager
def lines_come_by_themselves(capsys: pytest.CaptureFixture[str], expected: str) -> Iterator[list[str]]:
    """Wait inside a silent step until it has been reported twice."""
    lines: list[str] = []
    yield lines
    deadline = time.monotonic() + 30
    while sum(expected in line for line in lines) < 2:
        assert time.monotonic() < deadline, lines
        time.sleep(0.005)
        lines += capsys.readouterr().err.splitlines()


def test_a_long_step_that_cannot_be_counted_is_not_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    before = threading.active_count()
    with progress.busy("saving"), lines_come_by_themselves(capsys, "saving: 0:00") as lines:
        assert capsys.readouterr().err == "saving ...\n"
    assert lines
    assert threading.active_count() == before


def test_a_counted_step_that_does_not_advance_is_not_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    before = threading.active_count()
    with progress.meter("distill", 8) as shown:
        shown.advance(3, "loss 1.5")
        with lines_come_by_themselves(capsys, "distill: 3/8 in 0:00, 0:00 left  loss 1.5"):
            pass
    assert threading.active_count() == before


def test_reports_end_with_the_step_also_by_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    before = threading.active_count()
    with pytest.raises(ValueError, match="stopped"), progress.busy("saving"):
        raise ValueError("stopped")
    assert threading.active_count() == before


COUNTED = "meter('distill', 8) as shown:\n    for _ in range(3):\n        time.sleep(0.05)\n        shown.advance()"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo terminal")
@pytest.mark.parametrize(
    ("step", "expected"),
    [("busy('saving'):", rb"saving [-|/\\\\] 0:00:\d\d"), (COUNTED, rb"distill [^\r]* 3/8 0:00:\d\d left 0:0\d:\d\d")],
    ids=["busy", "meter"],
)
def test_a_terminal_shows_something_that_moves(step: str, expected: bytes) -> None:
    """The display is redrawn again and again while the step itself says nothing: the time, and what is left of it."""
    controller, terminal = os.openpty()
    code = f"import sys, time\nfrom hfcompress.progress import busy, meter\nwith {step}\n    sys.stdin.read()"
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=terminal, env=environment)
    os.close(terminal)
    seen = b""
    while len(re.findall(expected, seen)) < 3:
        seen += os.read(controller, 1024)
    process.communicate(b"")
    os.close(controller)
    assert process.returncode == 0


UPLOADING = """
import sys, time
from huggingface_hub.utils import tqdm_stream_file
from hfcompress.publish.hub import _uploading
with _uploading("me/small"), tqdm_stream_file(sys.argv[1]) as file:
    for _ in range(4):
        file.read(200)
        time.sleep(0.11)
    print("END", file=sys.stderr)
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo terminal")
def test_a_terminal_shows_how_much_of_an_upload_is_there(tmp_path: Path) -> None:
    """The Hub's client has a bar for it, with the time left: it moves in one line, as a display of ours lets none."""
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    command = [sys.executable, "-c", UPLOADING, str(tmp_path / "model.safetensors")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=terminal, env=environment)
    os.close(terminal)
    seen = b""
    while b"END" not in seen:
        seen += os.read(controller, 1024)
    process.communicate()
    os.close(controller)
    lines = seen.partition(b"END")[0].split(b"\n")
    assert sum(b"model.safetensors" in line for line in lines) == 1, lines
    assert re.search(rb"model\.safetensors: +80%.* 800/1\.00k \[00:\d\d<00:\d\d", seen), seen


ROWS = [{name: value[0] for name, value in batch.items()} for batch in token_batches(8, rows=1)]
QUIET: dict[str, Any] = {"num_train_epochs": 2, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


def finetune() -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(Trainer(tiny_llama(), TrainingArguments(folder, **QUIET), train_dataset=ROWS), "finetune")


def distil() -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = hfcompress.DistillationConfig(folder, **QUIET)
        train(DistillationTrainer(tiny_llama(), args, teacher_model=tiny_llama(), train_dataset=ROWS), "distill")


def cache_answers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        hfcompress.cache_teacher(tiny_llama(), ROWS, Path(folder) / "answers", batch_size=2)


def look_answers_up() -> None:
    with tempfile.TemporaryDirectory() as folder:
        answers = hfcompress.cache_teacher(tiny_llama(), ROWS, Path(folder) / "answers").folder
        args = hfcompress.DistillationConfig(folder, **QUIET)
        DistillationTrainer(tiny_llama(), args, teacher_model=answers, train_dataset=ROWS).train()


def prune_vocabulary() -> None:
    model, tokenizer = CASES["gpt2"].make()
    hfcompress.prune_vocabulary(model, tokenizer, ["the model"] * 8)


METERS: dict[str, Callable[[], object]] = {
    "Quantizing with GPTQ": lambda: hfcompress.quantize(tiny_llama(), GPTQ(group_size=32), token_batches()),
    "Quantizing with AWQ": lambda: hfcompress.quantize(tiny_llama(), AWQ(group_size=32), token_batches()),
    "Quantizing with SmoothQuant": lambda: hfcompress.quantize(tiny_llama(), SmoothQuant(), token_batches()),
    "Quantizing with RTN": lambda: hfcompress.quantize(tiny_llama(), RTN(bits=8)),
    "Quantizing with BitsAndBytes": lambda: hfcompress.quantize(tiny_llama(), BitsAndBytes()),
    "Pruning with Wanda": lambda: hfcompress.prune(tiny_llama(), Wanda(sparsity=0.5), token_batches()),
    "finetune": finetune,
    "distill": distil,
    "teacher answers": cache_answers,
    "teacher answers looked up": look_answers_up,
    "reading texts for their tokens": prune_vocabulary,
    "measuring the loss without each layer": lambda: hfcompress.drop_layers(
        tiny_llama(layers=4), hfcompress.DropLayers(keep=3, select="loss"), token_batches()
    ),
    "Measuring what bits are worth": lambda: hfcompress.quantize(
        tiny_llama(), GPTQ(bits="auto", average_bits=4.5, group_size=32), token_batches()
    ),
    "measure": lambda: hfcompress.measure(tiny_llama(), batches=token_batches(), metrics=["perplexity"]),
    "packing texts into rows of 16 tokens": lambda: pack(["the model"] * 600, word_tokenizer(WORDS), 16, 60),
}


@pytest.mark.usefixtures("few_tokens_are_fine")
@pytest.mark.parametrize("what", METERS)
def test_long_work_shows_how_much_time_is_left(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance_to = progress.Meter.advance_to

    def advance_and_print(meter: progress.Meter, done: int, note: str | None = None) -> None:
        advance_to(meter, done, note)
        meter._print_line()  # as the thread does every few seconds

    monkeypatch.setattr(progress.Meter, "advance_to", advance_and_print)
    METERS[what]()
    assert re.search(rf"^{what}: \d+/\d+ in \d+:\d\d, \d+:\d\d left", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_the_same_display_and_without_widgets_the_lines(
    widgets: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    output = type("Output", (), {"__enter__": lambda self: self, "__exit__": lambda *args: None})
    output.clear_output = lambda self, wait=False: None  # type: ignore[attr-defined]
    modules = {"IPython": {}, "IPython.display": {"display": lambda *found: shown.extend(map(_text_of, found))}}
    modules |= {"ipywidgets": {"Output": output}} if widgets else {}
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with progress.meter("Quantizing", 8) as bar:
        bar.advance(8, "layer 7")
    lines = capsys.readouterr().err
    assert (lines == "Quantizing ...\n") is not widgets
    assert any("Quantizing" in one and "8/8" in one and "layer 7" in one for one in shown) is widgets


def _text_of(found: Any) -> str:
    """Return what a notebook would show of one displayed thing."""
    return str(found._repr_mimebundle_([], [])["text/plain"]) if hasattr(found, "_repr_mimebundle_") else ""
