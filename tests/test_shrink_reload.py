"""A shrunk model saved with plain ``save_pretrained`` comes back with plain ``from_pretrained``, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hfcompress.structure import DropLayers, drop_layers, find_attention, find_ffn, shrink
from hfcompress.structure.shapes import uneven_shapes
from tests.families import FAMILIES
from tests.test_structure_shrink import CACHES, GENERATES, _even, _gated, _generated, _logits, _uneven


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gated_shrunk_and_reloaded_give_the_same_logits(name: str, implementation: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model().eval()
    attention = {"attn_implementation": implementation} if name != "deberta_v2" else {}
    if attention:
        model.set_attn_implementation(implementation)
    _gated(model, _uneven)
    with torch.no_grad():
        gated = _logits(model, name)
        report = shrink(model)
        shrunk = _logits(model, name)
        model.save_pretrained(tmp_path)
        reloaded = FAMILIES[name].auto.from_pretrained(tmp_path, **attention).eval()
        again = _logits(reloaded, name)
    assert report.removed_neurons > 0
    assert report.removed_heads > 0 or name == "phi3"  # all whose layers have one number of heads
    torch.testing.assert_close(shrunk, gated, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, shrunk)
    _train_one_step(reloaded, name)
    with torch.no_grad():  # which takes other kernels than with gradients
        assert torch.equal(_logits(model, name), shrunk)  # nothing is shared with the model that was saved
    assert sum(one.numel() for one in reloaded.parameters()) == report.parameters[1] < report.parameters[0]


@pytest.mark.parametrize("name", GENERATES)
@torch.no_grad()
def test_a_reloaded_model_generates_with_every_cache_what_the_gated_one_did(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model().eval()
    _gated(model, _uneven)
    expected, logits = _generated(model, name, use_cache=False)
    shrink(model)
    model.save_pretrained(tmp_path)
    reloaded = FAMILIES[name].auto.from_pretrained(tmp_path).eval()
    for more in CACHES:
        sequences, found = _generated(reloaded, name, **more)
        assert torch.equal(sequences, expected), more
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def _train_one_step(model: PreTrainedModel, name: str) -> None:
    """One step of the reloaded model brings its loss down, and every weight that is used has a gradient."""
    model.requires_grad_(True)
    logits = _logits(model, name)
    wanted = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    before = (logits - wanted).square().mean()
    before.backward()
    gradients = {key: one.grad for key, one in model.named_parameters() if one.numel()}
    assert all(one is None or bool(one.isfinite().all()) for one in gradients.values())
    assert sum(one is not None for one in gradients.values()) > len(gradients) // 2
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    with torch.no_grad():
        assert float((_logits(model, name) - wanted).square().mean()) < float(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_the_config_cannot_say_is_recorded(name: str) -> None:
    model = FAMILIES[name].model().eval()
    _gated(model, _even)
    report = shrink(model)
    recorded = getattr(model.config, "quantization_config", None)
    assert bool(recorded) == bool(report.uneven)
    if recorded:
        assert recorded["quant_method"] == "hfcompress"
        assert recorded["modules"] == uneven_shapes(model)
    # every config says the widths; what it does not say are the sizes of attentions
    blocks = {part.name for block in find_ffn(model) for part in (*block.ups, block.down)}
    assert blocks.isdisjoint(recorded["modules"] if recorded else {})
    heads = {part.name for site in find_attention(model) for part in (site.query, site.key, site.value, site.output)}
    assert bool(recorded) == (not heads.isdisjoint(recorded["modules"] if recorded else {}))


@torch.no_grad()
def test_layers_dropped_from_a_shrunk_model_are_no_longer_in_its_record(tmp_path: Path) -> None:
    model = FAMILIES["llama"].model().eval()
    _gated(model, _uneven)
    shrink(model)
    drop_layers(model, DropLayers(layers=(0, 2, 3)))
    model.save_pretrained(tmp_path / "three")
    reloaded, info = type(model).from_pretrained(tmp_path / "three", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(_logits(reloaded.eval(), "llama"), _logits(model, "llama"))
    drop_layers(reloaded, DropLayers(layers=(1,)))
    reloaded.save_pretrained(tmp_path / "one")
    again = type(model).from_pretrained(tmp_path / "one").eval()
    assert torch.equal(_logits(again, "llama"), _logits(reloaded, "llama"))
    assert {name.split(".")[2] for name in again.config.quantization_config.modules} == {"0"}
