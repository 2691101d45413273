"""With quality="best" every linear layer makes up for what the model lacks by then, in any architecture."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.calibration import checks, walk_layers
from hfcompress.calibration.factor import factor_hessian
from hfcompress.calibration.sites import summing_sites
from hfcompress.calibration.turn_pass import TurnPass
from hfcompress.calibration.turns import Turns
from hfcompress.packed import packed_layers
from hfcompress.quantization import GPTQ, quantize
from hfcompress.quantization.drift import DAMPING, correct_drift
from hfcompress.structure.running import watching
from hfcompress.structure.stack import linear_weights_of
from tests.conftest import tiny_llama, token_batches
from tests.families import FAMILIES, inputs_of

FAST, BEST = GPTQ(bits=3, group_size=8), GPTQ(bits=3, group_size=8, quality="best")


def batches(model: PreTrainedModel, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return batches of 8 rows of 12 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(6, model.config.vocab_size, (count, 8, 12), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows]


def output_error(model: PreTrainedModel, dense: PreTrainedModel, data: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float((model(**batch)[0] - dense(**batch)[0]).square().mean()) for batch in data)


def first_turns(model: PreTrainedModel, data: list[dict[str, Tensor]], drifted: bool = False) -> Turns:
    """Return the turns of the first layer; the dense model's hidden states may be others than the model's."""
    visit = next(iter(walk_layers(model, data)))
    hidden = [states * 1.25 if drifted else states.clone() for states in visit.hidden_states]
    return Turns(visit, list(linear_weights_of(visit.layer)), hidden)


def test_the_states_inside_a_layer_go_with_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the most of all memory, so those of two layers are never there at once."""
    made: list[weakref.ref[Turns]] = []

    class Noted(Turns):
        def __init__(self, *args: Any) -> None:
            assert not any(one() for one in made)
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(checks, "Turns", Noted)
    model = tiny_llama(layers=3)
    names = [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)]
    for _ in checks.compress_in_turn(model, names, batches(model, 2), lambda visit, turn: None):
        assert not any(one() for one in made)
    assert len(made) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_best_is_nearer_to_the_dense_model_on_text_it_never_saw(family: str) -> None:
    dense = FAMILIES[family].model()
    fast, best = copy.deepcopy(dense), copy.deepcopy(dense)
    data, unseen = batches(dense, 24), batches(dense, 8, seed=1)
    quantize(fast, FAST, data)
    quantize(best, BEST, data)
    assert output_error(best, dense, unseen) < 0.9 * output_error(fast, dense, unseen)
    assert all(module._unpacked is None for module in packed_layers(best).values())


@pytest.mark.parametrize(
    ("family", "sites"),
    [
        ("llama", {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}),
        ("gpt2", {"attn.c_proj": "ln_2", "mlp.c_proj": ""}),
        ("bert", {"attention.output.dense": "attention.output.LayerNorm", "output.dense": "output.LayerNorm"}),
        # A norm stands between these and the hidden states, so the sum is their output alone.
        ("gemma3", {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"}),
    ],
)
def test_sums_with_the_hidden_states_are_found_by_a_push(family: str, sites: dict[str, str]) -> None:
    model = FAMILIES[family].model()
    visit = next(iter(walk_layers(model, batches(model, 1))))
    names = list(linear_weights_of(visit.layer))
    with watching(visit.layer):
        found = summing_sites(visit.layer, lambda: visit.output(0), names, visit.hidden_states[0])
    assert found == sites


def test_sums_are_found_where_a_layer_gives_far_more_than_it_gets() -> None:
    """As SmolLM2's first does: in bfloat16 a push as small as the layer's input would be lost to rounding."""
    model = FAMILIES["llama"].model()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.01)
    model = model.to(torch.bfloat16)
    visit = next(iter(walk_layers(model, batches(model, 1))))
    with watching(visit.layer):
        assert visit.output(0).square().mean() > 100 * visit.hidden_states[0].square().mean()
        found = summing_sites(
            visit.layer, lambda: visit.output(0), list(linear_weights_of(visit.layer)), visit.hidden_states[0]
        )
    assert found == {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}


def test_turns_come_in_order_and_see_what_was_changed_before() -> None:
    model = FAMILIES["llama"].model()
    turns = first_turns(model, batches(model, 2))
    layer = turns.layer
    seen: dict[tuple[str, ...], Tensor] = {}
    for turn in turns:
        seen[turn.found.names] = turn.found.hessian
        if "self_attn.o_proj" in turn.found.names:
            with torch.no_grad():
                layer.get_submodule("self_attn.o_proj").weight.zero_()
    assert list(seen) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    plain = {turn.found.names: turn.found.hessian for turn in first_turns(model, batches(model, 2))}
    for names, hessian in seen.items():
        torch.testing.assert_close(hessian, plain[names], rtol=1e-4, atol=1e-4)  # the zeroed one is there in both


def test_nothing_is_missing_where_the_model_is_the_dense_one() -> None:
    model = FAMILIES["llama"].model()
    for turn in first_turns(model, batches(model, 2)):
        for name in turn.found.names:
            missing = turn.missing(name, torch.ones(1, len(turn.found.hessian)))
            assert missing is not None
            assert float(missing.abs().max()) == 0


def test_the_sum_is_what_a_writer_makes_up_for() -> None:
    """The drift of a layer that adds to the hidden states holds the hidden states' own, and is of their dense sum."""
    model = FAMILIES["llama"].model()
    data = batches(model, 2)
    turn = next(turn for turn in first_turns(model, data, drifted=True) if "self_attn.o_proj" in turn.found.names)
    inputs: list[Tensor] = []
    sums: list[Tensor] = []
    visit = next(iter(walk_layers(model, data)))
    handles = [
        visit.layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))),
        visit.layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: sums.append(args[0].flatten(0, 1))
        ),
    ]
    for index, hidden in enumerate(visit.hidden_states):
        visit.output(index, hidden * 1.25)
        visit.output(index)
    for handle in handles:
        handle.remove()
    expected = sum((sums[at] - sums[at + 1]).T @ inputs[at + 1] for at in range(0, len(sums), 2))
    torch.testing.assert_close(turn.drift["self_attn.o_proj"], expected, rtol=1e-4, atol=1e-3)


def test_the_correction_is_the_damped_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, lacking = (torch.randn(200, size, generator=generator) for size in (24, 6))
    weight = torch.randn(6, 24, generator=generator)
    hessian = inputs.T @ inputs
    (corrected, other), used = correct_drift([weight, weight], hessian, [lacking.T @ inputs, None])
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(corrected, weight + lacking.T @ inputs @ torch.linalg.inv(damped), rtol=1e-4, atol=1e-4)
    wanted = inputs @ weight.T + lacking
    assert (inputs @ corrected.T - wanted).norm() < (inputs @ weight.T - wanted).norm()
    assert torch.equal(other, weight)
    assert used == DAMPING
    assert correct_drift([weight], hessian, [None]).damping_used == 0


@pytest.mark.usefixtures("few_tokens_are_fine")
def test_a_correction_that_needs_more_damping_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tokens leave the Hessians singular; GPTQ's own damping is enough for them."""
    for module in ("drift", "calibrated"):
        monkeypatch.setattr(f"hfcompress.quantization.{module}.DAMPING", 1e-12)
    few = token_batches(count=1, rows=1, length=10)
    with pytest.warns(UserWarning, match="could not be factored with damping 1e-12") as told:
        report = quantize(tiny_llama(), GPTQ(bits=3, group_size=32, quality="best"), few)
    said = [str(one.message) for one in told if "could not be factored with damping 1e-12" in str(one.message)]
    assert any("self_attn.o_proj" in one for one in said)
    assert {row.damping for row in report.rows} == {0.01}


def test_solving_undoes_the_damped_hessian() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, right = torch.randn(50, 24, generator=generator), torch.randn(6, 24, generator=generator)
    factor = factor_hessian(inputs.T @ inputs, 0.05)
    damped = factor.unit * factor.strength @ factor.unit.T
    torch.testing.assert_close(factor.solve(right) @ damped, right, rtol=1e-4, atol=1e-4)


def test_pruned_weights_stay_zero() -> None:
    model = FAMILIES["llama"].model()
    zeros: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            zeros[name] = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(len(zeros))) < 0.5
            with torch.no_grad():
                module.weight.masked_fill_(zeros[name], 0)
    quantize(model, BEST, batches(model, 8))
    packed = packed_layers(model)
    assert zeros.keys() == packed.keys()
    assert all(not bool(packed[name].dequantize()[mask].any()) for name, mask in zeros.items())


def test_padding_has_no_say() -> None:
    """Padded rows give the first block its very codes; what rounding flips later on leaves the errors as they are."""
    dense = FAMILIES["llama"].model()
    data = batches(dense, 4)
    padded = [{name: nn.functional.pad(value, (0, 5)) for name, value in batch.items()} for batch in data]
    counted = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in padded]
    codes, errors = [], []
    for rows in (data, padded, counted):
        model = copy.deepcopy(dense)
        report = quantize(model, BEST, rows)
        first = [one.codes() for name, one in packed_layers(model).items() if name.startswith("model.layers.0.")]
        codes.append(torch.cat([one.flatten() for one in first]))
        errors.append(sum(row.relative_error for row in report.rows))
    assert float((codes[0] != codes[1]).float().mean()) < 0.02 < float((codes[0] != codes[2]).float().mean())
    assert abs(errors[1] / errors[0] - 1) < 0.02 < abs(errors[2] / errors[0] - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_quantized_at_best(family: str) -> None:
    """Errors stay small and every layer is packed, whatever calls whatever inside."""
    case = FAMILIES[family]
    model = case.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = quantize(model, GPTQ(bits=8, group_size=8, quality="best"), [inputs_of(case)] * 2)
    assert len(packed_layers(model)) == len(report.rows) > 0
    assert all(row.relative_error < 0.1 for row in report.rows)


def test_what_is_unpacked_for_a_pass_is_gone_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, passes = TurnPass.run, []

    def run(self: TurnPass, call: Any, hidden: Tensor) -> Tensor:
        passes.append(self)  # alive, so that it is not the collector that clears up
        return plain(self, call, hidden)

    monkeypatch.setattr(TurnPass, "run", run)
    model = tiny_llama(layers=2)
    quantize(model, BEST, [{"input_ids": torch.randint(0, 50, (8, 20))}])
    assert len(passes) == 2
    assert all(layer._unpacked is None for layer in packed_layers(model).values())
