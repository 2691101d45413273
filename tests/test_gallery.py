"""Every recipe of ``recipes/`` has a card of a real run, which its measurements render again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hfcompress.publish import load_facts
from hfcompress.publish.card import PICTURES, render_folder
from hfcompress.recipe import load_recipe
from tests.documents import ROOT

CARDS = {folder.name: folder for folder in (ROOT / "model_cards").iterdir() if folder.is_dir()}
RECIPES = {load_recipe(str(file)).name: file for file in (ROOT / "recipes").glob("*.yaml")}


def test_every_recipe_has_its_card_and_every_card_its_recipe() -> None:
    assert len(CARDS) >= 8
    assert set(CARDS) == set(RECIPES)


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_card_says_what_its_measurements_say(name: str) -> None:
    assert (CARDS[name] / "README.md").read_text(encoding="utf-8") == render_folder(CARDS[name])


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_card_is_of_the_recipe_as_it_stands(name: str, tmp_path: Path) -> None:
    # Read as a recipe, so that options that are newer than the run have their defaults in both.
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(load_facts(CARDS[name]).recipe), encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.yaml")).to_dict() == load_recipe(str(RECIPES[name])).to_dict()


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_card_is_complete(name: str) -> None:
    folder, facts = CARDS[name], load_facts(CARDS[name])
    stages = [stage.measurement for stage in facts.stages]
    assert all(one.bytes_on_disk and one.latency and one.peak_memory_bytes and one.machine for one in stages)
    assert {(one.machine or {}).get("threads") for one in stages} == {2}, "measured with the machine's two cores"
    assert facts.verification
    assert all(one.metrics for one in stages[1:])
    written = (folder / "README.md").read_text(encoding="utf-8")
    shown = {file for file, _ in PICTURES.values() if f"]({file})" in written}
    assert shown
    assert shown == {path.name for path in folder.glob("*.png")}
