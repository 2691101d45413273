"""``hfcompress quantize`` takes every method's options and writes a verified checkpoint, or says what is wrong."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfcompress
from hfcompress import opening
from hfcompress.errors import HFCompressError
from hfcompress.packed import packed_layers
from hfcompress.publish import load_facts
from hfcompress.publish.card import is_as_written, technique_tags
from hfcompress.publish.hub import check_card
from hfcompress.publish.pictures import bits_rows
from hfcompress.recipe import METHODS, ModelSpec, options_beside_method
from tests.forks import Forks
from tests.runs import model_files, run_command, write_text

pytestmark = pytest.mark.usefixtures("forked")

SHAPE = ["--rows", "8", "--length", "32"]


def quantize(model: object, *words: object) -> str:
    return run_command("quantize", model, *words)


@pytest.mark.parametrize("kind", METHODS)
def test_every_option_of_every_method_is_in_the_help(kind: str) -> None:
    shown = run_command(kind, "--help")
    for method in METHODS[kind].values():
        names = [*(field.name for field in fields(method)), *options_beside_method(kind, method)]
        assert [name for name in names if f"--{name.replace('_', '-')}"[:18] not in shown] == []


def test_a_checkpoint_is_quantized_by_the_options_given(llama_dir: Path, tmp_path: Path) -> None:
    text, output = write_text(tmp_path / "text.jsonl"), tmp_path / "small"
    words = ["--bits", 4, "--group-size", 32, "--no-symmetric", "--exclude", "*.self_attn.*", "--exclude", "*.1.*"]
    report = json.loads(quantize(llama_dir, *words, "--data", text, *SHAPE, "-o", output, "--json"))
    rows = {row["name"]: row for row in report["rows"]}
    assert (report["method"], list(rows)) == (
        "gptq",
        [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")],
    )
    assert {(row["bits"], row["group_size"], row["tokens"]) for row in rows.values()} == {(4, 32, 8 * 32)}
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["symmetric"] is False
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (llama_dir, output))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        f"{name}.weight" for name in rows
    ]


def test_bits_are_chosen_for_each_layer(llama_dir: Path, tmp_path: Path) -> None:
    text, output = write_text(tmp_path / "text.jsonl"), tmp_path / "mixed"
    words = ["--bits", "auto", "--choices", 3, "--choices", 8, "--group-size", 32, "--data", text, *SHAPE]
    with pytest.raises(HFCompressError, match=r"average_bits=9\.9 is out of reach: with 3 to 8 bits a code"):
        quantize(llama_dir, *words, "--average-bits", "9.9", "-o", output)
    with pytest.raises(HFCompressError, match="bits='auto' needs one target, either average_bits or megabytes"):
        quantize(llama_dir, *words, "-o", output)
    assert not output.exists()
    report = json.loads(quantize(llama_dir, *words, "--average-bits", 6.5, "-o", output, "--json"))
    assert {row["bits"] for row in report["rows"]} == {3, 8}
    method = hfcompress.GPTQ(bits="auto", average_bits=6.5, choices=(3, 8), group_size=32)
    config = method.as_config(str(text), rows=8, length=32)
    model = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=config)
    assert {name: one.bits for name, one in packed_layers(model).items()} == {
        row["name"]: row["bits"] for row in report["rows"]
    }


def test_the_result_has_a_card_with_the_command_that_makes_it_again(llama_dir: Path, tmp_path: Path) -> None:
    text, output = write_text(tmp_path / "text.jsonl"), tmp_path / "small"
    words = ["--bits", 4, "--group-size", 32, "--no-symmetric", "--exclude", "*.down_proj", "--exclude", "*.1.*"]
    shown = quantize(llama_dir, *words, "--prune", "{sparsity: 0.5}", "--data", text, *SHAPE, "-o", output)
    assert f"Model card: {output / 'README.md'}" in shown
    card = (output / "README.md").read_text(encoding="utf-8")
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (llama_dir, output)]
    facts = load_facts(output)
    assert [one.measurement.bytes_on_disk for one in facts.stages] == sizes
    assert [one.measurement.metrics for one in facts.stages] == [{}, {}]
    assert f"{sizes[0] / sizes[1]:.2f} times smaller on disk" in card
    assert "No metrics are given: the command measures no quality, `hfcompress eval` does." in card
    assert "Calibrated on one choice of rows: how far others lie apart was not measured." in card
    assert "seed" not in card.lower()
    assert "Counted in the weight files, of which none was run; stored in float32 (original), float32, int4" in card
    assert "unrecorded" not in card
    assert "- Any quality: tasks," in card
    assert "base_model" not in card  # a folder is nobody's id
    assert "| stage | latency" not in card
    assert {"quantized", "pruned"} <= set(technique_tags(facts))
    check_card(output)
    assert is_as_written(output)
    # Of paths, others read the last part alone.
    code = card[card.index("## Make it again") :].split("```bash\n")[1].split("\n```")[0]
    again = [{"llama": str(llama_dir), "small": str(tmp_path / "again"), "text.jsonl": str(text)}.get(word, word)
             for word in shlex.split(code)]  # fmt: skip
    run_command(*again[1:])
    assert model_files(tmp_path / "again") == model_files(output)
    quantize(llama_dir, *words, "--data", text, *SHAPE, "-o", output, "--overwrite")
    assert technique_tags(load_facts(output)) == ["quantized"]


def test_a_checkpoint_and_its_card_are_there_together_or_not_at_all(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "small"
    words = ["--method", "rtn", "--group-size", 32, "-o", output]
    with monkeypatch.context() as broken:
        broken.setattr("hfcompress.oneshot.write_model_card", interrupted)
        with pytest.raises(HFCompressError, match="Interrupted"):
            quantize(llama_dir, *words)
        assert not output.exists()
    quantize(llama_dir, *words, "--bits", 8)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    assert {"README.md", "measurements.json"} <= before.keys()
    monkeypatch.setattr("hfcompress.oneshot.write_model_card", interrupted)
    with pytest.raises(HFCompressError, match="Interrupted"):
        quantize(llama_dir, *words, "--overwrite")
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_card_of_bits_for_each_layer_shows_them_in_a_picture(llama_dir: Path, tmp_path: Path) -> None:
    text, output = write_text(tmp_path / "text.jsonl"), tmp_path / "mixed"
    words = ["--bits", "auto", "--average-bits", 5.5, "--group-size", 32, "--data", text, *SHAPE]
    report = json.loads(quantize(llama_dir, *words, "-o", output, "--json"))
    shown = {f"model.layers.{layer}.{place}": bits for place, cells in bits_rows(load_facts(output)).items()
             for layer, bits in cells.items()}  # fmt: skip
    assert shown == {row["name"]: row["bits"] for row in report["rows"]}
    assert "![Bits of each linear layer](bits.png)" in (output / "README.md").read_text(encoding="utf-8")
    assert (output / "bits.png").read_bytes().startswith(b"\x89PNG")
    quantize(llama_dir, "--method", "rtn", "--group-size", 32, "-o", output, "--overwrite")
    assert not (output / "bits.png").exists()  # all have the same


def test_the_card_of_zeros_says_what_was_pruned(llama_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "sparse"
    run_command("prune", llama_dir, "--method", "magnitude", "--sparsity", 0.5, "-o", output)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "| prune | Magnitude, 50.0% of the targeted weights pruned |" in card
    rows = load_facts(output).pruning_report
    assert len(rows) == 14
    assert all(row["name"] in card for row in rows)
    assert "Calibrated on" not in card
    assert technique_tags(load_facts(output)) == ["pruned"]
    check_card(output)


def test_before_counts_only_where_the_models_own_files_are_here(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = {"me/here": str(llama_dir / "config.json")}
    monkeypatch.setattr(opening, "try_to_load_from_cache", lambda name, file, revision: cached.get(name))
    found = [opening.files_of(ModelSpec(id=name)) for name in (str(llama_dir), "me/here", "me/elsewhere")]
    assert found == [llama_dir, llama_dir, None]


def test_the_command_does_what_the_function_does(llama_dir: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "text.csv", tmp_path / "sparse"
    Dataset.from_json(str(write_text(tmp_path / "text.jsonl"))).to_csv(str(file))
    words = ["--group-size", 32, "--prune", "{sparsity: 0.5, pattern: '2:4'}", "--data", file, *SHAPE]
    quantize(llama_dir, *words, "-o", output)
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    batches = hfcompress.calibration_batches(file, AutoTokenizer.from_pretrained(llama_dir), rows=8, length=32)
    prune = hfcompress.SparseGPT(sparsity=0.5, pattern="2:4")
    hfcompress.quantize(model, hfcompress.GPTQ(group_size=32), batches, prune=prune)
    expected = {name: module.dequantize() for name, module in packed_layers(model).items()}
    written = AutoModelForCausalLM.from_pretrained(output)
    assert len(expected) == 14
    assert all(torch.equal(written.get_submodule(name).weight, one) for name, one in expected.items())


def test_a_datasets_id_gives_the_rows_of_its_train_split(llama_dir: Path, tmp_path: Path) -> None:
    """A folder's name is opened as an id is, without the Hub."""
    place = tmp_path / "corpus"
    place.mkdir()
    text = write_text(place / "train.jsonl")
    write_text(place / "test.jsonl", rows=3)
    for name, data in (("id", place), ("file", text)):
        quantize(llama_dir, "--group-size", 32, "--data", data, *SHAPE, "-o", tmp_path / name)
    assert model_files(tmp_path / "id") == model_files(tmp_path / "file")


def test_a_method_without_data_warns_in_one_line_and_is_not_repeated(
    llama_dir: Path, tmp_path: Path, forks: Forks
) -> None:
    run = forks.hfcompress("quantize", llama_dir, "--method", "rtn", "--group-size", 128, "-o", tmp_path / "small")
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if "Group sizes" in line]
    assert len(lines) == 1
    assert lines[0].startswith("hfcompress: Group sizes that do not divide the input columns were changed: 128 -> 64")
    assert "8.5" in run.stdout  # bits per weight: 8, and 32 of a scale for 64 columns
    with pytest.raises(HFCompressError, match="LlamaForCausalLM is quantized already; load the dense checkpoint"):
        quantize(tmp_path / "small", "--method", "rtn", "-o", tmp_path / "smaller")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gptw"], r"method: 'gptw' is not one of rtn, gptq.* \(gptq\?\)"),
        (["--bits", "5", "--damping", "2"], r"(?s)2 faults.*bits: 5 is not one of 2, 3, 4, 8.*damping: must be less"),
        (["--bits", "four"], "bits: 'four' is not one of"),
        (["--group-size", "7"], "group_size: must be at least 8, not 7"),
        (["--method", "rtn", "--rows", "8"], "calibration_rows: method rtn needs no calibration data"),
        (["--method", "rtn", "--damping", "0.1"], r"unknown option 'damping'"),
        (["--prune", "{sparsity: 2}"], r"prune\.sparsity: must be less than 1"),
        ([], "GPTQ needs calibration text: give --data a file or a dataset"),
        (["--data", "absent/name", "--length", "32"], "Data 'absent/name' cannot be opened"),
        (["--data", "text.jsonl", "--length", "129"], r"\(--length\) is 129 tokens, but '.*llama' takes at most 128"),
        (["--data", "text.jsonl", "--length", "128"], "text.jsonl has less than 128 tokens"),
        (["--data", "text.jsonl", "--exclude", "*"], "leaves no linear layer of LlamaForCausalLM"),
        (["--data", "text.jsonl", "--exclude", "*.q_prj"], r"'\*\.q_prj' matches no module of LlamaForCausalLM"),
        (["--method", "bitsandbytes", "--low-memory"], "--low-memory .* bitsandbytes takes the whole dense model"),
        (["--method", "rtn", "-o", "."], "exists and was not written by hfcompress"),
    ],
)
def test_faults_are_told_before_any_weight_is_loaded(
    words: list[str], message: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.jsonl", rows=2)
    monkeypatch.delattr(opening, "open_model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HFCompressError, match=message):
        quantize(llama_dir, *words, *([] if "-o" in words else ["-o", "small"]))
    assert sorted(tmp_path.rglob("*")) == before
