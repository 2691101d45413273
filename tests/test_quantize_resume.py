"""Finished layers outlive a kill: the run that goes on after them ends with the same bits, or says why it cannot."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

import hfcompress
from hfcompress.errors import CheckpointError, HFCompressError, OutputError
from hfcompress.packed import packed_layers
from hfcompress.quantization import calibrated
from tests.conftest import tiny_llama, token_batches
from tests.forks import Forks, Spy
from tests.runs import model_files, run_command, write_text
from tests.test_w8a8 import with_outliers

pytestmark = pytest.mark.usefixtures("forked")

GPTQ = hfcompress.GPTQ(group_size=32)
AWQ = hfcompress.AWQ(group_size=32)
SHAPE = ["--rows", "8", "--length", "32", "--group-size", "32"]


@pytest.fixture
def model_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "llama"
    tiny_llama(layers=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(tmp_path / "text.jsonl", rows=20)
    return folder


def quantize(model: Path, output: Path, *words: object) -> dict[str, Any]:
    text = model.parent / "text.jsonl"
    return dict(json.loads(run_command("quantize", model, "--data", text, *SHAPE, "-o", output, "--json", *words)))


@contextmanager
def counted_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Note how many linear layers share each call of GPTQ."""
    calls: list[int] = []
    real = calibrated.gptq_siblings

    def counted(weights: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(weights))
        return real(weights, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(calibrated, "gptq_siblings", counted)
        yield calls


def test_a_killed_command_goes_on_to_the_same_bits(
    model_dir: Path, tmp_path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(model_dir, tmp_path / "whole")
    output, partial = tmp_path / "killed", tmp_path / "killed.partial"
    words = ["quantize", model_dir, "--data", tmp_path / "text.jsonl", *SHAPE, "-o", output]
    spy = Spy(tmp_path, tmp_path.with_name("notes"), at="rename killed.partial/layers/model.layers.2.safetensors")
    run = forks.hfcompress(*map(str, words), spy=spy)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not output.exists()
    shards = sorted(path.name for path in (partial / "layers").glob("*.safetensors"))
    assert shards == ["model.layers.0.safetensors", "model.layers.1.safetensors"]
    with safe_open(partial / "layers" / shards[0], framework="pt") as shard:
        assert len(json.loads(shard.metadata()["rows"])) == 7

    with pytest.raises(OutputError, match=r"killed\.partial holds finished layers .* --resume .* --overwrite"):
        quantize(model_dir, output)
    with pytest.raises(OutputError, match="began otherwise: the options changed"):
        quantize(model_dir, output, "--resume", "--damping", "0.02")
    with counted_layers(monkeypatch) as calls:
        resumed = quantize(model_dir, output, "--resume")
    assert sum(calls) == 2 * 7
    assert model_files(output) == model_files(tmp_path / "whole")
    assert not partial.exists()
    for row, expected in zip(resumed["rows"], whole["rows"], strict=True):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    written = json.loads((output / "quantization_report.json").read_text(encoding="utf-8"))
    assert written == resumed
    assert {"name", "bits", "group_size", "relative_error", "damping", "tokens", "seconds"} <= set(written["rows"][0])


class StoppedError(Exception):
    """What a test raises in the middle."""


def stopped_after(layers: int, folder: Path, **options: Any) -> None:
    """Quantize a tiny Llama of four layers until some are finished."""
    seen: list[str] = []

    def stop(name: str, rows: Any) -> None:
        seen.append(name)
        if len(seen) == layers:
            raise StoppedError

    with pytest.raises(StoppedError):
        hfcompress.quantize(with_outliers(tiny_llama(layers=4)), shards=folder, on_layer=stop, **options)


@pytest.mark.parametrize(
    "method",
    [
        GPTQ,
        hfcompress.GPTQ(group_size=32, symmetric=False, head=True),
        hfcompress.GPTQ(group_size=32, quality="best"),
        AWQ,
        hfcompress.AWQ(group_size=32, symmetric=False, head=True, exclude=("*.gate_proj",)),
        hfcompress.SmoothQuant(exclude=("*.down_proj",)),
    ],
)
@pytest.mark.parametrize("finished", [1, 4])
def test_the_function_goes_on_from_its_folder(method: Any, finished: int, tmp_path: Path) -> None:
    data = {"calibration": token_batches(8)}
    stopped_after(finished, tmp_path / "shards", method=method, **data)
    resumed, whole = with_outliers(tiny_llama(layers=4)), with_outliers(tiny_llama(layers=4))
    report = hfcompress.quantize(resumed, method, shards=tmp_path / "shards", **data)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 4
    expected = hfcompress.quantize(whole, method, **data)
    for one, other in zip(report.rows, expected.rows, strict=True):
        assert replace(one, seconds=0) == replace(other, seconds=0)
    assert packed_layers(resumed).keys() == packed_layers(whole).keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert resumed.config.to_dict() == whole.config.to_dict()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": tiny_llama(layers=4, seed=1)}, "the model"),
        ({"method": AWQ}, "the options"),
        ({"method": hfcompress.GPTQ(group_size=32, bits=8)}, "the options"),
        ({"prune": hfcompress.SparseGPT()}, "the options"),
        ({"calibration": token_batches(8, seed=1)}, "the calibration data"),
    ],
)
def test_layers_of_another_run_are_refused(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    given = {"method": GPTQ, "calibration": token_batches(8)}
    stopped_after(1, tmp_path, **given)
    with pytest.raises(OutputError, match=f"began otherwise: {what} changed"):
        hfcompress.quantize(**{"model": with_outliers(tiny_llama(layers=4)), **given, **changes}, shards=tmp_path)


def test_a_damaged_layer_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    stopped_after(2, tmp_path, method=GPTQ, calibration=token_batches(8))
    file = tmp_path / "model.layers.1.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    model = with_outliers(tiny_llama(layers=4))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.safetensors is damaged.* Remove it"):
        hfcompress.quantize(model, GPTQ, token_batches(8), shards=tmp_path)
    assert not packed_layers(model)
    file.unlink()
    hfcompress.quantize(model, GPTQ, token_batches(8), shards=tmp_path)


@pytest.mark.parametrize("method", [AWQ, hfcompress.SmoothQuant()], ids=["awq", "smoothquant"])
def test_norms_that_a_finished_layer_brought_are_put_back_after_a_failure(method: Any, tmp_path: Path) -> None:
    stopped_after(2, tmp_path, method=method, calibration=token_batches(8))
    model = with_outliers(tiny_llama(layers=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = tmp_path / "model.layers.1.safetensors"
    with safe_open(file, framework="pt") as shard:
        assert not torch.equal(
            shard.get_tensor("input_layernorm.weight"), before["model.layers.1.input_layernorm.weight"]
        )
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.safetensors is damaged"):
        hfcompress.quantize(model, method, token_batches(8), shards=tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let the system refuse to write past so many bytes of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_stops_with_one_message_and_publishes_nothing(model_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    with files_up_to(20_000), pytest.raises(HFCompressError, match=r"model\.layers\.0 could not be written.*resume"):
        quantize(model_dir, output)
    assert not output.exists()
    assert [path.name for path in (tmp_path / "small.partial").rglob("*") if path.is_file()] == ["began.json"]
    with (
        files_up_to(60_000),
        pytest.raises(CheckpointError, match=r"small could not be written.*Nothing was changed"),
    ):
        quantize(model_dir, output, "--resume")
    assert not output.exists()
    assert len(list((tmp_path / "small.partial").rglob("*.safetensors"))) == 4
    quantize(model_dir, output, "--resume")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "small", "text.jsonl"]
