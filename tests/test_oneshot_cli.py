"""``hfcompress prune`` writes a verified sparse checkpoint, or says what is wrong and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hfcompress.checkpoint import inspect_checkpoint
from hfcompress.errors import HFCompressError, ModelError, OutputError
from hfcompress.structure import stack_linears
from tests.conftest import tiny_bert
from tests.runs import run_command, write_text

pytestmark = pytest.mark.usefixtures("forked")

MAGNITUDE = ["--method", "magnitude", "--sparsity"]


def prune(model: object, *words: object) -> str:
    return run_command("prune", model, *words)


def modified(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_checkpoint_is_pruned_and_reloads(llama_dir: Path, tmp_path: Path) -> None:
    text, output = write_text(tmp_path / "text.jsonl"), tmp_path / "sparse"
    words = ["--method", "sparsegpt", "--pattern", "2:4", "--data", text, "--rows", "8", "--length", "32"]
    report = json.loads(prune(llama_dir, *words, "--exclude", "*.o_proj", "-o", output, "--json"))
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
        (
            ["--data", "text.jsonl", "--length", "32", "--text-column", "txt"],
            r"has no column 'txt'. Did you mean 'text'",
        ),
        (["--data", "text.jsonl", "--length", "128"], "text.jsonl has less than 128 tokens of text"),
        (["--method", "magnitude", "--exclude", "*"], "No weight matches"),
        (["--data", "text.jsonl", "--length", "129"], r"\(--length\) is 129 tokens, but '.*llama' takes at most 128"),
        (["--method", "magnitude", "-o", "."], "exists and was not written by hfcompress"),
    ],
)
def test_faults_are_told_and_nothing_is_written(
    words: list[str], message: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.jsonl", rows=2)
    before = modified(tmp_path)
    output = [] if "-o" in words else ["-o", "sparse"]
    with pytest.raises(HFCompressError, match=message):
        prune(llama_dir, *words, *output)
    assert modified(tmp_path) == before


def test_a_finished_result_is_replaced_only_when_asked(llama_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "sparse"
    prune(llama_dir, *MAGNITUDE, 0.25, "-o", output)
    before = modified(tmp_path)
    with pytest.raises(OutputError, match=r"sparse holds a finished result.*--overwrite"):
        prune(llama_dir, *MAGNITUDE, 0.75, "-o", output)
    assert modified(tmp_path) == before
    prune(llama_dir, *MAGNITUDE, 0.75, "-o", output, "--overwrite")
    assert zeros(output) == pytest.approx(0.75, abs=0.01)


def zeros(folder: Path) -> float:
    layers = inspect_checkpoint(folder).layers
    return 1 - sum(layer.nonzero for layer in layers) / sum(layer.parameters for layer in layers)


@pytest.mark.parametrize("source", ["sparse", "sparse/../sparse", "link"])
def test_the_model_is_never_replaced_by_its_own_result(source: str, llama_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "sparse"
    prune(llama_dir, *MAGNITUDE, 0.25, "-o", output)
    (tmp_path / "link").symlink_to(output)
    before = modified(tmp_path)
    with pytest.raises(OutputError, match="sparse holds the model that is to be compressed"):
        prune(tmp_path / source, *MAGNITUDE, 0.75, "-o", output, "--overwrite")
    assert modified(tmp_path) == before


@pytest.mark.parametrize("words", [["-o", "~/sparse"], ["--output=~/sparse"]])
def test_the_home_folder_is_found_without_a_shell(
    words: list[str], llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(tmp_path)
    write_text(home / "text.jsonl")
    table = prune(llama_dir, "--data", "~/text.jsonl", "--rows", 4, "--length", 32, "--sparsity", 0.5, *words)
    assert "LlamaForCausalLM" in table
    assert zeros(home / "sparse") == pytest.approx(0.5, abs=0.01)
    assert not (tmp_path / "~").exists()


def test_a_classifier_is_pruned_with_its_head(bert_dir: Path, tmp_path: Path) -> None:
    prune(bert_dir, "--task", "sequence-classification", *MAGNITUDE, 0.5, "-o", tmp_path / "sparse")
    heads = [
        load_file(folder / "model.safetensors")["classifier.weight"] for folder in (bert_dir, tmp_path / "sparse")
    ]
    assert torch.equal(*heads)


def test_a_new_classification_head_is_not_saved_as_if_trained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_bert().bert.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    with pytest.raises(
        ModelError, match=r"encoder' has no trained head for sequence-classification.* a finetune stage"
    ):
        prune(tmp_path / "encoder", "--task", "sequence-classification", *MAGNITUDE, 0.5, "-o", tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


def test_texts_longer_than_a_classifier_takes_are_cut_to_the_length_asked_for(bert_dir: Path, tmp_path: Path) -> None:
    """The tokens that Wanda counted are those of whole rows of 64, the longest that this model takes."""
    text = write_text(tmp_path / "text.jsonl", rows=4, words=100)
    words = ["--task", "sequence-classification", "--data", text, "--sparsity", 0.5, "-o", tmp_path / "sparse"]
    with pytest.raises(HFCompressError, match=r"\(--length\) is 512 tokens, but '.*bert' takes at most 64"):
        prune(bert_dir, *words)
    report = json.loads(prune(bert_dir, *words, "--length", 64, "--json"))
    assert {row["tokens"] for row in report["rows"]} == {4 * 64}
