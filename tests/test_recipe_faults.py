"""What is wrong with a recipe is said in exact words, with its place and its line."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfcompress.errors import RecipeError
from hfcompress.recipe import (
    TASKS,
    bundled_recipes,
    load_recipe,
    parse_recipe,
)
from tests.test_recipe import BUNDLED, PLAIN, with_stages, write

PYDANTIC_WORDS = ("Input should", "pydantic", "alidation error", "Value error", "RTN", "GPTQ", "another type")


def faults(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the message, after checking that the first names the file and the number of faults."""
    file = write(folder, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    head, *rows = str(caught.value).split("\n")
    assert head == f"{file} has {len(rows)} fault{'' if len(rows) == 1 else 's'}:"
    assert all(row.startswith("  ") for row in rows)
    assert not any(
        word in str(caught.value) for word in ("Input should", "pydantic", "validation error", "RTN", "GPTQ")
    )
    return [row.strip() for row in rows]


def test_five_faults_are_reported_at_once(tmp_path: Path) -> None:
    text = """\
name: five
task: causal-lm
model: {id: a/b, dtype: bfloat}
data: {id: c/d}
seed: -1
stages:
  - distill:
      teacher: original
      steps: 60
      prune:
        end: 0.6
        sparsty: 0.3
      training: {lerning_rate: 1}
  - quantize: {method: rtn, bits: 5}
"""
    file = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert (
        str(caught.value)
        == f"""\
{file} has 5 faults:
  line 3, model.dtype: 'bfloat' is not one of auto, float32, bfloat16, float16 (bfloat16?)
  line 5, seed: must be at least 0, not -1
  line 12, stages[0].distill.prune: unknown option 'sparsty' (sparsity?)
  line 13, stages[0].distill.training: unknown option 'lerning_rate' (learning_rate?)
  line 14, stages[1].quantize.bits: 5 is not one of 2, 3, 4, 8"""
    )


def test_an_option_under_two_names_and_faults_of_the_other_name(tmp_path: Path) -> None:
    text = """\
name: two
task: causal-lm
model: {id: a/b}
data:
  files: a.txt
  train_file: b.txt
  max_train_rows: 5
  max_train_samples: 6
  eval_split_name: a
  validation_split_name: a
  max_eval_samples: 0
  max_seq_length: 4
  max_seq_lenght: 4
stages:
  - finetune: {steps: 1}
"""
    assert faults(tmp_path, text) == [
        "line 6, data.train_file: means data.files.train, but data.files is given too: take one out",
        "line 8, data.max_train_samples: means data.max_train_rows, but data.max_train_rows is given too: "
        "take one out",
        "line 9, data.eval_split_name: means data.splits.held_out, but data.validation_split_name is given too: "
        "take one out",
        "line 11, data.max_eval_samples: must be at least 1, not 0",
        "line 12, data.max_seq_length: is for masked-lm, sequence-classification, token-classification, "
        "question-answering, multiple-choice, sentence-embeddings only; this recipe's task is causal-lm",
        "line 13, data: unknown option 'max_seq_lenght' (max_seq_length?)",
    ]


WHOLE_FILES = {
    "": "line 1: the file is empty",
    "# only a comment\n": "line 1: the file is empty",
    "- a\n- b\n": "must be a mapping with name, task, model, data and stages, not a list",
    "just text": "must be a mapping with name, task, model, data and stages, not 'just text'",
    "name: x\ntask: [a\nmodel: b\n": "line 3: not valid YAML: expected ',' or ']', but got ':'",
    "name: x\n\ttask: y\n": "line 2: not valid YAML: found character '\\t' that cannot start any token",
    "name: !!python/name:os.system\n": "line 1: not valid YAML: could not determine a constructor for the tag "
    "'tag:yaml.org,2002:python/name:os.system'",
    "name: x\n---\nname: y\n": "line 2: not valid YAML: but found another document",
    "name: 2024-13-01\n": "line 1: not valid YAML: month must be in 1..12",
    "name: x\ntask: a\x00b\n": "line 2: not valid YAML: character '\\x00' is not allowed",
    "name: x\nmodel: &m {id: *m}\n": "line 2: not valid YAML: an alias that contains itself",
    "[" * 5000: "line 1: not valid YAML: nested too deeply",
}


@pytest.mark.parametrize("text", WHOLE_FILES, ids=lambda text: repr(text[:12]))
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    assert faults(tmp_path, text) == [WHOLE_FILES[text]]


# What replaces what in PLAIN, and the fault that it makes.
REPLACED = [
    ("name: plain", "nam: plain", ["'name' is missing", "line 1: unknown option 'nam' (name?)"]),
    ("name: plain", "name: 5", ["line 1, name: must be text, not 5: put it in quotes"]),
    ("name: plain", "name: 2024-01-01", ["line 1, name: must be text, not 2024-01-01: put it in quotes"]),
    ("name: plain", "name: /", ["line 1, name: '/' must begin with a letter or digit and hold only letters, digits, "
                                "'.', '_' and '-'"]),
    ("name: plain", "name:", ["line 1, name: must be text, but is empty"]),
    ("task: causal-lm\n", "", ["'task' is missing"]),
    ("causal-lm", "causallm",
     [f"line 2, task: 'causallm' is not one of {', '.join(TASKS)} (causal-lm?)"]),
    ("causal-lm", "audio-classification",
     [f"line 2, task: task 'audio-classification' is not there yet; known: {', '.join(TASKS)}"]),
    ("causal-lm", "text-generation", ["line 2, task: task 'text-generation' is called causal-lm here"]),
    ("causal-lm", "[a]", ["line 2, task: must be text, not a list"]),
    ("model: {id: a/b}", "model: a/b", ["line 3, model: must be a mapping of options, not 'a/b'"]),
    ("model: {id: a/b}", "model:", ["line 3, model: must be a mapping of options, but is empty"]),
    ("{id: a/b}", "{}", ["line 3, model: 'id' is missing"]),
    ("{id: a/b}", "{id: ''}", ["line 3, model.id: must not be empty"]),
    ("{id: a/b}", "{id: a/b, trust_remote_code: maybe}",
     ["line 3, model.trust_remote_code: must be true or false, not 'maybe'"]),
    ("{id: a/b}", "{id: a/b, quux: 1}",
     ["line 3, model: unknown option 'quux'; known: dtype, id, revision, trust_remote_code, written_by"]),
    ("{id: a/b}", "{id: a/b, no: 1}", ["line 3, model: the option name false must be text: put it in quotes"]),
    ("{id: c/d}", "{}", ["line 4, data: give either id (a dataset) or files (local paths)"]),
    ("{id: c/d}", "{id: c/d, files: x}", ["line 4, data: give either id (a dataset) or files (local paths)"]),
    ("{id: c/d}", "{files: x, revision: y}", ["line 4, data: name and revision belong to an id, not to files"]),
    ("{id: c/d}", "{files: 5}",
     ["line 4, data.files: must be a path, a list of paths, or a mapping from split to paths, not 5"]),
    *[("{id: c/d}", f"{{files: {none}}}", ["line 4, data.files: names no file"]) for none in ("[]", "{}", "''")],
    ("{id: c/d}", "{files: {train: 5}}", ["line 4, data.files: must be a path or a list of paths, not 5"]),
    ("{id: c/d}", "{id: c/d, splits: {held: x}}", ["line 4, data.splits: unknown option 'held' (held_out?)"]),
    ("{id: c/d}", "{id: c/d, held_out_share: 1.0}", ["line 4, data.held_out_share: must be less than 1, not 1.0"]),
    ("{id: c/d}", "{id: c/d, held_out_share: .nan}",
     ["line 4, data.held_out_share: must be a finite number, not nan"]),
    ("{id: c/d}", "{id: c/d, block_size: many}", ["line 4, data.block_size: must be a whole number, not 'many'"]),
    ("{id: c/d}", "{id: c/d, block_size: 2.5}", ["line 4, data.block_size: must be a whole number, not 2.5"]),
    ("{id: c/d}", "{id: c/d, text_pair_column: x}",
     ["line 4, data.text_pair_column: is for sequence-classification only; this recipe's task is causal-lm"]),
    ("stages:", "seed: true\nstages:", ["line 5, seed: must be a whole number, not true"]),
    ("stages:", "evaluate: {metrics: f1}\nstages:", ["line 5, evaluate.metrics: must be a list of text, not 'f1'"]),
    ("stages:", "evaluate: {metrics: [f1, 2]}\nstages:",
     ["line 5, evaluate.metrics[1]: must be text, not 2: put it in quotes"]),
    ("stages:", "name: again\nstages:", ["line 5: 'name' is given twice (first on line 1)"]),
    ("stages:", "stage:", ["'stages' is missing", "line 5: unknown option 'stage' (stages?)"]),
    ("      steps: 20", "      steps: 20\n      steps: 30",
     ["line 10, stages[1].distill: 'steps' is given twice (first on line 9)"]),
    ("{sparsity: 0.3}", "{sparsity: 1.5}",
     ["line 10, stages[1].distill.prune.sparsity: must be less than 1, not 1.5"]),
    ("{sparsity: 0.3}", "{sparsity: true}",
     ["line 10, stages[1].distill.prune.sparsity: must be a number, not true"]),
    ("{sparsity: 0.3}", "{start: 0.8}",
     ["line 10, stages[1].distill.prune: start=0.8 must lie before end=0.7 (both are shares of the steps)"]),
    ("{sparsity: 0.3}", "0.3", ["line 10, stages[1].distill.prune: must be a mapping of options, not 0.3"]),
    ("{sparsity: 0.3}", "{criterion: magnitud}",
     ["line 10, stages[1].distill.prune.criterion: 'magnitud' is not one of "
      "magnitude, movement, taylor, activation, random (magnitude?)"]),
    ("{sparsity: 0.3}", "{exclude: [[a]]}",
     ["line 10, stages[1].distill.prune.exclude[0]: must be text, not a list"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), REPLACED, ids=[f"{new[:40]!r}" for _, new, _ in REPLACED])
def test_a_fault_says_where_and_what(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert PLAIN.count(old) >= 1
    assert faults(tmp_path, PLAIN.replace(old, new, 1)) == expected


def test_options_of_the_other_task_are_refused(tmp_path: Path) -> None:
    text = PLAIN.replace("causal-lm", "sequence-classification").replace("c/d}", "c/d, block_size: 64}")
    assert faults(tmp_path, text.replace("stages:", "evaluate: {prompt: a}\nstages:")) == [
        "line 4, data.block_size: is for causal-lm only; this recipe's task is sequence-classification",
        "line 5, evaluate.prompt: is for causal-lm only; this recipe's task is sequence-classification",
    ]


def test_merge_keys_keep_the_line_where_the_value_is_written(tmp_path: Path) -> None:
    text = with_stages("finetune: &base\n      steps: 0", "finetune: {<<: *base, epochs: -1}")
    assert faults(tmp_path, text) == [
        "line 7, stages[0].finetune.steps: must be at least 1, not 0",
        "line 7, stages[1].finetune.steps: must be at least 1, not 0",
        "line 8, stages[1].finetune.epochs: must be greater than 0, not -1",
    ]


def test_no_such_recipe() -> None:
    names = ", ".join(bundled_recipes())
    with pytest.raises(RecipeError) as caught:
        load_recipe("sst2_minilmm")
    assert str(caught.value) == f"No such recipe 'sst2_minilmm'. Did you mean 'sst2_minilm'? Bundled recipes: {names}."
    with pytest.raises(RecipeError) as caught:
        load_recipe("elsewhere/zzz.yaml")
    assert str(caught.value) == f"No such recipe 'elsewhere/zzz.yaml'. Bundled recipes: {names}."


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"x\.yaml is not text in UTF-8\."):
        load_recipe(file)


def test_plain_values_have_faults_without_lines() -> None:
    raw = {**yaml.safe_load(PLAIN), "seed": -1}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    assert str(caught.value) == "recipe has 1 fault:\n  seed: must be at least 0, not -1"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw, source="job", lines={("seed",): 7})
    assert str(caught.value) == "job has 1 fault:\n  line 7, seed: must be at least 0, not -1"


WRONG_VALUES = [None, True, -1, 1.5, float("nan"), 10**40, "", "x", [], [None], [["x"]], {}, {2: 1}]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside plain values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


@pytest.mark.parametrize("wrong", WRONG_VALUES, ids=repr)
@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_any_value_anywhere_is_read_or_explained(file: Path, wrong: object) -> None:
    content, explained = load_recipe(file).to_dict(), []
    for path in places(content):
        changed = copy.deepcopy(content)
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = wrong
        try:
            recipe = parse_recipe(changed)
        except RecipeError as error:
            explained.append(str(error))
        else:
            assert parse_recipe(recipe.to_dict()) == recipe
    assert len(explained) > 5
    assert not any(word in text for text in explained for word in PYDANTIC_WORDS)


OVERRIDE_FAULTS = [
    ("stages.1.distill.steps", ": override '{}': needs the form path.to.option=value"),
    ("=5", ": override '{}': needs the form path.to.option=value"),
    ("stages.7.distill.steps=5", ": override '{}': there is no stages[7]: stages has 3 items"),
    ("stages.x.distill.steps=5", ": override '{}': stages is a list: name an item by its number, not 'x'"),
    ("stages.1.finetune.steps=5", ": override '{}': stages[1] is 'distill', not 'finetune'"),
    ("name.x=5", ": override '{}': name is 'plain' and holds no options"),
    ("name=a: b: c", ": override '{}': 'a: b: c' is not valid YAML: put it in quotes"),
    ("stages.1.distill.stepz=5", "override, stages[1].distill: unknown option 'stepz' (steps?)"),
    ("stages.1.distill.prune.sparsity=2", "override, stages[1].distill.prune.sparsity: must be less than 1, not 2"),
    ("modle.id=x", "override: unknown option 'modle' (model?)"),
]


@pytest.mark.parametrize(("override", "expected"), OVERRIDE_FAULTS, ids=[one for one, _ in OVERRIDE_FAULTS])
def test_a_fault_in_an_override(tmp_path: Path, override: str, expected: str) -> None:
    found = faults(tmp_path, PLAIN, override)
    assert found == [expected.format(override).removeprefix(": ")]
