"""What Transformers alone makes of shrunk models: even ones load whole, uneven ones stop it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import hfcompress
from hfcompress.structure import shrink
from tests.families import FAMILIES, inputs_of
from tests.reloading import Case, reload_all, same_but_for_rounding
from tests.test_structure_shrink import CONFIG_HAS_HEADS, _even, _gated, _uneven

pytestmark = pytest.mark.usefixtures("forked")

Cases = dict[tuple[str, str], Case]


def _shrunk(folder: Path, name: str, evenly: bool) -> Case:
    """Shrink and save a model: unevenly, or in all that its config can say."""
    model = FAMILIES[name].model()

    def even(model: PreTrainedModel) -> tuple[dict, dict]:
        heads, neurons = _even(model)
        return heads if name in CONFIG_HAS_HEADS else {}, neurons

    _gated(model, even if evenly else _uneven)
    report = shrink(model)
    assert (report.uneven == ()) == evenly
    assert report.removed_neurons > 0
    output = "logits_per_text" if name == "clip" else "logits"
    return Case.write(folder, model, None, inputs_of(FAMILIES[name]), output)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Every family in both shapes, loaded by one process that never imports hfcompress."""
    root = tmp_path_factory.mktemp("cases")
    kinds = [(name, kind) for name in FAMILIES for kind in ("even", "uneven")]
    found = {(name, kind): _shrunk(root / f"{name}-{kind}", name, kind == "even") for name, kind in kinds}
    reload_all(root, tmp_path_factory.mktemp("empty"), plugins=[()])
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_even_shapes_load_without_hfcompress(name: str, cases: Cases) -> None:
    cases[name, "even"].reloads_alike(plugins=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_uneven_shapes_stop_stock_transformers(name: str, cases: Cases) -> None:
    found = json.loads((cases[name, "uneven"].folder / "found0.json").read_text())
    assert found["error"].startswith("RuntimeError: You set `ignore_mismatched_sizes` to `False`")


def test_an_evenly_shrunk_model_is_verified_without_hfcompress(tmp_path: Path) -> None:
    model = FAMILIES["mistral"].model()
    _gated(model, _even)
    shrink(model)
    saved = hfcompress.save_compressed(model, tmp_path / "out", verify=True)
    assert saved.format == "plain"
    assert saved.verification is not None
    assert not saved.verification.with_hfcompress
    assert same_but_for_rounding(saved.verification)
