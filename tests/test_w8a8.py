"""Eight bits for weights and inputs, with and without scales moved into the norms before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hfcompress
from hfcompress.errors import ModelError
from hfcompress.evaluate.size import model_size
from hfcompress.packed.bytes import ByteLinear, byte_layers, rounded_inputs
from hfcompress.quantization import AWQ, RTN, Float8, SmoothQuant, quantize
from hfcompress.quantization.folding import find_norm_folds, fold_
from hfcompress.quantization.smoothquant import smoothing_scale
from hfcompress.structure.running import watching
from hfcompress.structure.stack import layer_stacks
from tests.conftest import tiny_bert, tiny_llama, token_batches
from tests.families import FAMILIES, inputs_of
from tests.uneven import cut_llama, llama


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with watching(model):
        return model(**inputs).logits


def with_outliers(model: PreTrainedModel) -> PreTrainedModel:
    """Make a few features of the residual stream 30 times as large, as they are in large models."""
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[:3] *= 30
    return model


def test_smoothing_helps_where_inputs_have_outliers() -> None:
    inputs = {"input_ids": token_batches(count=1)[0]["input_ids"]}
    expected = outputs(with_outliers(tiny_llama()), inputs)
    errors = {}
    for method in (RTN(activations=8), SmoothQuant()):
        model = with_outliers(tiny_llama())
        quantize(model, method, calibration=[inputs])
        errors[type(method)] = float((outputs(model, inputs) - expected).norm())
    assert errors[SmoothQuant] < 0.7 * errors[RTN]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "count"), [("llama", 2), ("gemma3", 2), ("gpt_neox", 2), ("vit", 2), ("bert", 0), ("deberta_v2", 0)]
)
def test_folds_are_found_and_change_nothing(family: str, count: int, dtype: torch.dtype) -> None:
    """Post-norm layers of BERT add the norm's output to what comes after, so there is no fold."""
    model, inputs = FAMILIES[family].model().to(dtype), inputs_of(FAMILIES[family])
    inputs = {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}
    layer = layer_stacks(model)[0].layers[1]
    seen: list = []
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    expected = outputs(model, inputs)
    handle.remove()
    args, kwargs = seen[0]

    def run() -> Tensor:
        output = layer(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    with torch.no_grad():
        folds = find_norm_folds(layer, run)
    assert len(folds) == count
    assert torch.equal(outputs(model, inputs), expected)
    before = [one.detach().clone() for one in model.parameters()]
    changes: dict = {}
    random = torch.Generator().manual_seed(0)
    for fold in folds:
        width = len(fold.norm.weight)
        fold_(fold, torch.rand(width, generator=random) * 4 + 0.1, changes)
    assert sum(not torch.equal(one, other) for one, other in zip(model.parameters(), before)) >= 2 * count
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert float((outputs(model, inputs) - expected).norm()) <= tolerance * float(expected.norm())


def test_smoothing_scale_is_the_papers() -> None:
    weights = [torch.tensor([[1.0, -4.0], [0.5, 2.0]]), torch.tensor([[-2.0, 1.0]])]
    scale = smoothing_scale(torch.tensor([8.0, 1.0]), weights, 0.5)
    assert float(scale[0] / scale[1]) == pytest.approx((8 / 2) ** 0.5 / (1 / 4) ** 0.5)
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-6)
    assert smoothing_scale(torch.tensor([0.0, 5.0]), weights, 0.5)[0] == 1


def test_inputs_are_rounded_token_by_token_and_let_gradients_pass() -> None:
    inputs = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = rounded_inputs(inputs, "int")
    steps = inputs.abs().amax(-1, keepdim=True) / 127.5
    assert bool(((rounded - inputs).abs() <= 1.001 * steps).all())
    codes = (rounded / steps).detach()
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    rounded.sum().backward()
    assert torch.equal(inputs.grad, torch.ones_like(inputs))
    assert not rounded_inputs(torch.zeros(1, 2, 4), "int").any()


@pytest.mark.usefixtures("few_tokens_are_fine")
@pytest.mark.parametrize("method", [SmoothQuant(), AWQ(group_size=16)], ids=["smoothquant", "awq"])
def test_a_failure_brings_norms_and_weights_back(method: SmoothQuant | AWQ) -> None:
    model = with_outliers(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop(name: str, rows: object) -> None:
        if name.endswith(".1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, method, calibration=token_batches(count=1), on_layer=stop)
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in now)


def test_what_stock_could_not_run_is_refused() -> None:
    for family, reason in (("t5", "generate calls by itself"), ("gpt2", "is a Conv1D")):
        with pytest.raises(ModelError, match=reason):
            quantize(FAMILIES[family].model(), RTN(activations=8))
    with pytest.raises(ModelError, match="float8 does not survive"):
        quantize(FAMILIES["t5"].model(), hfcompress.Float8())
    with pytest.raises(ValueError, match="activations=8 goes with bits=8"):
        RTN(bits=4, activations=8)


@pytest.mark.parametrize("method", [SmoothQuant(), RTN(activations=8), Float8()])
def test_uneven_models_are_refused_before_anything_changes(method: object) -> None:
    """Our loader, which alone reads uneven shapes, reads no 8-bit inputs or float8 codes."""
    model = cut_llama(llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match="shapes that its config cannot say"):
        quantize(model, method, token_batches() if isinstance(method, SmoothQuant) else None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", [RTN(activations=8), SmoothQuant()], ids=["rtn", "smoothquant"])
def test_the_report_tells_the_error_of_the_weight_that_is_rounded(method: RTN | SmoothQuant) -> None:
    """With calibration, too: SmoothQuant sees the largest inputs alone, which tell no error of the output."""
    model = with_outliers(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = quantize(model, method, calibration=token_batches(count=1))
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    for row in report.rows:
        layer, block, linear = row.name.rsplit(".", 2)
        norm = f"{layer}.{norms[block]}.weight"
        reads_norm = linear not in ("o_proj", "down_proj")
        smooth = before[f"{row.name}.weight"] * (before[norm] / model.state_dict()[norm] if reads_norm else 1)
        change = (byte_layers(model)[row.name].dequantize() - smooth).norm() / smooth.norm()
        assert row.relative_error == pytest.approx(float(change), rel=1e-3)
        assert (row.damping, row.tokens > 0) == (None, isinstance(method, SmoothQuant))


def test_nothing_to_smooth_is_said() -> None:
    with pytest.warns(UserWarning, match=r"No norm of BertForSequenceClassification .* this is RTN"):
        quantize(tiny_bert(), SmoothQuant(), calibration=[inputs_of(FAMILIES["bert"])])


def test_checkpoints_are_counted(tmp_path: Path) -> None:
    model = tiny_llama()
    expected = sum(parameter.numel() for parameter in model.parameters())
    report = quantize(model, RTN(activations=8, exclude=("*.1.*",)))
    assert {row.name for row in report.rows} == set(byte_layers(model))
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, ByteLinear)
    saved = hfcompress.save_compressed(model, tmp_path / "out")
    summary = hfcompress.inspect_checkpoint(tmp_path / "out")
    assert saved.format == summary.format == "compressed-tensors int-quantized"
    assert summary.parameters == model_size(model).parameters == expected
    assert summary.nonzero == model_size(model).nonzero
    with pytest.raises(ModelError, match="quantized already"):
        quantize(model, RTN())
