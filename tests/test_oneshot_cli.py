"""``hfcompress prune`` writes a verified sparse checkpoint, or says what is wrong and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hfcompress.cli import app
from hfcompress.errors import HFCompressError
from hfcompress.structure import stack_linears
from tests.runs import write_text


def test_a_checkpoint_is_pruned_and_reloads(llama_dir: Path, tmp_path: Path) -> None:
    text, output = write_text(tmp_path / "text.jsonl"), tmp_path / "sparse"
    words = ["prune", str(llama_dir), "--method", "sparsegpt", "--pattern", "2:4", "--data", str(text), "--rows", "8"]
    words += ["--length", "32", "--exclude", "*.o_proj", "-o", str(output), "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["method"], report["sparsity"], len(report["rows"])) == ("sparsegpt", 0.5, 12)
    assert {row["tokens"] for row in report["rows"]} == {8 * 32}
    model = AutoModelForCausalLM.from_pretrained(output)
    for name, module in stack_linears(model).items():
        kept = (module.weight != 0).view(len(module.weight), -1, 4).sum(-1).unique()
        assert torch.equal(kept, torch.tensor([4 if name.endswith("o_proj") else 2])), name
    assert len(AutoTokenizer.from_pretrained(output)) == len(AutoTokenizer.from_pretrained(llama_dir))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "wnda"], r"method: 'wnda' is not one of magnitude, wanda, sparsegpt \(wanda\?\)"),
        (["--sparsity", "1.5"], r"sparsity: must be less than 1, not 1\.5"),
        (["--method", "magnitude", "--rows", "8"], "calibration_rows: method magnitude needs no calibration data"),
        (["--task", "causal"], "Unknown task 'causal'. Did you mean 'causal-lm'"),
        ([], "Wanda needs calibration text: give --data a file or a dataset"),
        (["--data", "text.jsonl", "--text-column", "txt"], r"has no column 'txt'. Did you mean 'text'"),
        (["--data", "text.jsonl", "--length", "100000"], "text.jsonl has less than 100000 tokens of text"),
        (["--method", "magnitude", "--exclude", "*"], "No weight matches"),
        (["--method", "magnitude", "-o", "."], "exists and was not written by hfcompress"),
    ],
)
def test_faults_are_told_and_nothing_is_written(
    words: list[str], message: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.jsonl")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    output = [] if "-o" in words else ["-o", "sparse"]
    with pytest.raises(HFCompressError, match=message):
        CliRunner().invoke(app, ["prune", str(llama_dir), *words, *output], catch_exceptions=False)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
