"""The walk feeds each layer what the model feeds it, and Hessians are those of the real, unpadded inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hfcompress.calibration import accumulate_hessian_, walk_layers
from hfcompress.calibration import hessian as hessian_module
from hfcompress.calibration.hessian import bfloat16_products, float32_stays, products_of, relative_error
from hfcompress.errors import ModelError
from hfcompress.structure.stack import layer_stacks
from tests.conftest import VOCABULARY_SIZE, tiny_bert, tiny_llama, token_batches

Batch = dict[str, Tensor]
Case = tuple[PreTrainedModel, list[Batch]]


def padded_batches(lengths: tuple[int, ...] = (12, 7, 12, 3)) -> list[Batch]:
    batches = token_batches(count=2, length=12)
    for batch in batches:
        del batch["labels"]
        for row, length in enumerate(lengths):
            batch["attention_mask"][row, length:] = 0
    return batches


def llama_case() -> Case:
    return tiny_llama(layers=3).eval(), padded_batches()


def bert_case() -> Case:
    return tiny_bert(layers=3).eval(), padded_batches()


def gemma3_case() -> Case:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, max_position_embeddings=64, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval(), padded_batches()


def modernbert_case() -> Case:
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        local_attention=4, global_attn_every_n_layers=2, max_position_embeddings=64, pad_token_id=0, cls_token_id=2,
        sep_token_id=3, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return ModernBertForMaskedLM(config).eval(), padded_batches()


def seq2seq_batches() -> list[Batch]:
    batches = padded_batches()
    for index, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(index)
        batch["decoder_input_ids"] = torch.randint(6, VOCABULARY_SIZE, (4, 9), generator=generator)
        batch["decoder_attention_mask"] = torch.ones(4, 9, dtype=torch.long)
        batch["decoder_attention_mask"][1, 5:] = 0
    return batches


def t5_case() -> Case:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), seq2seq_batches()


def bart_case() -> Case:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY_SIZE, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    return BartForConditionalGeneration(config), seq2seq_batches()


def whisper_case() -> Case:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY_SIZE, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
        max_target_positions=16, pad_token_id=0, bos_token_id=4, eos_token_id=5, decoder_start_token_id=4,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_features": torch.randn(2, 8, 20, generator=generator),
        "decoder_input_ids": torch.randint(6, VOCABULARY_SIZE, (2, 7), generator=generator),
    }
    return WhisperForConditionalGeneration(config), [batch]


def vit_case() -> Case:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    generator = torch.Generator().manual_seed(0)
    return ViTForImageClassification(config), [{"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}]


CASES: list[Callable[[], Case]] = [
    llama_case, bert_case, gemma3_case, modernbert_case, t5_case, bart_case, whisper_case, vit_case
]  # fmt: skip


def real_inputs(
    model: PreTrainedModel, batches: list[Batch], modules: dict[str, nn.Module]
) -> dict[str, list[Tensor]]:
    """Return what the modules get in plain forward passes."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[name].append((args[0] if args else kwargs["hidden_states"]).clone())

        return hook

    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    model.train(training)
    for handle in handles:
        handle.remove()
    return seen


def all_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {f"{stack.name}.{i}": layer for stack in layer_stacks(model) for i, layer in enumerate(stack.layers)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removesuffix("_case"))
def test_layers_get_the_hidden_states_of_a_plain_forward_pass(case: Callable[[], Case]) -> None:
    model, batches = case()
    expected = real_inputs(model, batches, all_layers(model))
    visited = []
    for visit in walk_layers(model, batches):
        visited.append(visit.name)
        assert len(visit.hidden_states) == len(batches)
        for got, real in zip(visit.hidden_states, expected[visit.name]):
            torch.testing.assert_close(got, real, rtol=0, atol=1e-6)
    assert visited == list(expected)


def gram(inputs: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    rows = [
        one.reshape(-1, one.shape[-1]) if mask is None else one[mask.bool()]
        for one, mask in zip(inputs, masks, strict=True)
    ]
    stacked = torch.cat(rows).double()
    return stacked.T @ stacked


def mask_for(name: str, case: str, batch: Batch) -> Tensor | None:
    """Return the mask that belongs to a linear layer's inputs, told by names that only these models have."""
    if case in ("whisper", "vit"):
        return None
    cross = any(
        part in name for part in ("encoder_attn.k", "encoder_attn.v", "EncDecAttention.k", "EncDecAttention.v")
    )
    in_decoder = "decoder." in name and not cross
    return batch["decoder_attention_mask" if in_decoder else "attention_mask"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removesuffix("_case"))
def test_hessians_are_the_gram_matrices_of_real_tokens(case: Callable[[], Case]) -> None:
    model, batches = case()
    linears = {
        f"{layer}.{name}": module
        for layer, parent in all_layers(model).items()
        for name, module in parent.named_modules()
        if isinstance(module, nn.Linear)
    }
    inputs = real_inputs(model, batches, linears)
    checked = set()
    for visit in walk_layers(model, batches):
        for found in visit.input_hessians():
            for name in found.names:
                full = f"{visit.name}.{name}"
                masks = [mask_for(full, case.__name__.removesuffix("_case"), batch) for batch in batches]
                expected = gram(inputs[full], masks)
                torch.testing.assert_close(found.hessian.double(), expected, rtol=1e-4, atol=1e-4 * expected.max())
                real = sum(
                    int(m.sum()) if m is not None else x.shape[:-1].numel() for x, m in zip(inputs[full], masks)
                )
                assert found.tokens == real
                checked.add(full)
    assert checked == set(linears)


def test_equal_lengths_still_tell_encoder_tokens_from_decoder_tokens() -> None:
    model, batches = bart_case()
    for batch in batches:
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)
        batch["decoder_attention_mask"] = torch.ones_like(batch["attention_mask"])
    last = list(walk_layers(model, batches))[-1]
    tokens = {name: found.tokens for found in last.input_hessians() for name in found.names}
    padded, full = sum(int(batch["attention_mask"].sum()) for batch in batches), 2 * 4 * 12
    assert tokens["encoder_attn.k_proj"] == tokens["encoder_attn.v_proj"] == padded
    assert tokens["encoder_attn.q_proj"] == tokens["self_attn.k_proj"] == tokens["fc1"] == full


def test_linears_that_see_one_tensor_share_one_hessian() -> None:
    model, batches = llama_case()
    visit = next(iter(walk_layers(model, batches)))
    assert [found.names for found in visit.input_hessians()] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    asked = visit.input_hessians(["self_attn.k_proj", "mlp.down_proj"])
    assert [found.names for found in asked] == [("self_attn.k_proj",), ("mlp.down_proj",)]


def test_later_layers_see_the_changed_layers_before_them() -> None:
    model, batches = llama_case()
    for visit in walk_layers(model, batches):
        real = real_inputs(model, batches, {"x": visit.layer})["x"]
        for got, expected in zip(visit.hidden_states, real):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        with torch.no_grad():
            visit.layer.mlp.down_proj.weight.mul_(-3)


def test_the_decoder_sees_the_changed_encoder() -> None:
    model, batches = t5_case()
    real: list[Tensor] = []
    for visit in walk_layers(model, batches):
        if visit.name.startswith("encoder"):
            with torch.no_grad():
                visit.layer.layer[-1].DenseReluDense.wo.weight.add_(0.5)
        elif visit.index == 1:
            real = real_inputs(model, batches, {"x": visit.layer})["x"]
            for got, expected in zip(visit.hidden_states, real):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert len(real) == len(batches)


def test_watching_leaves_no_trace() -> None:
    model, batches = t5_case()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    for visit in walk_layers(model, batches):
        assert torch.is_grad_enabled()
        first, second = visit.input_hessians(), visit.input_hessians()
        assert all(torch.equal(a.hessian, b.hessian) for a, b in zip(first, second))
    assert model.config.use_cache is True
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


def test_the_model_is_not_run_beyond_its_last_layer() -> None:
    model, batches = llama_case()
    calls = []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(1))
    for visit in walk_layers(model, batches):
        visit.input_hessians()
    assert calls == []


class TwoBranches(nn.Module):
    """A layer whose second branch takes another input in every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        other = hidden_states * 2 if float(hidden_states.sum()) > 0 else hidden_states
        return self.a(hidden_states) + self.b(other)


class Toy(nn.Module):
    """Two layers; the depth is run ``turns`` times over the same weights."""

    def __init__(self, turns: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoBranches(), TwoBranches()])
        self.norm, self.turns = nn.LayerNorm(4), turns

    def forward(self, hidden: Tensor) -> Tensor:
        for _ in range(self.turns):
            for layer in self.layers:
                hidden = layer(hidden)
        return self.norm(hidden)


def test_inputs_that_part_later_get_hessians_of_their_own_and_idle_linears_none() -> None:
    negative, positive = -torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    visit = next(iter(walk_layers(Toy(), [{"hidden": negative}, {"hidden": positive}])))
    found = {one.names: one.hessian.double() for one in visit.input_hessians()}
    assert set(found) == {("a",), ("b",)}
    for name, inputs in (("a", [negative, positive]), ("b", [negative, positive * 2])):
        torch.testing.assert_close(found[name,], gram(inputs, [None, None]), rtol=1e-6, atol=1e-6)


def test_layers_that_run_twice_are_refused() -> None:
    with pytest.raises(ModelError, match=r"layers\.0 runs more than once in a forward pass"):
        list(walk_layers(Toy(turns=2), [{"hidden": torch.rand(2, 3, 4)}]))


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    model, batches = llama_case()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    last = list(walk_layers(model, batches))[-1]
    with pytest.raises(ModelError, match=r"model\.layers\.2: the inputs of self_attn\.q_proj, .* hold NaN"):
        last.input_hessians()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulated_products_are_exact_to_float32(dtype: torch.dtype) -> None:
    inputs = torch.randn(300, 48).to(dtype)
    hessian = torch.eye(48)
    accumulate_hessian_(hessian, inputs[:100])
    accumulate_hessian_(hessian, inputs[100:])
    expected = torch.eye(48).double() + inputs.double().T @ inputs.double()
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rounds", [False, True])
def test_it_is_found_out_whether_float32_products_stay_exact(rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with instructions for bfloat16 alone, where oneDNN could use them for float32 operands one day."""
    plain = torch.Tensor.__matmul__

    @contextmanager
    def products() -> Iterator[None]:
        with monkeypatch.context() as patch:
            if rounds:
                patch.setattr(
                    torch.Tensor, "__matmul__", lambda a, b: plain(a.bfloat16().float(), b.bfloat16().float())
                )
            yield

    monkeypatch.setattr(hessian_module, "bfloat16_products", products)
    monkeypatch.setattr(hessian_module, "vector_bfloat16", lambda: True)
    assert float32_stays.__wrapped__() is not rounds
    monkeypatch.setattr(hessian_module, "vector_bfloat16", lambda: False)
    assert float32_stays.__wrapped__() is False


@pytest.mark.parametrize(
    ("tiles", "stays", "dtype", "device", "expected"),
    [
        (True, False, torch.bfloat16, "cpu", True),
        (True, False, torch.float32, "cpu", False),
        (False, True, torch.bfloat16, "cpu", True),
        (False, True, torch.float32, "cpu", True),
        (False, False, torch.bfloat16, "cpu", False),
        (False, True, torch.float32, "meta", False),
    ],
)
def test_products_go_another_way_only_where_they_lose_nothing(
    tiles: bool, stays: bool, dtype: torch.dtype, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_module, "matrix_tiles", lambda: tiles)
    monkeypatch.setattr(hessian_module, "float32_stays", lambda: stays)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with products_of(torch.empty(2, 2, dtype=dtype, device=device)):
        assert (torch.backends.mkldnn.matmul.fp32_precision != before) is expected


def test_a_reported_error_is_exact_to_float32() -> None:
    """Its sum cancels: the error lies where the inputs hardly go, as that of GPTQ does."""
    torch.manual_seed(0)
    inputs = torch.randn(900, 300) @ (torch.randn(300, 300) * torch.logspace(0, -2, 300).unsqueeze(1))
    gram, weight = inputs.T @ inputs, torch.randn(40, 300)
    sizes, directions = torch.linalg.eigh(gram.double())
    changed = weight + (torch.randn(40, 300).double() @ (directions / sizes.sqrt()) @ directions.T).float()

    def expected(form: torch.dtype) -> float:
        lost, there, seen = ((one.to(form)).double() for one in (weight - changed, weight, gram))
        return float((lost @ seen * lost).sum() / (there @ seen * there).sum())

    exact = expected(torch.float32)
    assert relative_error(weight, changed, gram) ** 2 == pytest.approx(exact, rel=1e-3)
    assert expected(torch.bfloat16) != pytest.approx(exact, rel=1e-1)


def test_the_matmul_precision_is_put_back_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with bfloat16_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    with pytest.raises(RuntimeError, match="shape"), bfloat16_products():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
