"""Cards, tables and pictures say what was measured, and nothing else."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

from hfcompress.errors import CheckpointError, DataError
from hfcompress.publish import load_facts, measurement_table, plot_size_against_quality, stage_table, write_model_card
from hfcompress.publish.facts import facts_from
from hfcompress.publish.plots import PICTURE_INCHES
from hfcompress.publish.sections import stages_markdown
from hfcompress.publish.tables import stage_cells, stage_headers
from tests.forks import Forks

MACHINE = {"cpu": "Test CPU 9000", "cores": 2, "threads": 2, "platform": "Linux x86_64", "python": "3.11.7",
           "torch": "2.13.0", "transformers": "5.24.0", "hfcompress": "0.1.0"}  # fmt: skip


def measured(**changes: Any) -> dict[str, Any]:
    """A language model's measurement as JSON has it."""
    return {
        "parameters": 134_515_008, "nonzero": 134_515_001, "bytes_on_disk": 269_060_552,
        "metrics": {"perplexity": 29.29}, "tokens_per_second": 28.31,
        "speed_kind": "decode, batch 1", "peak_memory_bytes": 1_023_456_789,
        "continuation": "the ``list`` is sorted.", "dtype": "float32", "stored_dtypes": ["bfloat16"],
        "device": "cpu", "machine": MACHINE,
        "rows": 64, "tokens": 32_768,
        "latency": {"what": "new token", "batch": 8, "length": 6, "median_ms": 35.4, "p95_ms": 41.2, "calls": 235},
        **changes,
    }  # fmt: skip


def measurements() -> dict[str, Any]:
    """A whole ``measurements.json``: layers dropped, distilled, quantized."""
    stages = [
        ("original", "as it was opened", None, {}),
        ("drop_layers", "30 -> 24 layers", 0.8, {
            "parameters": 113_275_000, "nonzero": 113_274_001, "bytes_on_disk": 226_600_112,
            "metrics": {"perplexity": 71.48}, "tokens_per_second": 34.92, "peak_memory_bytes": 1_000_111_000}),
        ("distill", "teacher original, 400 steps", 245.0, {
            "parameters": 113_275_000, "nonzero": 113_274_002, "bytes_on_disk": 226_600_112,
            "metrics": {"perplexity": 36.05}, "tokens_per_second": 35.17, "peak_memory_bytes": 1_000_222_000}),
        ("quantize", "GPTQ, 4 bits, a scale per group of 64", 61.2, {
            "parameters": 113_275_000, "nonzero": 105_020_003, "bytes_on_disk": 102_345_678,
            "metrics": {"perplexity": 40.83}, "tokens_per_second": 41.76, "peak_memory_bytes": 987_654_321}),
    ]  # fmt: skip
    row = {"bits": 4, "group_size": 64, "requested_group_size": 64, "damping": 0.01, "tokens": 65_536, "seconds": 1.2}
    return {
        "hfcompress": "0.1.0",
        "name": "smollm2-small",
        "task": "causal-lm",
        "created": "2026-11-25",
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_license": "apache-2.0",
        "data": {"id": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "splits": {"held_out": "test"}},
        "recipe": {
            "name": "smollm2-small", "output": "runs/smollm2-small", "evaluate": {"prompt": "Sort a `list` by"},
            "stages": [{"drop_layers": {"keep": 24}}, {"distill": {"steps": 400}}, {"quantize": {"method": "gptq"}}],
        },
        "seed": 7,
        "inputs": {"data": "Salesforce/wikitext@a1b2c3", "model": "HuggingFaceTB/SmolLM2-135M@d4e5f6"},
        "stages": [
            {"name": name, "summary": text, "seconds": seconds, "measurement": measured(**changes)}
            for name, text, seconds, changes in stages
        ],
        "loads_without_hfcompress": True,
        "verification": {"stock": {"max_logit_difference": 0.0123, "max_logit": 24.5, "seconds": 4.5}},
        "quantization_report": [
            {"name": f"model.layers.{index}.self_attn.q_proj", "relative_error": 0.05 + 0.0111 * index, **row}
            for index in range(3)
        ],
    }  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a quantized checkpoint's config and its measurements."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    save(tmp_path, measurements())
    return tmp_path


def save(folder: Path, values: dict[str, Any]) -> None:
    (folder / "measurements.json").write_text(json.dumps(values))


def card_of(folder: Path, values: dict[str, Any]) -> str:
    save(folder, values)
    return write_model_card(folder).read_text()


def rendered(table: Any, width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_card_metadata_is_read_back_by_the_hub_client(checkpoint: Path) -> None:
    data = ModelCard.load(write_model_card(checkpoint)).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert data.base_model_relation == "quantized"
    assert (data.library_name, data.license, data.pipeline_tag) == ("transformers", "apache-2.0", "text-generation")
    assert data.tags == ["hfcompress", "pruned", "distilled", "quantized"]
    assert data.datasets == ["Salesforce/wikitext"]
    assert data.metrics == ["perplexity"]
    result = data.eval_results[0]
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
        "Salesforce/wikitext", "wikitext-2-raw-v1", "test")  # fmt: skip
    assert (result.metric_type, result.metric_value) == ("perplexity", 40.83)


def test_what_is_an_id_on_the_hub_was_seen_where_the_model_was_made(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    values = {**measurements(), "base_model": "models/bert"}
    for there, told in ((["models/bert"], None), ([], "models/bert"), (None, None)):
        card_of(checkpoint, {**values, "local": there})
        assert ModelCard.load(checkpoint / "README.md").data.base_model == told
    monkeypatch.chdir("/")
    for there, told in ((["models/bert"], None), ([], "models/bert"), (None, "models/bert")):
        card_of(checkpoint, {**values, "local": there})
        assert ModelCard.load(checkpoint / "README.md").data.base_model == told


def test_card_says_what_was_measured(checkpoint: Path) -> None:
    text = write_model_card(checkpoint).read_text()
    assert "2.6 times smaller on disk (269.1 MB before, 102.3 MB after)" in text
    assert "perplexity 29.29 before and 40.83 after" in text
    assert "**Loads without hfcompress: yes**" in text
    assert "max logit difference 0.0123 where the largest logit is 24.5, in 4.5 s" in text
    assert "`pip install compressed-tensors` first." in text
    assert "import hfcompress\n" not in text
    assert 'AutoModelForCausalLM.from_pretrained("runs/smollm2-small")' in text
    assert "from 0.0500 (`model.layers.0.self_attn.q_proj`) to 0.0722 (`model.layers.2.self_attn.q_proj`)" in text
    assert "Test CPU 9000" in text
    assert "](size_against_quality.png)" in text
    assert (checkpoint / "size_against_quality.png").stat().st_size > 10_000
    assert not re.search(r"\]\(\s*\)|\bNone\b|\bnan\b", text)
    # A heading, the time of the stage that did nothing, and how far other seeds lie apart.
    assert text.count("not measured") == 3


def test_recipe_on_the_card_is_the_recipe(checkpoint: Path) -> None:
    block = re.search(r"```yaml\n(.*?)\n```", write_model_card(checkpoint).read_text(), re.DOTALL)
    assert block
    assert yaml.safe_load(block.group(1)) == measurements()["recipe"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all numbers that the stages of a ``measurements.json`` hold."""
    if isinstance(value, dict):
        return [place for key, one in value.items() for place in places(one, (*path, key))]
    if isinstance(value, list):
        return [place for index, one in enumerate(value) for place in places(one, (*path, index))]
    return [path] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


STAGE_NUMBERS = [place for place in places(measurements()) if place[0] == "stages" and "machine" not in place]


def changed(values: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy in which the number at one place is another."""
    copied = copy.deepcopy(values)
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value(inner[place[-1]])
    return copied


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("place", STAGE_NUMBERS, ids=lambda place: ".".join(map(str, place)))
def test_every_stage_number_decides_what_the_card_says(tmp_path: Path, place: tuple[Any, ...]) -> None:
    # How much text the metrics are of is said once, of the final checkpoint.
    if place[-1] in ("rows", "tokens") and place[1] != len(measurements()["stages"]) - 1:
        return
    # A change of 37% shows at every precision the card uses.
    other = changed(measurements(), place, lambda number: type(number)(number * 1.37))
    assert card_of(tmp_path, measurements()) != card_of(tmp_path, other)


def test_every_number_in_the_table_is_in_the_measurements() -> None:
    values = measurements()
    known = set()
    for stage in values["stages"]:
        found = stage["measurement"]
        numbers = [found[key] / 1e6 for key in ("parameters", "nonzero", "bytes_on_disk", "peak_memory_bytes")]
        known |= {f"{number:,.1f}" if number < 1000 else f"{number:,.0f}" for number in numbers}
        known |= {f"{found['metrics']['perplexity']:.2f}", f"{found['tokens_per_second']:.1f}"}
    shown = re.findall(r"\d[\d.,]*", stages_markdown(facts_from(values)))
    assert len(shown) == 6 * len(values["stages"])
    assert set(shown) <= known


NULLABLE = {"bytes_on_disk": "size on disk", "tokens_per_second": "tokens/s", "peak_memory_bytes": "peak memory"}


@pytest.mark.parametrize("field", NULLABLE)
def test_what_is_none_is_called_not_measured(tmp_path: Path, field: str) -> None:
    values = changed(measurements(), ("stages", 3, "measurement", field), lambda _: None)
    text = card_of(tmp_path, values)
    row = next(line for line in text.splitlines() if line.startswith("| quantize | 113.3 M"))
    assert "not measured" in row
    assert f"- quantize: {NULLABLE[field]}." in text
    assert "None" not in text
    assert "measured" in rendered(stage_table(facts_from(values)))


def test_infinite_perplexity_is_said_plainly(tmp_path: Path) -> None:
    values = changed(measurements(), ("stages", 3, "measurement", "metrics", "perplexity"), lambda _: "infinity")
    text = card_of(tmp_path, values)
    assert "perplexity 29.29 before and infinite after" in text
    assert "| infinite |" in next(line for line in text.splitlines() if line.startswith("| quantize | 113.3 M"))
    assert "- quantize: perplexity" not in text  # it was measured
    assert "infinite" in rendered(stage_table(facts_from(values)))
    assert "infinite" in rendered(measurement_table(facts_from(values).after))
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None
    assert (tmp_path / "size_against_quality.png").is_file()  # of the stages that have a place in it


def test_the_dtype_of_a_measurement_is_said_below_the_table(tmp_path: Path) -> None:
    values = measurements()
    same = "Measured in float32 on cpu; stored in bfloat16."
    assert same in card_of(tmp_path, values)
    assert same in rendered(stage_table(facts_from(values)))
    values["stages"][3]["measurement"] |= {"dtype": "bfloat16", "stored_dtypes": ["int32", "bfloat16"]}
    note = (
        "Measured in float32 on cpu (original, drop_layers, distill), bfloat16 on cpu (quantize); stored in bfloat16 "
        "(original, drop_layers, distill), int32, bfloat16 (quantize)."
    )
    assert note in card_of(tmp_path, values)
    assert note in " ".join(rendered(stage_table(facts_from(values))).split())
    assert "float32 on cpu" in rendered(measurement_table(facts_from(values).before))


OPTIONAL = (
    ["hfcompress", "created", "base_model_license", "data", "recipe", "seed", "loads_without_hfcompress",
     "verification", "quantization_report", "pruning_report", "tuning", "structure", "layers", "inputs", "weights"],
    ["summary", "seconds", "machine"],
    ["bytes_on_disk", "tokens_per_second", "speed_kind", "peak_memory_bytes", "continuation", "dtype",
     "stored_dtypes", "device", "machine", "rows", "tokens", "latency", "correct"],
)  # fmt: skip


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("name", [*OPTIONAL[0], *OPTIONAL[1], *OPTIONAL[2], "all"])
@pytest.mark.parametrize("null", [False, True], ids=["absent", "null"])
def test_a_card_without_optional_facts_makes_no_claim_about_them(tmp_path: Path, name: str, null: bool) -> None:
    values = measurements()
    stages = values["stages"]
    for holders, names in zip(([values], stages, [stage["measurement"] for stage in stages]), OPTIONAL):
        for holder in holders:
            for one in names if name == "all" else {name} & set(names):
                holder[one] = None
                if not null:
                    del holder[one]
    text = card_of(tmp_path, values)
    assert not re.search(r"\bNone\b|\bnull\b", text)
    assert ModelCard.load(tmp_path / "README.md").data.model_name == "smollm2-small"
    facts = facts_from(values)
    for shown in (stage_table(facts), measurement_table(facts.after)):
        assert "None" not in rendered(shown)
    if name in ("loads_without_hfcompress", "all"):
        assert "**Loads without hfcompress: not measured**" in text


def test_without_sizes_there_is_no_picture_and_no_claim_about_them(checkpoint: Path) -> None:
    write_model_card(checkpoint)
    values = measurements()
    for stage in values["stages"]:
        stage["measurement"]["bytes_on_disk"] = None
    text = card_of(checkpoint, values)
    assert "times smaller" not in text
    assert "113.3 M parameters instead of 134.5 M" in text
    assert not (checkpoint / "size_against_quality.png").exists()
    assert "![" not in text


def test_a_larger_model_is_not_called_smaller(tmp_path: Path) -> None:
    values = changed(measurements(), ("stages", 3, "measurement", "bytes_on_disk"), lambda _: 538_121_104)
    text = card_of(tmp_path, values)
    assert "2.0 times larger on disk (269.1 MB before, 538.1 MB after)" in text


def test_classifier_that_needs_hfcompress(tmp_path: Path) -> None:
    values = measurements()
    values |= {"task": "sequence-classification", "loads_without_hfcompress": False, "verification": {"stock": None},
               "base_model": "./local/bert", "base_model_license": None, "quantization_report": None,
               "data": {"files": {"train": ["data/train.tsv"], "held_out": ["data/test.tsv"]}}}  # fmt: skip
    values["recipe"]["stages"] = [{"finetune": {"steps": 3, "prune": {"sparsity": 0.8}}}]
    for stage in values["stages"]:
        stage["measurement"] |= {"metrics": {"accuracy": 0.91234, "f1": 0.90004}, "continuation": None, "tokens": 0}
    text = card_of(tmp_path, values)
    lines = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert lines
    assert lines.group(1).splitlines()[0].startswith("import hfcompress")
    assert len(lines.group(1).splitlines()) == 4
    assert "\n\nInstall hfcompress first, as its README says.\n\n```python" in text
    assert "pip install hfcompress" not in text  # nothing of that name has been released
    assert "**Loads without hfcompress: no** (reload: not measured)" in text
    assert "accuracy 0.9123 before" in text
    assert "Quantization error" not in text
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model is None
    assert data.license is None
    assert data.datasets is None
    assert data.tags == ["hfcompress", "pruned"]
    assert "base_model_relation" not in data.to_dict()
    assert {result.dataset_name for result in data.eval_results} == {"test.tsv"}  # what the metrics are of


def test_a_model_with_code_of_its_own_is_loaded_by_lines_that_allow_it(tmp_path: Path) -> None:
    values = measurements()
    assert "trust_remote_code" not in card_of(tmp_path, values)
    values["recipe"]["model"] = {"id": "a/b", "trust_remote_code": True}
    assert card_of(tmp_path, values).count('runs/smollm2-small", trust_remote_code=True)') == 2
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Own"}}))
    assert card_of(tmp_path, values | {"recipe": None}).count(", trust_remote_code=True)") == 2


def test_the_page_says_which_data_model_and_teacher_exactly(tmp_path: Path) -> None:
    values = measurements()
    values["data"]["revision"] = "a1b2c3d4"
    values["inputs"]["teacher of stage distill"] = "big/teacher@0f0f0f 5e5e5e5e"
    text = card_of(tmp_path, values)
    assert "Data: `Salesforce/wikitext wikitext-2-raw-v1`, revision `a1b2c3d4`, content `Salesforce/" in text
    assert "content `HuggingFaceTB/SmolLM2-135M@d4e5f6`" in text
    assert "Teacher of stage distill: content `big/teacher@0f0f0f` and `5e5e5e5e`." in text


def test_a_stage_that_ran_on_another_machine_says_so(tmp_path: Path) -> None:
    values = measurements()
    values["stages"][1]["machine"] = MACHINE
    assert "Not run on what measured it" not in card_of(tmp_path, values)
    values["stages"][2]["machine"] = {**MACHINE, "cpu": "Fast GPU host", "threads": 64}
    text = card_of(tmp_path, values)
    assert "- Not run on what measured it: distill, on Fast GPU host, 2 cores, 64 threads, Linux x86_64" in text
    assert text.count("Not run on what measured it") == 1


def test_times_of_an_unknown_machine_are_no_plain_facts(tmp_path: Path) -> None:
    values = measurements()  # the first stage has no time
    note = "On which machine the stages ran was not recorded, so their times are upper bounds at best.\n"
    assert note in card_of(tmp_path, values)
    for stage in values["stages"][:3]:
        stage["machine"] = MACHINE
    note = "On which machine quantize ran was not recorded, so its time is an upper bound at best.\n"
    assert note in card_of(tmp_path, values)
    values["stages"][3]["machine"] = MACHINE
    assert "was not recorded" not in card_of(tmp_path, values)


def test_text_from_outside_cannot_break_the_page(tmp_path: Path) -> None:
    values = measurements()
    values["stages"][1]["summary"] = "a | b\nc"
    values["stages"][3]["measurement"]["continuation"] = "```\n# not a heading"
    text = card_of(tmp_path, values)
    assert r"| drop_layers | a \| b c | 0.8 s |" in text
    assert "`` Sort a `list` by ``" in text
    assert "````text\n```\n# not a heading\n````" in text


def test_absolute_output_folders_stay_off_the_loading_example(tmp_path: Path) -> None:
    values = changed(measurements(), ("recipe", "output"), lambda _: "/home/somebody/runs/x")
    save(tmp_path, values)
    assert 'from_pretrained("smollm2-small")' in write_model_card(tmp_path).read_text()
    assert 'from_pretrained("me/small")' in write_model_card(tmp_path, repo_id="me/small").read_text()


def test_card_needs_no_network(checkpoint: Path, forks: Forks) -> None:
    code = (
        "import socket, sys; socket.socket.connect = lambda *a: sys.exit('network used'); "
        f"from hfcompress.publish import write_model_card; write_model_card({str(checkpoint)!r})"
    )
    run = forks.run(["-c", code])
    assert run.returncode == 0, run.stderr
    assert (checkpoint / "README.md").is_file()


def test_missing_measurements_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no measurements\.json"):
        load_facts(tmp_path)


def test_all_faults_of_the_measurements_are_named_at_once() -> None:
    values = measurements()
    del values["task"]
    values["seed"] = "seven"
    with pytest.raises(DataError, match=r"2 faults: task: is missing; seed: is a str, not int or null"):
        facts_from(values)
    values = measurements()
    del values["stages"][1]["measurement"]["nonzero"]
    values["stages"][2]["measurement"]["metrics"] = None
    with pytest.raises(DataError, match=r"\[1\]: measurement.nonzero: is missing; stages\[2\]: measurement.metrics"):
        facts_from(values)
    with pytest.raises(DataError, match="stages: is empty"):
        facts_from(measurements() | {"stages": []})


@pytest.mark.parametrize("missing", [False, True], ids=["whole", "with gaps"])
@pytest.mark.parametrize("metrics", [["perplexity"], ["accuracy", "f1"], ["accuracy", "f1", "matthews_correlation"]])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_nothing_in_the_stage_table_is_cut(width: int, metrics: list[str], missing: bool) -> None:
    values = measurements()
    for index, stage in enumerate(values["stages"]):
        stage["measurement"]["metrics"] = dict.fromkeys(metrics, 0.1234 + index)
    if missing:
        values["stages"][1]["measurement"] |= {"bytes_on_disk": None, "peak_memory_bytes": None}
    facts = facts_from(values)
    text = rendered(stage_table(facts), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\u2026" not in text
    words = text.split()
    for header in stage_headers(facts):
        assert set(header.split()) <= set(words), header
    for stage in facts.stages:
        for cell in stage_cells(facts, stage):
            assert cell in text or (cell == "not measured" and "measured" in text), cell


def test_stage_table_fits_a_hundred_columns() -> None:
    values = measurements()
    for stage in values["stages"]:
        stage["measurement"]["metrics"] = {"accuracy": 0.9123, "f1": 0.9001}
    text = rendered(stage_table(facts_from(values)))
    assert max(map(len, text.splitlines())) <= 100
    for needed in ("drop_layers", "quantize", "102.3 MB", "113.3 M", "0.9123", "41.8", "tokens/s: decode, batch 1"):
        assert needed in text
    assert len(text.splitlines()) <= 11  # no cell is broken into two lines


def test_measurement_table_shows_every_number() -> None:
    text = rendered(measurement_table(facts_from(measurements()).after))
    for needed in ("113.3 M", "105.0 M", "7.3%", "102.3 MB", "40.83", "64, 32,768", "41.8", "987.7 MB"):
        assert needed in text


def test_picture_is_drawn_whole_or_not_at_all(tmp_path: Path) -> None:
    facts = facts_from(measurements())
    path = plot_size_against_quality(facts, tmp_path / "plot.png")
    assert path == tmp_path / "plot.png"
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == tuple(round(150 * inches) for inches in PICTURE_INCHES)
    one_stage = facts_from(measurements() | {"stages": measurements()["stages"][:1]})
    assert plot_size_against_quality(one_stage, tmp_path / "other.png") is None
