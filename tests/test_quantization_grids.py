"""Zero points, searched scales, Conv1D, embeddings and heads: what each promises, against plain references."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import hfcompress
from hfcompress.calibration.hessian import relative_error
from hfcompress.errors import ModelError
from hfcompress.packed import PackedEmbedding, code_range, packed_layers
from hfcompress.quantization import GPTQ, RTN, quantize, round_to_nearest
from hfcompress.quantization.conv1d import gptq_conv1d
from hfcompress.quantization.gptq import gptq_siblings
from hfcompress.quantization.grids import Rounded
from tests.conftest import tiny_llama, token_batches
from tests.families import FAMILIES, inputs_of
from tests.reloading import Case, Cases, reload_all, same_but_for_rounding
from tests.test_gptq import problem


def values(rounded: Rounded) -> Tensor:
    codes, scale, points = rounded
    groups = codes.float().view(len(codes), scale.shape[1], -1)
    points = torch.zeros_like(scale) if points is None else points.float()
    return ((groups - points.unsqueeze(-1)) * scale.unsqueeze(-1)).view(codes.shape)


pytestmark = pytest.mark.usefixtures("few_tokens_are_fine", "forked")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_bound_the_error_by_the_spread_of_the_group(bits: int) -> None:
    """Half a step of the spread, and up to half a step more because the zero point is a whole number."""
    weight = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    weight[0] = -weight[0]
    weight[:, ::7] = 0
    rounded = round_to_nearest(weight, bits, 16, symmetric=False)
    spread = weight.view(8, 4, 16).clamp_min(0).amax(-1) + (-weight).view(8, 4, 16).clamp_min(0).amax(-1)
    bound = (spread / (2**bits - 1)).repeat_interleave(16, dim=1)
    assert bool(((values(rounded) - weight).abs() <= bound * 1.001).all())
    assert not values(rounded)[weight == 0].any()
    low, high = code_range(bits)
    assert low <= int(rounded.codes.min()) <= int(rounded.codes.max()) <= high
    # All values on one side of zero: zero points win what a symmetric grid wastes on the other, one code of 2 bits.
    assert relative_error(weight, values(rounded)) < (0.8 if bits == 2 else 0.7) * relative_error(
        weight, values(round_to_nearest(weight, bits, 16))
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, None])
def test_a_searched_scale_never_loses_to_the_widest(symmetric: bool, group_size: int | None) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) ** 3
    widest = round_to_nearest(weight, 3, group_size, symmetric)
    searched = round_to_nearest(weight, 3, group_size, symmetric, "mse")
    lost = [(values(one) - weight).square().sum(1) for one in (searched, widest)]
    assert bool((lost[0] <= lost[1] * (1 + 1e-5)).all())
    assert float(lost[0].sum()) < 0.95 * float(lost[1].sum())


@pytest.mark.parametrize("prunes", [False, True])
@pytest.mark.parametrize("group_size", [32, None])
def test_gptq_with_zero_points_beats_rounding_and_keeps_zeros(group_size: int | None, prunes: bool) -> None:
    weight, hessian = problem()
    weight += 0.02 * (torch.arange(24) % 2).unsqueeze(1)
    if prunes:
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5] = 0
    (result,) = gptq_siblings([weight], hessian, 3, group_size, symmetric=False)
    assert result.relative_error == pytest.approx(relative_error(weight, values(result.rounded), hessian), rel=1e-4)
    nearest = values(round_to_nearest(weight, 3, group_size, False, "mse"))
    assert result.relative_error < relative_error(weight, nearest, hessian)
    assert not values(result.rounded)[weight == 0].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, None])
def test_gptq_of_a_conv1d_beats_rounding_in_the_same_layout(symmetric: bool, group_size: int | None) -> None:
    weight, hessian = problem()
    (result,) = gptq_conv1d([weight], hessian, 3, group_size, symmetric=symmetric)
    assert result.codes.shape == weight.T.shape
    assert result.relative_error == pytest.approx(relative_error(weight, values(result.rounded).T, hessian), rel=1e-4)
    nearest = values(round_to_nearest(weight.T, 3, group_size, symmetric, "mse")).T
    assert result.relative_error < relative_error(weight, nearest, hessian)


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def tokens_of(model: PreTrainedModel) -> dict[str, Tensor]:
    batch = inputs_of(FAMILIES["t5"]) if model.config.is_encoder_decoder else token_batches(count=1)[0]
    return {name: value for name, value in batch.items() if name != "labels"}


OUTSIDE = {
    "tied": (lambda: tiny_llama(), {"embeddings": True}, {"model.embed_tokens", "lm_head"}),
    "tied by its head": (lambda: tiny_llama(), {"head": True}, {"model.embed_tokens", "lm_head"}),
    "head": (lambda: tiny_llama(tie_word_embeddings=False), {"head": True}, {"lm_head"}),
    "both": (
        lambda: tiny_llama(tie_word_embeddings=False),
        {"embeddings": True, "head": True},
        {"model.embed_tokens", "lm_head"},
    ),
    "t5": (
        lambda: FAMILIES["t5"].model(),
        {"embeddings": True},
        {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"},
    ),
}


OUTSIDE_CASES = [(case, method) for case in OUTSIDE for method in ("rtn", "gptq")]


def outside_case(case: str, method: str, folder: Path) -> Case:
    make, options, _ = OUTSIDE[case]
    model = make().eval()
    batch = tokens_of(model)
    kind = {"rtn": RTN, "gptq": GPTQ}[method]
    report = quantize(model, kind(bits=4, group_size=16, symmetric=case != "both", **options), calibration=[batch])
    return Case.write(folder, model, report, batch)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    root = tmp_path_factory.mktemp("outside")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*calibration tokens are fewer")
        warnings.filterwarnings("ignore", message="Group sizes that do not divide")
        made = {case: outside_case(*case, root / "-".join(case)) for case in OUTSIDE_CASES}
    reload_all(root, tmp_path_factory.mktemp("empty"))
    return made


@pytest.mark.parametrize(("case", "method"), OUTSIDE_CASES)
def test_embeddings_and_heads_are_packed_and_come_back(case: str, method: str, outside: Cases) -> None:
    """From stock Transformers, in a process without hfcompress, too."""
    written, expected = outside[case, method], OUTSIDE[case][2]
    model = written.model
    found = {name for name in packed_layers(model) if "layers." not in name and "block." not in name}
    assert found == expected
    state = load_file(written.folder / "model" / "model.safetensors")
    copies = {name for name in expected if f"{name}.weight_packed" in state}
    assert len(copies) == (1 if model.config.tie_word_embeddings else len(expected))
    assert not any(f"{name}.weight" in state for name in expected)
    assert len({row.name for row in written.report.rows}) == len(written.report.rows)
    written.saved_alike()
    for plugins in (0, 1):
        written.reloads_alike(plugins)
    written.saved_again_alike()


def test_embeddings_of_pixels_and_scaled_ones_are_refused() -> None:
    with pytest.raises(ModelError, match="embeddings=True, but ViTForImageClassification has no embeddings over"):
        quantize(FAMILIES["vit"].model(), RTN(embeddings=True))
    with pytest.raises(ModelError, match="is a Gemma3TextScaledWordEmbedding, which has no packed form yet"):
        quantize(FAMILIES["gemma3"].model(), RTN(embeddings=True))


def test_a_failure_brings_tied_embeddings_back() -> None:
    model = tiny_llama()

    def stop(name: str, rows: object) -> None:
        if name == "model.embed_tokens":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, RTN(embeddings=True), on_layer=stop)
    assert not packed_layers(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_stock_transformers_cannot_read_is_left_to_our_loader(tmp_path: Path) -> None:
    """ModernBERT reads weights before the first call, where stock Transformers would unpack two schemes."""
    model, inputs = FAMILIES["modernbert"].model(), inputs_of(FAMILIES["modernbert"])
    quantize(model, RTN(bits=4, group_size=32))
    saved = hfcompress.save_compressed(model, tmp_path / "out", verify=True)
    assert saved.format == "hfcompress pack-quantized"
    assert saved.verification is not None
    assert saved.verification.with_hfcompress
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_trained_weights_are_saved_dense_and_say_so(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize(model, RTN(bits=4))
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    weight = again.model.layers[1].mlp.up_proj.weight
    weight.data[3, 5] += 1e-3
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.mlp\.up_proj\.weight was changed since it was loaded"):
        again.save_pretrained(tmp_path / "trained")
    again.save_pretrained(tmp_path / "trained")  # as a Trainer does at its next checkpoint
    assert "quantization_config" not in json.loads((tmp_path / "trained" / "config.json").read_text())
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(third.model.layers[1].mlp.up_proj.weight, weight)


def test_a_model_unpacked_at_its_first_call_is_packed_when_saved(tmp_path: Path) -> None:
    model = tiny_llama(intermediate_size=80)
    quantize(model, RTN(bits=4, group_size=32))  # two group sizes, so stock Transformers unpacks at the first call
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, tokens_of(model)), logits(model, tokens_of(model)))
    again.save_pretrained(tmp_path / "again")
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("packed", "again")]
    assert configs[0] == configs[1]
    for fresh in (AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), again):
        saved = hfcompress.save_compressed(fresh, tmp_path / "out", verify=True)
        assert saved.format == "compressed-tensors pack-quantized"
        assert load_file(tmp_path / "out" / "model.safetensors").keys() == states[0].keys()


def test_a_reloaded_model_is_saved_and_verified_by_save_compressed(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize(model, RTN(bits=4, embeddings=True))
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    saved = hfcompress.save_compressed(again, tmp_path / "out", verify=True)
    assert saved.format == "compressed-tensors pack-quantized"
    assert saved.verification is not None
    assert same_but_for_rounding(saved.verification)
    with pytest.raises(ModelError, match="quantized already"):
        quantize(again, RTN())
    assert not hasattr(again.dequantize().config, "quantization_config")
