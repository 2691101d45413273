"""What a card says beyond its table: differences with intervals, latencies, layers, limits, and nobody's paths."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from hfcompress.evaluate import pack_hits, paired_bootstrap
from hfcompress.gathering import reports_by_layer
from hfcompress.pruning.oneshot.report import PrunedLayer, PruningReport
from hfcompress.publish import load_facts, write_model_card
from hfcompress.publish.pictures import bits_rows, draw_kept, kept_rows, layer_panels, plot_bits
from hfcompress.quantization.report import ScaleTuning
from tests.test_publish import card_of, measurements

RIGHT = np.arange(1000) % 10 > 0  # 90%
WORSE = RIGHT & (np.arange(1000) % 25 != 1)


def classifier() -> dict[str, Any]:
    """A classifier that was fine-tuned, lost heads and neurons, and was shrunk; its first head was new."""
    values = measurements()
    values |= {"task": "sequence-classification", "quantization_report": None, "loads_without_hfcompress": False}
    values["recipe"]["stages"] = [{"finetune": {"epochs": 1}}, {"distill": {"prune_heads": {}}}, {"shrink": {}}]
    for stage, hits in zip(values["stages"], (None, RIGHT, RIGHT, WORSE)):
        found = stage["measurement"]
        found["metrics"] = {} if hits is None else {"accuracy": float(hits.mean()), "f1": 0.91}
        correct = None if hits is None else {"accuracy": pack_hits(hits.tolist())}
        found |= {"correct": correct, "rows": 1000, "continuation": None}
    values["structure"] = {
        "heads": {f"bert.encoder.layer.{at}.attention.self": [12, 12 - 3 * at] for at in range(3)},
        "key_value_heads": {f"bert.encoder.layer.{at}.attention.self": [12, 12 - 3 * at] for at in range(3)},
        "neurons": {f"bert.encoder.layer.{at}": [1536, 700 + at] for at in range(3)},
    }
    values["layers"] = [
        {"name": f"bert.encoder.layer.{at}", "parameters": 1_000_000, "nonzero": 800_000 - at, "bytes": 4_000_000}
        for at in range(3)
    ]
    return values


def row_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {start} |"))


def test_a_card_names_what_writes_the_model_and_the_data(tmp_path: Path) -> None:
    values = measurements()
    assert "write its data" not in card_of(tmp_path, values)
    values["recipe"]["data"] = {"files": "rows.jsonl", "written_by": "python write_rows.py"}
    assert ", write its data by `python write_rows.py`, and run `hfcompress run" in card_of(tmp_path, values)
    values["recipe"]["model"] = {"id": "runs/model", "written_by": "python write_rows.py"}
    assert ", write its model and data by `python write_rows.py`, and run" in card_of(tmp_path, values)
    values["recipe"]["model"]["written_by"] = "python write_model.py"
    assert "its model by `python write_model.py` and its data by `python write_rows.py`" in card_of(tmp_path, values)


def test_accuracy_has_a_difference_with_its_interval(tmp_path: Path) -> None:
    text = card_of(tmp_path, classifier())
    low, high = paired_bootstrap(RIGHT, WORSE)
    before, after = RIGHT.mean(), WORSE.mean()
    assert row_of(text, "accuracy") == (
        f"| accuracy | {before:.4f} | {after:.4f} | {after - before:+.4f} | {low:+.4f} to {high:+.4f} |"
    )
    assert low < after - before < high < 0
    assert row_of(text, "f1").endswith("| +0.0000 | not measured |")
    assert "Before is `drop_layers`" in text  # the first stage that could do the task
    assert "paired bootstrap over the 1,000 examples" in text


def test_every_share_of_right_answers_has_an_interval_of_its_own(tmp_path: Path) -> None:
    values = classifier()
    for stage, hits in zip(values["stages"][1:], (RIGHT, RIGHT, ~WORSE)):
        found = stage["measurement"]
        found["metrics"]["exact_match"] = float(hits.mean())
        found["correct"]["exact_match"] = pack_hits(hits.tolist())
    text = card_of(tmp_path, values)
    for name, after in {"accuracy": WORSE, "exact_match": ~WORSE}.items():
        low, high = paired_bootstrap(RIGHT, after)
        assert row_of(text, name).endswith(f"| {low:+.4f} to {high:+.4f} |")


@pytest.mark.parametrize("metric", ["accuracy", "same_text"])
def test_measurements_of_earlier_versions_kept_one_metrics_answers(tmp_path: Path, metric: str) -> None:
    values = classifier()
    for stage in values["stages"][1:]:
        found = stage["measurement"]
        found["metrics"][metric] = found["metrics"].pop("accuracy")
        found["correct"] = found["correct"]["accuracy"]
    low, high = paired_bootstrap(RIGHT, WORSE)
    assert row_of(card_of(tmp_path, values), metric).endswith(f"| {low:+.4f} to {high:+.4f} |")


def test_answers_of_one_row_are_not_drawn_one_by_one(tmp_path: Path) -> None:
    """Tokens of a row, or labels, depend on each other: an interval of single ones would be far too narrow."""
    values = classifier()
    values["stages"][3]["measurement"]["rows"] = 100
    text = card_of(tmp_path, values)
    assert "bootstrap" not in text
    assert row_of(text, "accuracy").endswith(f"| {WORSE.mean() - RIGHT.mean():+.4f} |")


def test_a_smaller_vocabulary_makes_perplexity_easier_and_the_card_says_so(tmp_path: Path) -> None:
    values = measurements()
    assert "easier to guess" not in card_of(tmp_path, values)
    values["recipe"]["stages"] = [{"prune_vocabulary": {}}]
    assert "a token is easier to guess among fewer" in card_of(tmp_path, values)


@pytest.mark.parametrize(("method", "needed"), [("compressed-tensors", False), ("hfcompress", True)])
def test_what_was_not_reloaded_is_loaded_as_its_config_asks(method: str, needed: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    text = card_of(tmp_path, measurements() | {"loads_without_hfcompress": None, "verification": None})
    assert ("```python\nimport hfcompress" in text) is needed
    assert ("Install hfcompress first" in text) is needed
    assert "**Loads without hfcompress: not measured** (reload: not measured)" in text


@pytest.mark.parametrize("method", ["compressed-tensors", "hfcompress"])
def test_packed_weights_are_said_to_be_unpacked(method: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {
        "quant_method": method, "quantization": {"quant_method": "compressed-tensors"}}}))  # fmt: skip
    assert "Packed weights are unpacked to dense ones when they are loaded or first run" in card_of(
        tmp_path, measurements()
    )


def test_without_single_answers_there_is_no_interval(tmp_path: Path) -> None:
    values = classifier()
    values["stages"][3]["measurement"]["correct"] = None
    text = card_of(tmp_path, values)
    assert "bootstrap" not in text
    assert "interval" not in text
    assert row_of(text, "accuracy").endswith(f"| {WORSE.mean() - RIGHT.mean():+.4f} |")


def test_latency_says_batch_length_threads_and_device(tmp_path: Path) -> None:
    text = card_of(tmp_path, measurements())
    assert "| 35.4 ms | 41.2 ms | new token after 6 of prompt, batch 8, 2 threads, cpu |" in text
    assert "over 235 calls" in text
    values = measurements()
    values["stages"][1]["measurement"]["latency"] = None
    text = card_of(tmp_path, values)
    assert row_of(text.split("latency, median")[1], "drop_layers") == (
        "| drop_layers | not measured | not measured | not measured |"
    )
    assert "- drop_layers: latency." in text


def test_layers_are_in_pictures_and_in_a_table(tmp_path: Path) -> None:
    text = card_of(tmp_path, classifier())
    for picture in ("kept_units.png", "layers.png"):
        assert f"]({picture})" in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert row_of(text, "bert.encoder.layer.1").endswith("| 20.0% | 32.00 | 4.0 MB | 9 of 12 | 701 of 1,536 |")
    facts = load_facts(tmp_path)
    assert kept_rows(facts)["heads"] == {0: (12, 12), 1: (12, 9), 2: (12, 6)}
    assert set(kept_rows(facts)) == {"heads", "neurons"}  # key/value heads would say the same as heads
    assert layer_panels(facts)["sparsity"][2] == (2, pytest.approx(0.200002))
    card_of(tmp_path, measurements())  # of a model that kept all
    assert not (tmp_path / "kept_units.png").exists()
    assert layer_panels(load_facts(tmp_path))["quantization error"][2] == (2, pytest.approx(0.0722))


def test_bits_that_differ_are_in_a_picture_and_in_the_table(tmp_path: Path) -> None:
    values = measurements()
    text = card_of(tmp_path, values)
    assert "bits.png" not in text
    values["quantization_report"][1]["bits"] = 3
    text = card_of(tmp_path, values)
    assert "![Bits of each linear layer](bits.png)" in text
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    assert bits_rows(load_facts(tmp_path)) == {"self_attn.q_proj": {0: 4, 1: 3, 2: 4}}


@pytest.mark.parametrize("layers", [2, 12, 16, 32, 48, 80, 126])
@pytest.mark.parametrize("picture", ["bits", "kept"])
def test_no_number_in_a_picture_covers_another(
    picture: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("hfcompress.publish.pictures.save_figure", lambda figure, path: drawn.append(figure))
    if picture == "kept":
        draw_kept({"heads": {at: (128, 100 + at % 9) for at in range(layers)},
                   "neurons": {at: (28672, 28672 - at) for at in range(layers)}}, "large", tmp_path)  # fmt: skip
    else:
        rows = [{"name": f"model.layers.{at}.mlp.{name}", "bits": 3 + at % 2} for at in range(layers) for name in "ab"]
        card_of(tmp_path, measurements() | {"quantization_report": None})
        plot_bits(replace(load_facts(tmp_path), quantization_report=tuple(rows)), tmp_path)
    (figure,) = drawn
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for shown in ([*axes.texts], axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [one.get_window_extent().get_points() for one in shown]
        for index, ((left, bottom), (right, top)) in enumerate(boxes):
            for (other_left, other_bottom), (other_right, other_top) in boxes[:index]:
                over = min(right, other_right) - max(left, other_left), min(top, other_top) - max(bottom, other_bottom)
                assert min(over) <= 0.5  # of a pixel


def test_an_error_is_said_to_be_the_outputs_only_where_inputs_weighed_it(tmp_path: Path) -> None:
    """SmoothQuant's layers saw calibration tokens, but their error is the weight's."""
    values = measurements()
    assert "Relative error of a layer's output on the calibration data" in card_of(tmp_path, values)
    for row in values["quantization_report"]:
        row["damping"] = None
    assert "Relative error of a layer's weight: from 0.0500" in card_of(tmp_path, values)
    for row in values["quantization_report"]:
        row["scaled"] = False  # AWQ, which has a Hessian and needs no factor of it
    assert "Relative error of a layer's output on the calibration data" in card_of(tmp_path, values)


@pytest.mark.parametrize(
    ("measure", "kept", "said"),
    [
        ("KL divergence", True, "were kept: on calibration rows that neither they nor the layers saw, the KL "
         "divergence from the dense model went from 0.0574 to 0.0556 nats a token."),
        ("squared error", False, "were dropped again: on calibration rows that neither they nor the layers saw, the "
         "squared error from the dense model went from 0.0574 to 0.0556 a token."),
    ],
)  # fmt: skip
def test_a_card_says_what_tuning_the_scales_did(measure: str, kept: bool, said: str, tmp_path: Path) -> None:
    values = measurements()
    assert "gradient steps" not in card_of(tmp_path, values)
    values["tuning"] = asdict(ScaleTuning(measure, 0.0574, 0.0556, kept, 32, 80.0))
    assert f"Then 32 gradient steps tuned all scales and {said}" in " ".join(card_of(tmp_path, values).split())


def test_a_card_says_what_learnt_rounding_did_to_whole_layers(tmp_path: Path) -> None:
    values = measurements()
    first = dict(values["quantization_report"][0])
    errors = {"encoder.layer.0": (0.2, 0.1), "encoder.layer.1": (0.4, 0.3), "encoder.layer.12": (0.9, 0.8)}
    values["quantization_report"] = [
        {**first, "name": f"{layer}.{one}", "output_error_before": before, "output_error_after": after}
        for layer, (before, after) in errors.items()
        for one in ("dense.0", "query", "key")[: 1 if layer.endswith("12") else 3]
    ]
    said = " ".join(card_of(tmp_path, values).split())
    assert "Then rounding was learnt from what whole layers give, in 3 of them" in said
    assert "went from 0.4000 to 0.3000 in the median. The errors of single linear layers are those before" in said
    for row in values["quantization_report"]:
        row["output_error_before"] = row["output_error_after"] = None
    assert "learnt" not in card_of(tmp_path, values)


def test_each_stage_that_prunes_has_its_table_and_its_panel(tmp_path: Path) -> None:
    def report(zeros: int) -> PruningReport:
        rows = [PrunedLayer(f"model.layers.{at}.q_proj", zeros + at, 100, zeros / 1000, None, 0, 1.0) for at in (0, 1)]
        return PruningReport("magnitude", tuple(rows), 2.0)

    first, second = (("prune", "prune", report(25).to_dict()), ("prune-2", "prune", report(50).to_dict()))
    values = measurements() | {"quantization_report": None}
    text = card_of(tmp_path, values | reports_by_layer([first]))
    assert "## Pruning error of each layer\n" in text
    assert next(iter(layer_panels(load_facts(tmp_path)))) == "pruning error"
    text = card_of(tmp_path, values | reports_by_layer([first, second]))
    parts = text.split("## Pruning error of each layer in the stage `prune")
    assert [part[:8].partition("`")[0] for part in parts[1:]] == ["", "-2"]
    assert [row_of(part, "model.layers.1.q_proj").split(" | ")[1] for part in parts[1:]] == ["26.0%", "51.0%"]
    assert layer_panels(load_facts(tmp_path)) == {
        "pruning error, prune": [(0, 0.025), (1, 0.025)],
        "pruning error, prune-2": [(0, 0.05), (1, 0.05)],
    }


def test_the_same_facts_give_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        card_of(tmp_path / name, classifier())
        found.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert found[0] == found[1]
    assert {"README.md", "size_against_quality.png", "kept_units.png", "layers.png"} <= set(found[0])


def test_limits_follow_from_the_facts(tmp_path: Path) -> None:
    values = classifier()
    values["data"]["max_train_rows"] = 16000
    text = card_of(tmp_path, values).split("## Limits")[1].split("##")[0]
    assert "without `import hfcompress` first" in text
    assert "Trained on 16,000 rows" in text
    assert "One run with one seed (7)" in text
    assert "unpacks" not in text
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    text = card_of(tmp_path, measurements()).split("## Limits")[1].split("##")[0]
    assert "the memory in use is not" in text
    assert "7.3% of the parameters are zero" in text
    assert "import hfcompress" not in text


@pytest.mark.parametrize("root", ["/home/somebody", "~", "C:\\Users\\somebody"])
def test_paths_of_one_machine_stay_off_the_card(tmp_path: Path, root: str) -> None:
    values = classifier()
    here = {"files": [f"{root}/data/reviews.tsv"]}
    values |= {"data": here, "base_model": f"{root}/models/bert", "inputs": {"data": "abc", "model": "def"}}
    values["recipe"] |= {"data": here, "model": {"id": f"{root}/models/bert"}, "output": f"{root}/runs/out"}
    values["recipe"]["stages"][1]["distill"]["teacher"] = f"{root}/models/teacher"
    values["stages"][2]["summary"] = f"teacher {root}/models/teacher, 24 steps"
    text = card_of(tmp_path, values)
    assert "somebody" not in text
    assert "| teacher teacher, 24 steps |" in text
    assert "~/" not in text
    assert "- reviews.tsv" in text
    assert "teacher: teacher" in text
    assert "output:" not in text
    assert "Data: `reviews.tsv`, content `abc`." in text


def test_a_card_of_one_stage_compares_nothing(tmp_path: Path) -> None:
    values = measurements() | {"stages": measurements()["stages"][3:]}
    text = card_of(tmp_path, values)
    assert "Quality before and after" not in text
    assert "perplexity 40.83" in text
    assert "before" not in text.split("## How to load")[0]


def test_every_section_has_something_to_say(tmp_path: Path) -> None:
    for values in (classifier(), measurements()):
        save = tmp_path / "measurements.json"
        save.write_text(json.dumps(values))
        text = write_model_card(tmp_path).read_text()
        assert not re.search(r"\n## [^\n]+\n+(?=## |\Z)", text)
        assert "\n\n\n" not in text


def test_measured_rows_are_of_the_held_out_file(tmp_path: Path) -> None:
    values = classifier()
    values["data"] = {"files": {"train": ["data/train.tsv"], "validation": ["data/validation.tsv"]}}
    text = card_of(tmp_path, values)
    assert "held-out rows of `validation.tsv`" in text
    assert "Data: `train.tsv, validation.tsv`" in text


def test_layers_without_zeros_have_no_picture_of_them(tmp_path: Path) -> None:
    values = classifier()
    values["layers"] = [{**one, "nonzero": one["parameters"] - 3} for one in values["layers"]]
    card_of(tmp_path, values)
    assert next(iter(layer_panels(load_facts(tmp_path)))) == "bits per weight"
    assert "sparsity" not in layer_panels(load_facts(tmp_path))
