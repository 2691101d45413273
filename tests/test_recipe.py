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
    Distill,
    Finetune,
    Quantize,
    bundled_recipes,
    load_recipe,
    parse_recipe,
    recipe_differences,
)
from hfcompress.recipe import text as recipe_text
from hfcompress.recipe.aliases import ALIASES
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
    for split in ("validation_split_name", "eval_split_name"):
        theirs = {
            alias: value
            for alias, target in ALIASES.items()
            if (value := value_at(mapping, target)) is not None
            and (split == alias or target != ("data", "splits", "held_out"))
        }
        assert parse_recipe({**plain, "data": theirs}) == parse_recipe(mapping)
        assert len(theirs) >= 7


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
