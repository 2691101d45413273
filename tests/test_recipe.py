"""Recipes: what is read, written, overridden and compared."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from hfcompress.errors import RecipeError
from hfcompress.pruning.options import PruneOptions
from hfcompress.quantization import GPTQ, RTN
from hfcompress.recipe import (
    STAGES,
    TASK_DATA,
    TASKS,
    DataSpec,
    Distill,
    Finetune,
    Quantize,
    bundled_recipes,
    load_recipe,
    parse_recipe,
    recipe_differences,
)
from hfcompress.recipe import text as recipe_text
from hfcompress.recipe.aliases import ALIASES, CONVERTED, NOT_TAKEN
from hfcompress.recipe.options import METHODS
from hfcompress.recipe.training import REFUSED

RECIPES = Path(__file__).parent.parent / "recipes"
BUNDLED = sorted(RECIPES.rglob("*.yaml"))
PLAIN = """\
name: plain
task: causal-lm
model: {id: a/b}
data: {id: c/d}
stages:
  - finetune: {steps: 10}
  - distill:
      teacher: finetune
      steps: 20
      prune: {sparsity: 0.3}
  - quantize: {method: gptq}
"""


def write(folder: Path, text: str) -> str:
    file = folder / "x.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def with_stages(*stages: str) -> str:
    """A recipe whose stages begin on line 6."""
    return PLAIN[: PLAIN.index("stages:")] + "stages:\n" + "".join(f"  - {stage}\n" for stage in stages)


# Reading


def test_recipes_are_found() -> None:
    assert BUNDLED
    assert list(bundled_recipes()) == [str(file.relative_to(RECIPES).with_suffix("")) for file in BUNDLED]


@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_bundled_recipe_loads_by_path_and_by_name(file: Path) -> None:
    name = str(file.relative_to(RECIPES).with_suffix(""))
    assert load_recipe(file) == load_recipe(name) == load_recipe(f"{name}.yaml")
    assert file.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")


def test_values_of_a_recipe() -> None:
    recipe = load_recipe("smollm2_python_docs")
    assert [stage.name for stage in recipe.stages] == ["drop_layers", "distill", "quantize"]
    distill = recipe.stages[1].options
    assert distill == Distill(
        steps=24,
        temperature=2.0,
        prune=PruneOptions(sparsity=0.3, end=0.6),
        training={"learning_rate": 3e-4, "per_device_train_batch_size": 4},
    )
    assert recipe.stages[2].options == Quantize(GPTQ(bits=4, group_size=64), 32, 512)
    assert recipe.evaluate.max_rows == 32
    assert recipe.model.dtype == "bfloat16"
    assert load_recipe("sst2_minilm").stages[2].options == Quantize(RTN(bits=8))


def test_output_and_evaluate_have_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PLAIN))
    assert recipe.output == "runs/plain"
    assert (recipe.seed, recipe.evaluate.batch_size, recipe.data.held_out_share) == (0, 8, 0.1)


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PLAIN))
    for one in (recipe, recipe.model, recipe.data, recipe.evaluate, recipe.stages[0], recipe.stages[0].options):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, dataclasses.fields(one)[0].name, "other")


def test_repeated_stages_are_numbered_and_teachers_named(tmp_path: Path) -> None:
    text = with_stages("finetune: {steps: 1}", "distill: {steps: 1, teacher: 0}", "distill: {steps: 1, teacher: 1}",
                       "distill: {steps: 1, teacher: distill-2}", "distill: {steps: 1, teacher: a/b}")  # fmt: skip
    recipe = load_recipe(write(tmp_path, text))
    assert [stage.name for stage in recipe.stages] == ["finetune", "distill", "distill-2", "distill-3", "distill-4"]
    teachers = [stage.options.teacher for stage in recipe.stages[1:] if isinstance(stage.options, Distill)]
    assert teachers == ["finetune", "distill", "distill-2", "a/b"]


@pytest.mark.parametrize("teacher", ["original", "package:x", "./x", "org/model"])
def test_teacher_may_be_a_model(tmp_path: Path, teacher: str) -> None:
    recipe = load_recipe(write(tmp_path, with_stages(f"distill: {{steps: 1, teacher: '{teacher}'}}")))
    assert recipe.stages[0].options.teacher == teacher


def test_teacher_may_be_a_folder_without_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").mkdir()
    recipe = load_recipe(write(tmp_path, with_stages("distill: {steps: 1, teacher: big}")))
    assert recipe.stages[0].options.teacher == "big"


@pytest.mark.parametrize(
    ("files", "expected"),
    [("a.txt", ("a.txt",)), ("[a.txt, b.txt]", ("a.txt", "b.txt")),
     ("{train: a.txt, test: [b.txt]}", {"train": ("a.txt",), "test": ("b.txt",)})],
)  # fmt: skip
def test_files_are_a_path_a_list_or_a_mapping(tmp_path: Path, files: str, expected: object) -> None:
    recipe = load_recipe(write(tmp_path, PLAIN.replace("{id: c/d}", f"{{files: {files}}}")))
    assert recipe.data.files == expected
    assert parse_recipe(recipe.to_dict()) == recipe


OWN_NAMES = {"text_column": "a", "label_column": "b", "max_length": 9, "max_train_rows": 5}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("local", [True, False])
def test_options_of_the_data_may_have_the_names_of_the_example_scripts(task: str, local: bool) -> None:
    """Every alias that the task can have, beside the same recipe in our own names."""
    plain = {"name": "x", "task": task, "model": {"id": "a/b"}, "stages": [{"distill": {"steps": 1}}]}
    places = (
        {"files": {"train": "t.csv", "validation": "v.csv", "test": "w.csv"}} if local else {"id": "c/d", "name": "e"}
    )
    own = {**places, "splits": {"train": "one", "held_out": "two"}}
    own |= {name: value for name, value in OWN_NAMES.items() if name in TASK_DATA[task] or name == "max_train_rows"}
    mapping = {**plain, "data": own, "evaluate": {"max_rows": 3}}
    twice = {
        "validation_split_name": "eval_split_name",
        "train_file": "train_dir",
        "validation_file": "validation_dir",
    }
    for left_out in (twice.keys(), twice.values()):
        theirs = {
            alias: value
            for alias, target in ALIASES.items()
            if alias not in left_out and (value := value_at(mapping, target)) is not None
        }
        assert parse_recipe({**plain, "data": theirs}) == parse_recipe(mapping)
        assert len(theirs) >= 7


@pytest.mark.parametrize(
    ("name", "value", "own"),
    [
        ("text_column_names", "sentence", {"text_column": "sentence"}),
        ("text_column_names", ["sentence"], {"text_column": "sentence"}),
        ("do_regression", True, {"problem_type": "regression"}),
        ("do_regression", False, {}),
        ("validation_split_percentage", 5, {"held_out_share": 0.05}),
        ("train_val_split", 0.15, {"held_out_share": 0.15}),
    ],
)
def test_what_the_example_scripts_write_otherwise(name: str, value: Any, own: dict[str, Any]) -> None:
    base = {**yaml.safe_load(PLAIN), "task": "sequence-classification"}
    theirs, ours = ({**base, "data": {"id": "c/d", **data}} for data in ({name: value}, own))
    assert parse_recipe(theirs) == parse_recipe(ours)


def test_several_columns_of_one_text_are_refused() -> None:
    mapping = {**yaml.safe_load(PLAIN), "data": {"id": "c/d", "text_column_names": "one,two"}}
    with pytest.raises(RecipeError, match=r"data\.text_column_names: names several columns: give text_column, and as"):
        parse_recipe(mapping)


@pytest.mark.parametrize(("name", "value"), [("metric_name", "accuracy"), ("eval_metrics", ["accuracy"])])
def test_metrics_of_the_example_scripts(name: str, value: Any) -> None:
    assert parse_recipe({**yaml.safe_load(PLAIN), "data": {"id": "c/d", name: value}}).evaluate.metrics == (
        "accuracy",
    )


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_else_the_example_scripts_have_is_refused_with_what_there_is(name: str) -> None:
    harmless, instead = NOT_TAKEN[name]
    mapping = yaml.safe_load(PLAIN)
    other = {True: False, False: True}[harmless] if isinstance(harmless, bool) else 3
    with pytest.raises(RecipeError, match=re.escape(f"data.{name}: is no option of a recipe: {instead}")):
        parse_recipe({**mapping, "data": {"id": "c/d", name: other}})
    assert parse_recipe({**mapping, "data": {"id": "c/d", name: harmless}}) == parse_recipe(mapping)


# The fields of DataTrainingArguments in Transformers' examples/pytorch that a recipe's tasks have a script for.
SCRIPTS = {
    "run_clm": "dataset_name dataset_config_name train_file validation_file max_train_samples max_eval_samples "
    "streaming block_size overwrite_cache validation_split_percentage preprocessing_num_workers keep_linebreaks",
    "run_mlm": "max_seq_length mlm_probability line_by_line pad_to_max_length",
    "run_glue": "task_name test_file max_predict_samples",
    "run_classification": "do_regression text_column_names text_column_delimiter train_split_name "
    "validation_split_name test_split_name remove_splits remove_columns label_column_name shuffle_train_dataset "
    "shuffle_seed metric_name",
    "run_ner": "text_column_name label_all_tokens return_entity_level_metrics",
    "run_qa": "version_2_with_negative null_score_diff_threshold doc_stride n_best_size max_answer_length",
    "run_seq2seq_qa": "context_column question_column answer_column val_max_answer_length",
    "run_summarization": "lang text_column summary_column max_source_length max_target_length val_max_target_length "
    "num_beams ignore_pad_token_for_loss source_prefix forced_bos_token",
    "run_translation": "source_lang target_lang",
    "run_image_classification": "train_dir validation_dir train_val_split image_column_name",
    "run_speech_recognition_seq2seq": "audio_column_name max_duration_in_seconds min_duration_in_seconds "
    "preprocessing_only eval_split_name do_lower_case language task",
    "run_speech_recognition_ctc": "chars_to_ignore eval_metrics token use_auth_token trust_remote_code unk_token "
    "pad_token word_delimiter_token phoneme_language",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_name_of_a_script_is_an_option_or_refused_with_the_reason(script: str) -> None:
    own = {field.name for field in dataclasses.fields(DataSpec)}
    taken = own | ALIASES.keys() | CONVERTED.keys()
    for name in SCRIPTS[script].split():
        assert (name in taken) != (name in NOT_TAKEN), name


def value_at(mapping: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        mapping = mapping.get(key, {})
    return mapping or None


def test_training_values_get_the_types_of_training_arguments(tmp_path: Path) -> None:
    training = "{learning_rate: 2e-4, eval_strategy: no, max_grad_norm: 1, report_to: [a, b], save_steps: '5'}"
    recipe = load_recipe(write(tmp_path, with_stages(f"finetune: {{steps: 1, training: {training}}}")))
    values = recipe.stages[0].options.training
    assert values == {
        "learning_rate": 2e-4, "eval_strategy": "no", "max_grad_norm": 1.0, "report_to": ["a", "b"], "save_steps": 5.0,
    }  # fmt: skip
    assert isinstance(values["max_grad_norm"], float)


TRAINING_FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


@pytest.mark.parametrize("name", TRAINING_FIELDS)
def test_every_field_of_training_arguments_is_an_option_or_refused_with_the_reason(name: str) -> None:
    """Its default is accepted, written down, read back the same, and Transformers takes it from there."""
    field = TRAINING_FIELDS[name]
    made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = made if field.default is dataclasses.MISSING else field.default
    stages = [{"finetune": {"steps": 1, "training": {name: default}}}]
    mapping = {**yaml.safe_load(PLAIN), "stages": stages}
    if name in REFUSED:
        with pytest.raises(RecipeError, match=re.escape(f"training.{name}: {REFUSED[name]}")):
            parse_recipe(mapping)
        return
    recipe = parse_recipe(mapping)
    read = parse_recipe(yaml.safe_load(recipe.to_yaml())).stages[0].options.training
    assert read == recipe.stages[0].options.training
    taken = TrainingArguments(output_dir="unused", **read)
    assert getattr(taken, name) == getattr(TrainingArguments(output_dir="unused"), name)


def test_only_fields_of_training_arguments_are_refused_by_name() -> None:
    assert REFUSED.keys() <= TRAINING_FIELDS.keys()


def test_options_check_themselves_without_a_recipe() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        Finetune(steps=1, training={"lerning_rate": 1})
    with pytest.raises(ValueError, match="give either steps or epochs, not both"):
        Distill(steps=1, epochs=1)


# There and back


@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_bundled_recipe_survives_a_round_trip(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_every_stage_and_method_survives_a_round_trip(tmp_path: Path) -> None:
    training = "{learning_rate: 2e-4, lr_scheduler_kwargs: {a: 1}, eval_strategy: no}"
    stages = [
        "drop_layers: {layers: [0, 2]}",
        "prune_vocabulary: {}",
        f"finetune: {{epochs: 1.5, training: {training}}}",
        "distill: {steps: 3, teacher: 1, prune: {targets: [a, b], exclude: [c]}}",
        "finetune: {steps: 3, prune: {}, prune_heads: {grouped: even}, prune_neurons: {exclude: [c]}}",
        "shrink: {}",
    ]
    prunes = [f"prune: {{method: {name}, pattern: '1:4', sparsity: 0.75, exclude: [a]}}" for name in METHODS["prune"]]
    quantizations = {
        "rtn": "bits: 3, group_size: 32, exclude: [lm_head]",
        "gptq": "bits: 3, group_size: null, exclude: [lm_head], prune: {sparsity: 0.3}",
        "awq": "bits: 3, group_size: 32, grid: 10, clip: false, exclude: [lm_head]",
        "bitsandbytes": "bits: 4, kind: fp4, exclude: [lm_head]",
        "smoothquant": "strength: 0.25, exclude: [lm_head]",
        "float8": "activations: true, exclude: [lm_head]",
    }
    assert quantizations.keys() == METHODS["quantize"].keys()
    for method, given in quantizations.items():
        last = f"quantize: {{method: {method}, {given}}}"
        recipe = load_recipe(write(tmp_path, with_stages(*stages, *prunes, last)))
        assert {stage.kind for stage in recipe.stages} == set(STAGES)
        assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


# Overrides and differences


def test_overrides_set_options(tmp_path: Path) -> None:
    overrides = ["stages.1.distill.steps=50", "stages[1].distill.training.learning_rate=2e-4", "evaluate.max_rows=4",
                 "stages.1.distill.prune=null", "name=other", "stages.2.quantize={method: rtn}"]  # fmt: skip
    recipe = load_recipe(write(tmp_path, PLAIN), overrides)
    assert recipe.stages[1].options == Distill(teacher="finetune", steps=50, training={"learning_rate": 2e-4})
    assert (recipe.name, recipe.output, recipe.evaluate.max_rows) == ("other", "runs/other", 4)
    assert recipe.stages[2].options == Quantize(RTN())


def test_an_override_mends_a_fault_of_the_file(tmp_path: Path) -> None:
    broken = PLAIN.replace("steps: 20", "steps: -20")
    assert load_recipe(write(tmp_path, broken), ["stages.1.distill.steps=20"]) == load_recipe(write(tmp_path, PLAIN))


def test_a_refused_override_changes_nothing() -> None:
    content, lines, _ = recipe_text.read_yaml(PLAIN, "x")
    before = (json.dumps(content), dict(lines))
    assert len(recipe_text.apply_overrides_(content, lines, ["name.x.y=1", "stages.9=1"])) == 2
    assert (json.dumps(content), lines) == before


def test_differences_name_each_option(tmp_path: Path) -> None:
    file = write(tmp_path, PLAIN)
    old = load_recipe(file).to_dict()
    changes = ["stages.1.distill.steps=50", "stages.1.distill.prune=null", "evaluate.metrics=[f1]", "seed=3"]
    new = load_recipe(file, changes).to_dict()
    assert recipe_differences(old, old) == []
    found = recipe_differences(old, new)
    assert "stages[1].distill.steps: 20 -> 50" in found
    assert "seed: 0 -> 3" in found
    assert 'evaluate.metrics: not set -> ["f1"]' in found
    assert "stages[1].distill.prune.sparsity: 0.3 -> not set" in found
    assert all("finetune" not in line for line in found)
    assert recipe_differences({"a": [{"b": 1}]}, {"a": [{"b": 1}, {"b": 2}]}) == ["a[1].b: not set -> 2"]
