"""Bits chosen for each layer: below the target as stored, alike where inputs are, and the same after a kill."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import hfcompress
from hfcompress.calibration import factor_hessian, walk_layers
from hfcompress.errors import CheckpointError, ModelError
from hfcompress.packed import packed_layers
from hfcompress.packed.weight import PARTS
from hfcompress.publish import load_facts
from hfcompress.publish.pictures import bits_rows
from hfcompress.quantization import GPTQ, mixed, sensitivity
from hfcompress.quantization.gptq import gptq
from hfcompress.quantization.plan import plan_linears
from tests.conftest import tiny_llama, token_batches
from tests.families import FAMILIES, inputs_of
from tests.here import compress_here
from tests.reloading import Case, Cases, reload_all
from tests.runs import language_recipe

AUTO = GPTQ(bits="auto", average_bits=4.5, group_size=32)


@pytest.fixture(autouse=True)
def _few_tokens() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*calibration tokens are fewer")
        warnings.filterwarnings("ignore", message="Group sizes that do not divide")
        yield


def uneven_llama(**changes: Any) -> PreTrainedModel:
    """Return a model of four layers, of which every other adds much more to the hidden states."""
    model = tiny_llama(layers=4, **changes)
    with torch.no_grad():
        for layer in model.model.layers[1::2]:
            layer.mlp.down_proj.weight.mul_(8)
    return model


def stored_bytes(model: PreTrainedModel) -> int:
    """Count what the packed layers hold, parts of tied ones once."""
    parts = [getattr(one, part) for one in packed_layers(model).values() for part in PARTS if hasattr(one, part)]
    return sum(part.nbytes for part in {part.data_ptr(): part for part in parts}.values())


def weights(model: PreTrainedModel) -> int:
    return sum(one.rows * one.columns for one in packed_layers(model).values())


def bits_of(model: PreTrainedModel) -> dict[str, int]:
    return {name: one.bits for name, one in packed_layers(model).items()}


@pytest.mark.parametrize("average", [3.4, 4.5, 6.0, 8.0])
def test_what_is_stored_stays_below_the_average_and_spends_most_of_it(average: float) -> None:
    model = uneven_llama()
    report = hfcompress.quantize(model, GPTQ(bits="auto", average_bits=average, group_size=32), token_batches(8))
    stored = 8 * stored_bytes(model) / weights(model)
    assert average - 0.25 < stored <= average
    assert {row.name: row.bits for row in report.rows} == bits_of(model)
    assert len(set(bits_of(model).values())) > 1


def test_what_is_stored_stays_below_the_megabytes_head_included() -> None:
    model = uneven_llama(tie_word_embeddings=False)
    dense = sum(one.weight.numel() for one in [*_linears(model), model.lm_head])
    method = GPTQ(bits="auto", megabytes=5 * dense / 8e6, group_size=32, head=True)
    hfcompress.quantize(model, method, token_batches(8))
    assert 0.9 * method.megabytes < stored_bytes(model) / 1e6 <= method.megabytes
    assert bits_of(model)["lm_head"] == 8
    assert len(set(bits_of(model).values())) > 1


def _linears(model: PreTrainedModel) -> list[Any]:
    return [one for one in model.model.layers.modules() if isinstance(one, torch.nn.Linear)]


def test_layers_that_see_the_same_input_get_the_same_bits_and_others_their_own() -> None:
    model = uneven_llama()
    hfcompress.quantize(model, AUTO, token_batches(8))
    bits = bits_of(model)
    for index in range(4):
        layer = f"model.layers.{index}"
        assert len({bits[f"{layer}.self_attn.{one}_proj"] for one in "qkv"}) == 1
        assert bits[f"{layer}.mlp.gate_proj"] == bits[f"{layer}.mlp.up_proj"]
    for matters, other in ((1, 0), (3, 2)):
        assert bits[f"model.layers.{matters}.mlp.down_proj"] > bits[f"model.layers.{other}.mlp.down_proj"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_that_is_put_in_is_about_what_gptq_leaves(bits: int) -> None:
    model = tiny_llama(layers=1)
    visit = next(iter(walk_layers(model, token_batches(64))))
    planned = {one.name: one for one in plan_linears(model, GPTQ(bits=8, group_size=32))}
    for found in visit.input_hessians():
        factor = factor_hessian(found.hessian, 0.01)
        for name in found.names:
            one = planned[f"{visit.name}.{name}"]
            rounding = sensitivity.rounding_errors(one, bits, factor.strength)
            left = sensitivity.left_by_gptq(rounding, factor)
            size = float((left @ found.hessian).mul(left).sum())
            energy = float((one.weight @ found.hessian).mul(one.weight).sum())
            result = gptq(one.weight, found.hessian, bits, 32)
            assert (size / energy) ** 0.5 == pytest.approx(result.relative_error, rel=0.25)


def test_a_loss_is_the_share_of_the_hidden_states_that_rounding_changes() -> None:
    """Compared with the block's output once GPTQ has rounded these layers and no others."""
    model = tiny_llama(layers=2)
    batches = token_batches(64)
    planned = plan_linears(model, AUTO)
    measured = sensitivity.measure_losses(model, planned, AUTO, batches)
    losses = {one.layers[0].name: one.losses for one in measured}["model.layers.1.self_attn.o_proj"]

    def output() -> torch.Tensor:
        *_, last = walk_layers(model, batches[:1])
        return last.rows(0, last.output(0).detach())

    dense = output()
    others = tuple(one.name for one in planned if not one.name.endswith("1.self_attn.o_proj"))
    hfcompress.quantize(model, GPTQ(bits=3, group_size=32, exclude=others), batches)
    share = ((output() - dense).square().sum(-1) / dense.square().sum(-1)).mean()
    assert losses[3] == pytest.approx(float(share), rel=0.4)
    assert losses[2] > 2 * losses[3] > 4 * losses[4] > 8 * losses[8]


def test_measuring_leaves_the_model_as_it_is_and_the_choice_loses_less_than_three_bits() -> None:
    model = uneven_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned = plan_linears(model, AUTO)
    measured = sensitivity.measure_losses(model, planned, AUTO, token_batches(8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    chosen = mixed.choose_bits(planned, measured, AUTO)
    assert sum(one.losses[chosen[one.layers[0].name]] for one in measured) < sum(one.losses[3] for one in measured)


@pytest.mark.parametrize(
    "options",
    [{"quality": "best"}, {"order": "groups"}, {"sweeps": 2}, {"group_size": None}, {"choices": (4, 8)}],
    ids=lambda options: next(iter(options)),
)
def test_it_goes_with_the_other_options(options: dict[str, Any]) -> None:
    model = uneven_llama()
    method = GPTQ(**{"bits": "auto", "average_bits": 5.5, "group_size": 32, **options})
    hfcompress.quantize(model, method, token_batches(8))
    assert 8 * stored_bytes(model) / weights(model) <= 5.5
    assert set(bits_of(model).values()) <= set(method.candidates)


def test_it_goes_with_pruning_in_the_same_pass() -> None:
    model = uneven_llama()
    hfcompress.quantize(model, AUTO, token_batches(8), prune=hfcompress.SparseGPT(sparsity=0.5))
    assert 8 * stored_bytes(model) / weights(model) <= 4.5
    for one in packed_layers(model).values():
        assert one.nonzero() <= 0.52 * one.rows * one.columns
    assert len(set(bits_of(model).values())) > 1


RELOADED = ("llama", "bert", "gpt_neox", "vit")


def test_outputs_that_overflow_are_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(sensitivity, "left_by_gptq", lambda rounding, factor: rounding * torch.inf)
    with pytest.raises(ModelError, match=r"q_proj, .*: model\.layers\.0 overflows torch\.float32"):
        hfcompress.quantize(model, GPTQ(bits="auto", average_bits=4.5, group_size=16), calibration=token_batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    root, cases = tmp_path_factory.mktemp("mixed"), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in RELOADED:
            model, inputs = FAMILIES[family].model(), inputs_of(FAMILIES[family])
            report = hfcompress.quantize(model, GPTQ(bits="auto", average_bits=5.0, group_size=16), [inputs])
            cases[family, "auto"] = Case.write(root / family, model, report, inputs, "logits")
    reload_all(root, tmp_path_factory.mktemp("empty"))
    return cases


@pytest.mark.parametrize("family", RELOADED)
def test_stock_reload_gives_the_same_logits_and_ours_saves_it_packed_again(family: str, reloaded: Cases) -> None:
    case = reloaded[family, "auto"]
    assert len({row.bits for row in case.report.rows}) > 1
    groups = case.model.config.quantization_config["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {row.bits for row in case.report.rows}
    case.saved_alike()
    case.reloads_alike(plugins=0)
    case.reloads_alike(plugins=1)
    case.saved_again_alike()


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gpt2", {}, "reads Conv1D layers only where all have the same"),
        ("t5", {}, "reads encoder-decoders only where all have the same"),
        ("llama", {"average_bits": 2.0}, r"average_bits=2 is out of reach: with 2 to 8 bits a code, the \d+ layers"),
        ("llama", {"average_bits": 12.0}, r"take [\d.]+ to [\d.]+ bits a weight, scales included"),
        ("llama", {"average_bits": None, "megabytes": 900}, r"megabytes=900 is out of reach: .* to 0\.\d+ MB"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    family: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "measure_losses", None)
    spec = FAMILIES[family]
    model, inputs = spec.model(), inputs_of(spec)
    method = GPTQ(**{"bits": "auto", "average_bits": 5.0, "group_size": 16, **options})
    with pytest.raises(ModelError, match=reason):
        hfcompress.quantize(model, method, [inputs])
    assert not packed_layers(model)


def test_a_head_that_is_tied_to_embeddings_is_refused() -> None:
    with pytest.raises(ModelError, match="reads Embedding layers only where all have the same"):
        hfcompress.quantize(tiny_llama(), replace(AUTO, head=True), token_batches(8))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": "auto"}, "needs one target, either average_bits or megabytes, not neither"),
        ({"bits": "auto", "average_bits": 3.5, "megabytes": 60}, "not average_bits=3.5 and megabytes=60"),
        ({"bits": 4, "average_bits": 3.5}, "average_bits=3.5 goes with bits='auto', which chooses for it, not with 4"),
        ({"bits": 4, "choices": (4, 8)}, r"choices=\(4, 8\) goes with bits='auto'"),
        ({"bits": "auto", "average_bits": 3.5, "choices": (4, 4)}, "names one number of bits twice"),
        ({"bits": "auto", "average_bits": 3.5, "symmetric": False}, "goes with symmetric=True"),
        ({"bits": "auto", "average_bits": 3.5, "embeddings": True}, "embeddings=False: stock Transformers reads"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        GPTQ(**options)


class StoppedError(Exception):
    """What a test raises in the middle."""


def stop(name: str, rows: Any) -> None:
    raise StoppedError


def test_a_run_that_goes_on_keeps_its_choice_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = uneven_llama()
    hfcompress.quantize(whole, AUTO, token_batches(8))
    with pytest.raises(StoppedError):
        hfcompress.quantize(uneven_llama(), AUTO, token_batches(8), on_layer=stop, shards=tmp_path)
    resumed = uneven_llama()
    with monkeypatch.context() as patched:
        patched.setattr(mixed, "measure_losses", None)  # it is not measured again
        hfcompress.quantize(resumed, AUTO, token_batches(8), shards=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name

    for damaged in ("{", "{}"):
        (tmp_path / "bits.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"bits\.json is damaged.* Remove it to have the bits chosen again"):
            hfcompress.quantize(uneven_llama(), AUTO, token_batches(8), shards=tmp_path)
    (tmp_path / "bits.json").unlink()
    again = uneven_llama()
    hfcompress.quantize(again, AUTO, token_batches(8), shards=tmp_path)
    assert bits_of(again) == bits_of(whole)


def test_a_recipes_card_draws_the_bits_of_its_checkpoint(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"method": "gptq", "bits": "auto", "average_bits": 4.5, "group_size": 32}
    stages = [{"quantize": {**stage, "calibration_rows": 8, "calibration_length": 32}}]
    recipe = language_recipe(sources / "llama", sources / "text.jsonl", tmp_path / "out", stages=stages)
    folder = compress_here(recipe, monkeypatch)
    assert (folder / "bits.png").read_bytes().startswith(b"\x89PNG")
    assert "![Bits of each linear layer](bits.png)" in (folder / "README.md").read_text()
    stored: dict[str, dict[int, int]] = {}
    state = load_file(folder / "model.safetensors")
    for name, packed in state.items():
        if name.endswith(".weight_packed"):
            _, _, layer, linear = name.removesuffix(".weight_packed").split(".", 3)
            columns = int(state[name.replace("weight_packed", "weight_shape")][1])
            stored.setdefault(linear, {})[int(layer)] = 32 * packed.shape[1] // columns
    assert bits_rows(load_facts(folder)) == stored
