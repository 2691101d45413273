"""One pass over all batches at once gives what passes of their own give, and needs no second one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel

from hfcompress.calibration import InputHessian, InputSquares, LayerVisit, parts, together, walk_layers
from hfcompress.calibration.observe import GRAM, SQUARES, Statistic, TokenMasks
from hfcompress.calibration.record import LayerCall
from hfcompress.calibration.turn_pass import Turn, sums_are_plain
from hfcompress.calibration.turns import Turns
from hfcompress.pruning.oneshot import SparseGPT, Wanda, prune
from hfcompress.quantization import GPTQ, quantize
from hfcompress.structure.running import watching
from hfcompress.structure.stack import linear_weights_of
from tests.conftest import VOCABULARY_SIZE
from tests.families import FAMILIES, inputs_of

Batches = list[dict[str, Tensor]]


def batches(model: PreTrainedModel, padding: int = 0) -> Batches:
    """Return three batches of rows of 12 tokens; the last is smaller, and rows may have padding."""
    rows = torch.randint(6, model.config.vocab_size, (10, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rows)
    mask[::2, 12 - padding :] = 0
    mask[4:8, 12 - 4 * padding :] = 0  # of the second batch nothing is left by a padding of 3
    return [{"input_ids": ids, "attention_mask": keep} for ids, keep in zip(rows.split(4), mask.split(4))]


def halving(visit: LayerVisit, seen: dict[tuple[str, ...], Tensor]) -> Callable[[InputHessian | InputSquares], None]:
    """Return what stands for compression: every weight is made coarse in place."""

    def compress(found: InputHessian | InputSquares) -> None:
        seen[found.names] = found.hessian if isinstance(found, InputHessian) else found.squares
        for name in found.names:
            weight = visit.layer.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_((weight * 4).round() / 4)

    return compress


def go_by_parts(patch: pytest.MonkeyPatch, tokens: int) -> None:
    """Have modules and networks called for about so many tokens at once."""
    patch.setattr(parts, "PART", tokens)
    patch.setattr(parts, "SMALL_PART", tokens)


@pytest.mark.parametrize("part", [parts.PART, 3 * 12])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_one_pass_equals_turn_after_turn(
    family: str, padding: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same Hessians, each with the linear layers before it compressed, and the hidden states of the changed layer.

    Ten rows do not divide into parts of three.
    """
    go_by_parts(monkeypatch, part)
    model = FAMILIES[family].model()
    other = copy.deepcopy(model)
    joined: dict[tuple[str, ...], Tensor] = {}
    turned: dict[tuple[str, ...], Tensor] = {}

    one = next(iter(walk_layers(model, batches(model, padding))))
    one.compress_(list(linear_weights_of(one.layer)), GRAM, halving(one, joined))
    assert all(one.index not in recorded.calls for recorded in one.batches)  # it has been advanced

    two = next(iter(walk_layers(other, batches(other, padding))))
    compress = halving(two, turned)
    for turn in Turns(two, list(linear_weights_of(two.layer)), [states.clone() for states in two.hidden_states]):
        compress(turn.found)
    two.advance_()

    assert joined.keys() == turned.keys()
    for names, hessian in joined.items():
        torch.testing.assert_close(hessian, turned[names], rtol=1e-4, atol=1e-4)
    for recorded, expected in zip(one.batches, two.batches, strict=True):
        keep = recorded.batch["attention_mask"].bool()
        torch.testing.assert_close(recorded.hidden[keep], expected.hidden[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [parts.PART, 3 * 12])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "gemma3"])
def test_one_pass_of_turns_equals_turn_after_turn(
    family: str, padding: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is missing against a dense model that has drifted, too, and the very states of the changed layer."""
    go_by_parts(monkeypatch, part)
    model = FAMILIES[family].model()
    found: list[dict[tuple[str, ...], Turn]] = []
    visits = []
    for one_pass in (True, False):
        other = copy.deepcopy(model)
        visit = next(iter(walk_layers(other, batches(other, padding))))
        turns = Turns(visit, list(linear_weights_of(visit.layer)), [states * 1.25 for states in visit.hidden_states])
        seen: dict[tuple[str, ...], Turn] = {}
        compress = halving(visit, {})

        def take(turn: Turn, seen: dict[tuple[str, ...], Turn] = seen, compress: Any = compress) -> None:
            seen[turn.found.names] = turn
            compress(turn.found)

        if one_pass:
            turns.take_(take)
            assert all(visit.index not in recorded.calls for recorded in visit.batches)  # it has been advanced
        else:
            for turn in turns:
                take(turn)
            visit.advance_()
        found.append(seen)
        visits.append(visit)
    assert found[0].keys() == found[1].keys()
    for names, turn in found[0].items():
        expected = found[1][names]
        assert turn.found.tokens == expected.found.tokens
        torch.testing.assert_close(turn.found.hessian, expected.found.hessian, rtol=1e-4, atol=1e-4)
        assert turn.drift.keys() == expected.drift.keys()
        for name in names:
            weight = visits[0].layer.get_submodule(name).weight
            weight = weight.T if family == "gpt2" else weight
            missing = [one.missing(name, weight) for one in (turn, expected)]
            torch.testing.assert_close(*missing, rtol=1e-3, atol=1e-3)
    for recorded, expected_batch in zip(visits[0].batches, visits[1].batches, strict=True):
        keep = recorded.batch["attention_mask"].bool()
        assert torch.equal(recorded.hidden[keep], expected_batch.hidden[keep])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_is_enough_where_sums_are_plain(family: str) -> None:
    """In GPT-NeoX attention and network add to one sum, whose rounding depends on their order: turn after turn."""
    case = FAMILIES[family]
    model = case.model()
    for visit in walk_layers(model, [inputs_of(case)] * 2):
        taken: list[str] = []
        dense = [states.clone() for states in visit.hidden_states]
        Turns(visit, list(linear_weights_of(visit.layer)), dense).take_(
            lambda turn, taken=taken: taken.extend(turn.found.names)
        )
        assert sorted(taken) == sorted(linear_weights_of(visit.layer))
        if visit.index == 0:
            advanced = [visit.index not in recorded.calls for recorded in visit.batches]
            assert advanced == [family != "gpt_neox"] * 2


class TwoPaths(nn.Module):
    """Adds to hidden states, and goes on with a copy of the sum that was made before a module gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, states: Tensor, copied: bool) -> Tensor:
        total = states + self.first(states)
        kept = total.clone() if copied else total
        return kept + self.second(self.norm(total))


@pytest.mark.parametrize("copied", [True, False])
def test_a_sum_that_is_copied_before_it_is_seen_is_not_plain(copied: bool) -> None:
    layer, states = TwoPaths(), torch.randn(3, 4, 8)
    with torch.no_grad():
        assert sums_are_plain(layer, lambda: layer(states, copied), {"first": "norm", "second": ""}) is not copied


def test_squares_are_the_diagonals_of_the_hessians_before_anything_is_pruned() -> None:
    """What Wanda prunes by; here the part that goes through the dense layer is all there is."""
    model = FAMILIES["llama"].model()
    visit = next(iter(walk_layers(model, batches(model, 3))))
    dense = {names: one.hessian for one in visit.input_hessians() for names in [one.names]}
    found: dict[tuple[str, ...], Tensor] = {}
    visit.compress_(list(linear_weights_of(visit.layer)), SQUARES, halving(visit, found))
    assert visit.index not in visit.batches[0].calls
    assert found.keys() == dense.keys()
    for names, hessian in dense.items():
        torch.testing.assert_close(found[names], hessian.diagonal(), rtol=1e-4, atol=1e-4)


def joined_totals(
    model: PreTrainedModel, statistic: Statistic[Any], padding: int
) -> tuple[dict[tuple[str, ...], Tensor], LayerVisit]:
    """Return what each group's total is when the first layer is made coarse in one pass."""
    visit = next(iter(walk_layers(copied := copy.deepcopy(model), batches(copied, padding))))
    found: dict[tuple[str, ...], Tensor] = {}
    visit.compress_(list(linear_weights_of(visit.layer)), statistic, halving(visit, found))
    assert visit.index not in visit.batches[0].calls
    return found, visit


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "gpt_neox"])
def test_squares_of_the_dense_layer_are_estimated_from_a_part(
    family: str, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All squares times what those of the first rows are in the dense layer over what they are in the coarse one."""
    go_by_parts(monkeypatch, 4 * 12)
    model = FAMILIES[family].model()
    own = {names: one.diagonal() for names, one in joined_totals(model, GRAM, padding)[0].items()}
    found, visit = joined_totals(model, SQUARES, padding)
    squares: dict[str, list[Tensor]] = {}

    def see(name: str, states: Tensor, mask: Tensor) -> None:
        squares.setdefault(name, []).append(states[mask.bool()].flatten(1).float().square().sum(0))

    for layer in (model.get_submodule(visit.name), visit.layer):  # dense, and coarse
        fresh = next(iter(walk_layers(copy.deepcopy(model), batches(model, padding)[:1])))
        mask = fresh.batches[0].batch["attention_mask"]
        heads = {names[0]: layer.get_submodule(names[0]) for names in found}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name, mask=mask: see(name, args[0], mask))
            for name, module in heads.items()
        ]
        with watching(layer):
            fresh.batches[0].calls[0].run(layer, fresh.hidden_states[0])
        for handle in handles:
            handle.remove()
    assert found.keys() == own.keys()
    corrected = 0
    for names, total in found.items():
        dense, coarse = squares[names[0]]
        expected = own[names] * (dense / coarse).nan_to_num(1).clamp(0.5, 2)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
        corrected += not torch.allclose(total, own[names], rtol=1e-3)
    assert corrected >= 2


@torch.no_grad()
def test_the_estimate_is_nearer_to_the_dense_layer_than_the_coarse_layers_own() -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"].model()
    visit = next(iter(walk_layers(copy.deepcopy(model), batches(model))))
    dense = {one.names: one.hessian.diagonal() for one in visit.input_hessians()}
    with pytest.MonkeyPatch.context() as patch:
        go_by_parts(patch, 4 * 12)
        own, found = (joined_totals(model, statistic, 0)[0] for statistic in (GRAM, SQUARES))
    for names in list(dense)[1:]:
        errors = [float((one / dense[names]).log().square().mean()) for one in (found[names], own[names].diagonal())]
        assert errors[0] < errors[1], names


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
def test_pruning_too_takes_one_pass(method: Wanda | SparseGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """And Wanda a part of one more, which ends before the last linear layer."""
    go_by_parts(monkeypatch, 4 * 12)
    model = FAMILIES["llama"].model()
    data = batches(model)
    calls: list[int] = []
    ends: list[int] = []
    mlp = model.model.layers[1].mlp
    handles = [
        mlp.register_forward_pre_hook(lambda _, args: calls.append(len(args[0]))),
        mlp.register_forward_hook(lambda _, args, output: ends.append(len(output))),
    ]
    prune(model, method, data)
    for handle in handles:
        handle.remove()
    rows = sum(len(batch["input_ids"]) for batch in data)
    part = [4] if isinstance(method, Wanda) else []
    assert calls == [1, *part, 1, rows]
    assert ends == [1, 1, rows]


def test_a_layer_runs_once_for_all_and_twice_for_a_row_to_learn_its_order_and_what_is_read_again() -> None:
    model = FAMILIES["llama"].model()
    data = batches(model)
    calls: list[int] = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    quantize(model, GPTQ(bits=4, group_size=8), data)
    handle.remove()
    assert calls == [1, 1, sum(len(batch["input_ids"]) for batch in data)]


@pytest.mark.parametrize(("family", "network", "inside"), [("llama", "mlp", "act_fn"), ("gpt2", "mlp", "act")])
def test_what_is_wide_is_never_there_for_all_rows(
    family: str, network: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feed-forward network gets all rows, and what lies between its linear layers three at a time."""
    model = FAMILIES[family].model()
    data = batches(model)
    go_by_parts(monkeypatch, 3 * 12)
    visit = next(iter(walk_layers(model, data)))
    wide: list[int] = []
    activation = visit.layer.get_submodule(f"{network}.{inside}")
    with watching(visit.layer):
        visit.output(0)
    activation.register_forward_pre_hook(lambda _, args: wide.append(len(args[0])))
    visit.compress_(list(linear_weights_of(visit.layer)), GRAM, halving(visit, {}))
    rows = sum(len(batch["input_ids"]) for batch in data)
    assert wide[-4:] == [3, 3, 3, 1]
    assert rows not in wide


@pytest.mark.parametrize("padding", [0, 3])
def test_attention_runs_by_parts_with_its_own_rows_of_the_mask(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].model()
    data = batches(model, padding)
    go_by_parts(monkeypatch, 3 * 12)
    visit = next(iter(walk_layers(model, data)))
    with watching(visit.layer):
        expected = [visit.output(index) for index in range(3)]
    seen: list[tuple[int, int | None]] = []
    plain = model.model.layers[0].self_attn.forward

    def noting(hidden_states: Tensor, **kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        seen.append((len(hidden_states), None if mask is None else len(mask)))
        return plain(hidden_states=hidden_states, **kwargs)

    monkeypatch.setattr(visit.layer.self_attn, "forward", noting, raising=False)
    visit.compress_(list(linear_weights_of(visit.layer)), GRAM, lambda found: None)
    counts = [3, 3, 3, 1]
    assert seen[-4:] == [(count, count if padding else None) for count in counts]
    for recorded, states in zip(visit.batches, expected, strict=True):
        torch.testing.assert_close(recorded.hidden, states, rtol=1e-4, atol=1e-5)


class _Blocks:
    """Something of rows that is no tensor, as a block mask of flexible attention."""


def test_calls_that_may_have_no_rows_run_whole() -> None:
    states, mask = torch.zeros(10, 12, 8), torch.zeros(10, 1, 12, 12)
    rotary = (torch.zeros(1, 12, 8), torch.zeros(1, 12, 8))
    told = {"hidden_states": states, "attention_mask": mask, "position_embeddings": rotary, "is_causal": True}

    def shapes(*args: Any, **kwargs: Any) -> list[tuple[int, ...]]:
        tensors = (*args, *kwargs.values(), *kwargs.get("position_embeddings", ()))
        return [tuple(one.shape) for one in tensors if isinstance(one, Tensor)]

    call = parts.RowCall.of((), told, 10)
    assert call is not None
    expected = [(2, 12, 8), (2, 1, 12, 12), (1, 12, 8), (1, 12, 8)]
    assert call.run(shapes, slice(4, 6)) == expected
    assert parts.RowCall.of((states,), {}, 10) is not None
    refused = [
        {"mask": mask[:4]},  # of other rows
        {"bias": torch.zeros(10)},  # a row of what?
        {"bias": torch.zeros(30, 12, 12)},  # heads and rows in one
        {"blocks": _Blocks()},
        {"hidden_states": None},
    ]
    for changed in refused:
        assert parts.RowCall.of((), {**told, **changed}, 10) is None, changed
    # As many rows as tokens: a tensor could have either.
    square = {"hidden_states": torch.zeros(12, 12, 8), "bias": torch.zeros(12, 12)}
    assert parts.RowCall.of((), square, 12) is None


def test_a_network_that_adds_to_its_last_product_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the last linear layer's output is the network's own may the rest be left out."""
    plain = type(FAMILIES["llama"].model().model.layers[0].mlp).forward
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaMLP.forward", lambda self, states: plain(self, states) + states
    )
    model = FAMILIES["llama"].model()
    go_by_parts(monkeypatch, 3 * 12)
    visit = next(iter(walk_layers(model, batches(model))))
    with watching(visit.layer):
        expected = [visit.output(index) for index in range(3)]
    visit.compress_(list(linear_weights_of(visit.layer)), GRAM, lambda found: None)
    for recorded, states in zip(visit.batches, expected, strict=True):
        torch.testing.assert_close(recorded.hidden, states, rtol=1e-4, atol=1e-5)


def test_batches_go_one_by_one_where_all_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].model()
    monkeypatch.setattr(together, "MOST_BYTES", 0)
    largest: list[int] = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: largest.append(len(args[0])))
    report = quantize(model, GPTQ(bits=4, group_size=8), batches(model))
    handle.remove()
    assert max(largest) == 4
    assert all(row.relative_error < 0.3 for row in report.rows)


def test_calls_that_do_not_fit_together_are_not_joined() -> None:
    mask, wide = torch.ones(2, 1, 4, 4), torch.ones(2, 1, 5, 5)
    rotary = (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))

    def call(mask: Tensor | None, causal: bool = True) -> LayerCall:
        return LayerCall((), {"attention_mask": mask, "position_embeddings": rotary, "is_causal": causal}, True)

    joined = together.join_calls([call(mask), call(mask[:1])], [2, 1])
    assert joined is not None
    assert joined.kwargs["attention_mask"].shape == (3, 1, 4, 4)
    assert joined.kwargs["position_embeddings"][0].shape == (1, 4, 8)
    assert together.join_calls([call(mask), call(wide)], [2, 2]) is None
    assert together.join_calls([call(mask), call(None)], [2, 2]) is None
    assert together.join_calls([call(mask), call(mask, causal=False)], [2, 2]) is None
    masks = [TokenMasks(torch.ones(2, 4), None), TokenMasks(torch.ones(2, 5), None)]
    assert together.join_masks(masks, [2, 2]) is None
    heads = [LayerCall((), {"alibi": torch.ones(8, 1, 4)}, True)] * 2  # four of each row
    assert together.join_calls(heads, [2, 2]) is None


@pytest.mark.usefixtures("few_tokens_are_fine")
@pytest.mark.parametrize("quality", ["fast", "best"])
def test_heads_of_rows_in_one_dimension_are_those_of_each_batch(quality: Any) -> None:
    """Bloom's layers are given alibi for (rows * heads), alike in batches of the same shape."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY_SIZE, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    report = quantize(model, GPTQ(bits=4, group_size=8, quality=quality), batches(model)[:2])
    assert len(report.rows) == 8
    assert all(row.tokens == 96 and row.relative_error < 0.3 for row in report.rows)


def test_forwards_are_put_back_after_an_error() -> None:
    model = FAMILIES["llama"].model()
    visit = next(iter(walk_layers(model, batches(model))))

    def fail(found: InputHessian) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        visit.compress_(list(linear_weights_of(visit.layer)), GRAM, fail)
    assert all("forward" not in module.__dict__ for module in model.modules())
