"""A distill stage's teachers and losses: read into objects, written back, and every fault with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfcompress.distillation.losses import LOSSES, ForwardKL, Relations
from hfcompress.recipe import Distill, load_recipe, parse_recipe
from tests.test_recipe import with_stages, write
from tests.test_recipe_faults import faults


def test_losses_are_read_and_written_back(tmp_path: Path) -> None:
    text = with_stages(
        "distill:\n      steps: 1\n      losses:\n        - forward_kl: {temperature: 3, weight: 0.5}\n"
        "        - relations: {layers: [[0, 1]], of: [queries]}\n        - hidden_states\n        - hidden_states:"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.stages[0].options.losses == (
        ForwardKL(temperature=3, weight=0.5),
        Relations(layers=((0, 1),), of=("queries",)),
        LOSSES["hidden_states"](),
        LOSSES["hidden_states"](),
    )
    assert recipe.stages[0].options.temperature is None
    assert parse_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_survives_being_written(name: str) -> None:
    mapping = {"steps": 1, "losses": [name, {name: {"weight": 0.25, "final_weight": 0}}]}
    base = {"name": "a", "task": "causal-lm", "model": {"id": "x/y"}, "data": {"id": "x/y"}}
    recipe = parse_recipe({**base, "stages": [{"distill": mapping}]})
    assert recipe.stages[0].options.losses == (LOSSES[name](), LOSSES[name](weight=0.25, final_weight=0))
    assert parse_recipe(recipe.to_dict()) == recipe


def test_several_teachers_are_named_like_one(tmp_path: Path) -> None:
    stage = "distill: {steps: 1, teacher: [0, original, a/b], teacher_weights: [2, 1, 1]}"
    options = load_recipe(write(tmp_path, with_stages("finetune: {steps: 1}", stage))).stages[1].options
    assert isinstance(options, Distill)
    assert options.teachers == ("finetune", "original", "a/b")
    assert options.teacher_weights == (2, 1, 1)
    assert Distill(steps=1).teachers == ("original",)


HERE = "stages[0].distill"
FAULTS = [
    ("losses: [forward_k]", f".losses[0]: 'forward_k' is not one of {', '.join(LOSSES)} (forward_kl?)"),
    ("losses: [forward_kl, {forward_kl: {temperatur: 1}}]",
     ".losses[1].forward_kl: unknown option 'temperatur' (temperature?)"),
    ("losses: [{forward_kl: {temperature: 0}}]",
     ".losses[0].forward_kl.temperature: must be greater than 0, not 0"),
    ("losses: [{top_k_kl: {k: true}}]", ".losses[0].top_k_kl.k: must be a whole number, not true"),
    ("losses: [{relations: {layers: lst}}]",
     ".losses[0].relations.layers: must be auto or last or a list, not 'lst'"),
    ("losses: forward_kl", ".losses: must be a list, not 'forward_kl'"),
    ("losses: []", ".losses: must not be empty; leave it out for the loss that fits the task"),
    ("losses: [{forward_kl: , relations: }]",
     ".losses[0]: must be a loss's name, or one name with its options, not a mapping"),
    ("losses: [forward_kl], temperature: 2",
     ": temperature is an option of the losses that have one: give it to them"),
    ("teacher: {a: 1}", ".teacher: must be text or a list of text, not a mapping"),
    ("teacher: []", ".teacher: names no teacher"),
    ("teacher: [original, [a]]", ".teacher: a teacher must be text, not a list"),
    ("teacher: [a/b, orignal]",
     ".teacher[1]: there is no teacher 'orignal' (original?); known: original, or a model id with a '/'"),
    ("teacher_weights: [1, 2]", ": teacher_weights must be a share for each of 1 teachers, not all 0"),
    ("teacher: [a/b, c/d], teacher_weights: [0, 0]",
     ": teacher_weights must be a share for each of 2 teachers, not all 0"),
    ("teacher_weights: [-1]", ".teacher_weights[0]: must be at least 0, not -1"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), FAULTS, ids=[options for options, _ in FAULTS])
def test_a_fault_in_teachers_or_losses(tmp_path: Path, options: str, expected: str) -> None:
    assert faults(tmp_path, with_stages(f"distill: {{steps: 1, {options}}}")) == [f"line 6, {HERE}{expected}"]


def test_a_fault_in_a_loss_has_its_own_line(tmp_path: Path) -> None:
    text = with_stages("distill:\n      steps: 1\n      losses:\n        - forward_kl:\n            tau: 1")
    assert faults(tmp_path, text)[0].startswith(f"line 10, {HERE}.losses[0].forward_kl: unknown option 'tau'")
