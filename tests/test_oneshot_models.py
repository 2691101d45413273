"""One-shot pruning of whole models: every family, each layer calibrated on pruned ones, faults told by name."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hfcompress
from hfcompress.errors import DataError, ModelError
from hfcompress.packed import packed_layers
from hfcompress.pruning.oneshot import METHODS, Magnitude, PruningReport, SparseGPT, Wanda, apply, prune
from hfcompress.quantization import GPTQ, RTN, quantize
from hfcompress.structure import stack_linears
from tests.conftest import VOCABULARY_SIZE, tiny_bert, tiny_llama, token_batches
from tests.families import FAMILIES
from tests.test_calibration import padded_batches

Method = Magnitude | Wanda | SparseGPT
ONE_OF_EACH: dict[str, Method] = {
    "magnitude": Magnitude(0.4),
    "wanda": Wanda(0.4),
    "sparsegpt": SparseGPT(0.4),
    "sparsegpt-2:4": SparseGPT(0.5, "2:4"),
    "wanda-4:8": Wanda(0.5, "4:8"),
}


pytestmark = pytest.mark.usefixtures("few_tokens_are_fine")


def inputs_of(family: str) -> dict[str, Tensor]:
    """Return a batch that reaches every layer of a tiny model."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, VOCABULARY_SIZE, (4, 10), generator=generator)
    ids[:, -1] = 5  # CLIP reads a text at its end
    mask = torch.ones_like(ids)
    pixels = torch.randn(4, 3, 8, 8, generator=generator)
    decoder = {"decoder_input_ids": torch.randint(6, VOCABULARY_SIZE, (4, 7), generator=generator)}
    if family == "vit":
        return {"pixel_values": pixels}
    if family == "whisper":
        return {"input_features": torch.randn(4, 8, 32, generator=generator), **decoder}
    if family == "clip":
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return {"input_ids": ids, "attention_mask": mask, **(decoder if family in ("bart", "t5") else {})}


@torch.no_grad()
def outputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    out = model.eval()(**batch)
    return out.logits if hasattr(out, "logits") else out.logits_per_text


def rows_of(module: nn.Module) -> Tensor:
    """Return a weight as (out, in), whichever way it lies."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def zeros_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: rows_of(module) == 0 for name, module in stack_linears(model).items()}


def test_no_hessian_outlives_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    prune_, alive = apply._prune_by_sparsegpt_, {}

    def watched(siblings: Any, found: Any, method: SparseGPT) -> Any:
        layer = siblings[0].name.split(".")[2]
        assert {place for place, one in alive.items() if one() is not None and place[0] != layer} == set()
        alive[layer, siblings[0].name] = weakref.ref(found.hessian)
        return prune_(siblings, found, method)

    monkeypatch.setattr(apply, "_prune_by_sparsegpt_", watched)
    prune(tiny_llama(layers=3), SparseGPT(0.5), token_batches())
    assert len(alive) == 3 * 4
    assert all(one() is None for one in alive.values())


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_exactly_and_reloads_with_its_zeros(family: str, kind: str, tmp_path: Path) -> None:
    model, batch, method = FAMILIES[family].model(), inputs_of(family), ONE_OF_EACH[kind]
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    before = outputs(model, batch)
    report = prune(model, method, [batch] if method.needs_calibration else None)
    linears = stack_linears(model)
    assert [row.name for row in report.rows] == list(linears)
    for row, module in zip(report.rows, linears.values()):
        weight = rows_of(module)
        gone = weight == 0
        if method.pattern is not None:
            kept, group = map(int, method.pattern.split(":"))
            assert torch.equal((~gone).view(len(gone), -1, group).sum(-1).unique(), torch.tensor([kept])), row.name
        elif isinstance(method, Wanda):
            assert set(gone.sum(1).tolist()) == {int(0.4 * weight.shape[1] + 1e-9)}, row.name
        else:
            assert int(gone.sum()) == int(0.4 * weight.numel() + 1e-9), row.name
        assert (row.zeros, row.weights) == (int(gone.sum()), weight.numel())
        assert 0 < row.relative_error < 1
    for name, value in model.state_dict().items():
        if name.removesuffix(".weight") not in linears:
            assert torch.equal(value, dense[name]), name
        elif not isinstance(method, SparseGPT):
            assert torch.equal(value, dense[name].masked_fill(value == 0, 0)), name
    after = outputs(model, batch)
    assert bool(torch.isfinite(after).all())
    assert not torch.allclose(after, before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again, batch), after)
    assert all(torch.equal(gone, zeros) for gone, zeros in zip(zeros_of(again).values(), zeros_of(model).values()))


def calibration(lengths: bool = False) -> list[dict[str, Tensor]]:
    if lengths:
        return padded_batches()
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in token_batches(count=4)]


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), SparseGPT(0.5, "2:4")])
def test_layers_are_calibrated_on_what_pruned_layers_give(method: Method) -> None:
    """Pruning all layers at once is pruning the first, then the next of the model that this leaves, and so on."""
    at_once, by_layer, on_dense = (tiny_llama(layers=3) for _ in range(3))
    prune(at_once, method, calibration())
    for index in range(3):
        prune(by_layer, method, calibration(), targets=[f"model.layers.{index}.*"])
    for name, module in stack_linears(at_once).items():
        assert torch.equal(module.weight, by_layer.get_submodule(name).weight), name
    prune(on_dense, method, calibration(), targets=["model.layers.2.*"])
    last = "model.layers.2.mlp.down_proj"
    assert not torch.equal(at_once.get_submodule(last).weight, on_dense.get_submodule(last).weight)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()])
def test_padding_changes_nothing(method: Method) -> None:
    padded = [{name: nn.functional.pad(value, (0, 6)) for name, value in batch.items()} for batch in calibration()]
    one, two = tiny_bert(), tiny_bert()
    first, second = prune(one, method, calibration()), prune(two, method, padded)
    assert [row.tokens for row in first.rows] == [row.tokens for row in second.rows] == [4 * 4 * 16] * 12
    for name, gone in zeros_of(one).items():
        assert float((gone != zeros_of(two)[name]).float().mean()) < 0.01, name


def test_sparsegpt_stays_nearest_to_the_dense_model() -> None:
    batch = calibration()[0]
    distance = {}
    for method in (Magnitude(), Wanda(), SparseGPT()):
        model = tiny_llama()
        with torch.no_grad():  # inputs of unlike sizes are what real models have and a random one lacks
            for layer in model.model.layers:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.weight.copy_(torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(0))))
        dense = outputs(model, batch)
        prune(model, method, calibration())
        distance[type(method)] = float((outputs(model, batch) - dense).norm())
    assert distance[SparseGPT] < 0.9 * distance[Wanda] < 0.9 * distance[Magnitude]


@pytest.mark.parametrize("method", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_a_sparse_model_keeps_its_zeros_and_loses_no_more_than_asked(method: Method) -> None:
    model = tiny_llama()
    prune(model, Magnitude(0.3))
    before = zeros_of(model)
    report = prune(model, method, calibration())
    assert all(bool(gone[before[name]].all()) for name, gone in zeros_of(model).items())
    if method.pattern is None and not isinstance(method, Wanda):
        assert all(row.zeros == int(0.4 * row.weights + 1e-9) for row in report.rows)
    again = zeros_of(model)
    prune(model, method, calibration())
    assert all(torch.equal(gone, again[name]) for name, gone in zeros_of(model).items())


def test_the_report_has_true_rows() -> None:
    model = tiny_llama()
    weights = {name: module.weight.detach().clone() for name, module in stack_linears(model).items()}
    report = prune(model, Magnitude(0.3))
    for row in report.rows:
        change = model.get_submodule(row.name).weight - weights[row.name]
        assert row.relative_error == pytest.approx(float(change.detach().norm() / weights[row.name].norm()), rel=1e-4)
        assert (row.damping, row.tokens) == (None, 0)
    assert report.sparsity == pytest.approx(0.3, abs=1e-3)
    plain = prune(model, SparseGPT(damping=0.02), calibration()).to_dict()
    assert (plain["method"], plain["sparsity"]) == ("sparsegpt", 0.5)
    assert {row["damping"] for row in plain["rows"]} == {0.02}
    assert {row["tokens"] for row in plain["rows"]} == {4 * 4 * 16}
    assert 0 < sum(row["seconds"] for row in plain["rows"]) <= plain["seconds"]


def test_targets_and_exclusions_choose_by_name() -> None:
    model = tiny_llama()
    report = prune(model, Wanda(), calibration(), targets=["*_proj"], exclude=["*.1.*", "*.down_proj"])
    assert len(report.rows) == 6
    assert all(".0." in row.name for row in report.rows)
    assert {name for name, gone in zeros_of(model).items() if gone.any()} == {row.name for row in report.rows}
    assert prune(model, Magnitude(0.2), targets=["model.embed_tokens"]).sparsity == pytest.approx(0.2, abs=1e-3)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def untouched(model: PreTrainedModel, like: PreTrainedModel) -> bool:
    return all(torch.equal(value, like.state_dict()[name]) for name, value in model.state_dict().items())


REFUSED: list[tuple[Method, dict[str, Any], type, str]] = [
    (Wanda(), {"calibration": None}, DataError, "Wanda needs calibration=batches"),
    (SparseGPT(), {"calibration": []}, DataError, "calibration has 0 batches; SparseGPT needs"),
    (Wanda(), {"calibration": [{"input_ids": torch.zeros(0, 4, dtype=torch.long)}]}, DataError, "batch 0 has 0 rows"),
    (Wanda(), {"calibration": [torch.zeros(2, 2)]}, DataError, "batch 0 is no dict of tensors but Tensor"),
    (Magnitude(), {"targets": ["*.wq"]}, ModelError, r"No weight matches .*model\.layers\.0\.self_attn\.q_proj"),
    (Wanda(), {"targets": ["lm_head"]}, ModelError, r"lm_head \(Linear\) is no linear layer inside the model's stack"),
    (Magnitude(0.5, "2:4"), {"targets": ["model.embed_tokens"]}, ModelError, "is a Embedding, but the pattern 2:4"),
    (SparseGPT(0.5, "24:48"), {}, ModelError, r"q_proj has 64 input columns, which groups of 48 do not divide"),
]


@pytest.mark.parametrize(("method", "options", "error", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_before_any_work(
    method: Method, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny_llama()
    with pytest.raises(error, match=message):
        prune(model, method, **{"calibration": calibration(), **options})
    assert untouched(model, tiny_llama())


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()])
def test_a_damaged_weight_is_refused_by_name(method: Method) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        prune(model, method, calibration())
    assert not any(gone.any() for gone in zeros_of(model).values())


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()])
def test_nan_activations_are_refused_by_name_and_it_is_said_what_was_done(method: Method) -> None:
    for index, done in ((0, "4 of 14 layers are pruned by now, so load the model again"), (1, "11 of 14")):
        model = tiny_llama()
        model.model.layers[index].post_attention_layernorm.weight.data.fill_(torch.inf)
        pattern = rf"model\.layers\.{index}: the inputs of mlp\.gate_proj.*{done}"
        with pytest.raises(ModelError, match=pattern):
            prune(model, method, calibration())
        assert not zeros_of(model)["model.layers.1.mlp.up_proj"].any()


def test_layers_that_no_token_reaches_are_named() -> None:
    idle = tiny_llama()
    idle.model.layers[1].mlp.expert = nn.Linear(64, 64)
    with pytest.raises(ModelError, match=r"No calibration token reaches model\.layers\.1\.mlp\.expert\."):
        prune(idle, SparseGPT(), calibration())
    assert len(prune(idle, SparseGPT(), calibration(), exclude=["*.expert"]).rows) == 14


def test_a_singular_hessian_is_damped_more_and_that_is_said() -> None:
    few = token_batches(count=1, rows=1, length=5)
    with pytest.warns(UserWarning, match=r"could not be factored with damping 1e-12 and was damped by") as found:
        report = prune(tiny_llama(), SparseGPT(damping=1e-12), few)
    assert any("q_proj" in str(one.message) for one in found)
    assert max(row.damping or 0 for row in report.rows) > 1e-12


def test_a_quantized_model_is_refused() -> None:
    model = tiny_llama()
    quantize(model, RTN())
    with pytest.raises(ModelError, match="is quantized already; prune the dense model first"):
        prune(model, Magnitude())


@pytest.mark.parametrize("prune_", [SparseGPT(0.5), SparseGPT(0.5, "2:4")])
def test_quantize_prunes_in_the_same_pass(prune_: SparseGPT, tmp_path: Path) -> None:
    model = tiny_llama()
    report = hfcompress.quantize(model, GPTQ(bits=8, group_size=32), calibration=calibration(), prune=prune_)
    for row in report.rows:
        zeros = model.get_submodule(row.name).codes() == 0
        # Some kept weights round to 0 as well.
        assert 0.5 <= float(zeros.float().mean()) < 0.53, row.name
        if prune_.pattern:
            assert int((~zeros).view(len(zeros), -1, 4).sum(-1).max()) <= 2
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again, calibration()[0]), outputs(model, calibration()[0]))
    dense = outputs(tiny_llama(), calibration()[0])
    apart = tiny_llama()
    prune(apart, Magnitude(prune_.sparsity, prune_.pattern))
    quantize(apart, GPTQ(bits=8, group_size=32), calibration=calibration())
    near, far = (float((outputs(one, calibration()[0]) - dense).norm()) for one in (model, apart))
    assert near < far


@pytest.mark.parametrize(
    ("method", "pruning", "message"),
    [
        (RTN(), SparseGPT(), "RTN sees no data; pruning and rounding in one pass needs GPTQ"),
        (GPTQ(group_size=32), Wanda(), "Wanda does not prune column by column"),
        (GPTQ(group_size=32), SparseGPT(damping=0.1), r"damping is 0\.1 for pruning and 0\.01 for GPTQ"),
        (
            GPTQ(group_size=32, order="groups"),
            SparseGPT(),
            r"order='groups' takes columns apart that SparseGPT chooses",
        ),
        (
            GPTQ(group_size=32),
            SparseGPT(0.5, "3:6"),
            "groups of 6 columns of the pruning pattern do not divide its 64",
        ),
        (GPTQ(group_size=8), SparseGPT(0.5, "8:16"), "or its quantization groups of 8 columns"),
    ],
)
def test_what_cannot_share_a_pass_is_refused(method: RTN | GPTQ, pruning: Any, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ModelError, match=message):
        quantize(model, method, calibration=calibration(), prune=pruning)
    assert not packed_layers(model)
    assert untouched(model, tiny_llama())


def test_training_mode_and_gradients_survive() -> None:
    model = tiny_llama().train()
    parameters = dict(model.named_parameters())
    prune(model, SparseGPT(), calibration())
    assert all(module.training for module in model.modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model(**token_batches(count=1)[0]).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_methods_are_named_and_the_door_is_open() -> None:
    assert [METHODS[name] for name in ("magnitude", "wanda", "sparsegpt")] == [Magnitude, Wanda, SparseGPT]
    report = hfcompress.prune(tiny_llama(), hfcompress.Wanda(sparsity=0.5), calibration=calibration())
    assert isinstance(report, PruningReport)
    assert (report.method, report.sparsity) == ("wanda", 0.5)
    assert (hfcompress.Magnitude, hfcompress.SparseGPT) == (Magnitude, SparseGPT)
