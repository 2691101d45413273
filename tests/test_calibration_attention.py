"""Attention of calibration passes in blocks of queries, on CPUs where that is faster than PyTorch's own."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hfcompress import Wanda, devices, prune
from hfcompress.calibration import attention
from tests.conftest import tiny_llama

SHAPES = {
    "one head": ((2, 1, 1, 70, 16), {}),
    "heads alike": ((3, 4, 4, 64, 32), {}),
    "heads share keys": ((2, 9, 3, 130, 64), {"enable_gqa": True}),
    "one token": ((2, 4, 2, 1, 8), {"enable_gqa": True}),
    "other scale": ((1, 4, 1, 96, 24), {"enable_gqa": True, "scale": 0.3}),
}


def states(rows: int, heads: int, shared: int, tokens: int, size: int, values: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(rows, tokens, count, size).bfloat16().transpose(1, 2) for count in (heads, shared)]
    return [*made, torch.randn(rows, shared, tokens, values or size).bfloat16()]


def eager(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, **_: Any) -> Tensor:
    """Attention as Transformers' ``eager_attention_forward`` computes it."""
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scores = query @ key.mT * scale
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1).to(scores)
    return scores.float().softmax(-1).to(value.dtype) @ value


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_it_is_as_exact_as_eager_attention(name: str, is_causal: bool) -> None:
    shape, options = SHAPES[name]
    made = states(*shape)
    options = {"is_causal": is_causal, "scale": shape[-1] ** -0.5, **options}
    exact = F.scaled_dot_product_attention(*(one.double() for one in made), **options)
    found = attention.attention_in_blocks(*made, **options)
    assert found is not None
    assert found.shape == exact.shape
    assert found.dtype == torch.bfloat16
    error, usual = ((one.double() - exact).norm() for one in (found, eager(*made, **options)))
    assert error <= 1.1 * usual
    assert error <= 0.01 * exact.norm()


@torch.no_grad()
def test_rows_whose_scores_do_not_fit_together_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = states(3, 4, 2, 130, 16)
    whole = attention.attention_in_blocks(*made, is_causal=True, enable_gqa=True)
    assert whole is not None
    monkeypatch.setattr(attention, "SCORES", 4 * 2 * attention.QUERIES * 130)
    parts = attention.attention_in_blocks(*made, is_causal=True, enable_gqa=True)
    assert parts is not None
    torch.testing.assert_close(parts, whole)


@torch.no_grad()
def test_values_may_have_another_size_than_keys() -> None:
    made = states(2, 4, 2, 80, 16, values=24)
    exact = F.scaled_dot_product_attention(*(one.double() for one in made), is_causal=True, enable_gqa=True)
    found = attention.attention_in_blocks(*made, is_causal=True, enable_gqa=True)
    assert found is not None
    assert (found.double() - exact).norm() <= 0.01 * exact.norm()


QUERY, KEY, VALUE = states(2, 4, 4, 10, 8)
CANNOT: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "mask": ((QUERY, KEY, VALUE), {"attn_mask": torch.ones(10, 10, dtype=torch.bool).tril()}),
    "dropout": ((QUERY, KEY, VALUE), {"dropout_p": 0.5}),
    "float32": ((QUERY.float(), KEY.float(), VALUE.float()), {}),
    "fewer keys, causal": ((QUERY, KEY[:, :, :7], VALUE[:, :, :7]), {"is_causal": True}),
    "no heads": ((QUERY[0], KEY[0], VALUE[0]), {}),
    "one row of keys": ((QUERY, KEY[:1], VALUE[:1]), {}),
}


@pytest.mark.parametrize("name", CANNOT)
@torch.no_grad()
def test_the_rest_is_pytorchs_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "vector_bfloat16", lambda: True)
    tensors, options = CANNOT[name]
    assert attention.attention_in_blocks(*tensors, **options) is None
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    torch.manual_seed(0)
    with attention.fast_attention():
        assert torch.equal(F.scaled_dot_product_attention(*tensors, **options), expected)


def test_gradients_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "vector_bfloat16", lambda: True)
    query = QUERY.clone().requires_grad_()
    with attention.fast_attention():
        F.scaled_dot_product_attention(query, KEY, VALUE).sum().backward()
    assert query.grad is not None


def test_heads_that_share_keys_unasked_are_refused_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "vector_bfloat16", lambda: True)
    with torch.no_grad(), attention.fast_attention(), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(QUERY, KEY[:, :2], VALUE[:, :2])


@pytest.mark.parametrize("is_fast", [True, False])
def test_calibration_goes_through_it_where_it_is_fast(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    plain = attention.attention_in_blocks

    def count(*args: Any, **kwargs: Any) -> Tensor | None:
        nonlocal calls
        answer = plain(*args, **kwargs)
        calls += answer is not None
        return answer

    monkeypatch.setattr(attention, "attention_in_blocks", count)
    monkeypatch.setattr(attention, "vector_bfloat16", lambda: is_fast)
    model = tiny_llama(layers=2).bfloat16()
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads[0] > heads[1]
    prune(model, Wanda(), [{"input_ids": torch.randint(0, 50, (2, 12))} for _ in range(2)])
    assert (calls > 0) == is_fast
    with torch.no_grad():
        during = calls
        F.scaled_dot_product_attention(QUERY, KEY, VALUE)
    assert calls == during, "the context ended with the pass"


def test_cpus_with_matrix_tiles_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"avx512_bf16", "amx_tile"}
    monkeypatch.setattr(devices, "_cpu_has", features.__contains__)
    assert not devices.vector_bfloat16()
    assert devices.fast_bfloat16("cpu")
    features.remove("amx_tile")
    assert devices.vector_bfloat16()
    assert devices.fast_bfloat16("cpu")
    features.remove("avx512_bf16")
    assert not devices.fast_bfloat16("cpu")


def test_it_is_left_where_linear_layers_are_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "vector_bfloat16", lambda: True)
    asked: list[str] = []
    monkeypatch.setattr(attention, "attention_in_blocks", lambda *_, **__: asked.append(now))
    made = states(1, 1, 1, 8, 16)
    with attention.fast_attention():
        for now in ("before", "inside", "after"):
            with attention.usual_functions() if now == "inside" else nullcontext():
                F.scaled_dot_product_attention(*made)
        with suppress(ZeroDivisionError), attention.usual_functions():
            1 / 0  # noqa: B018
        now = "after an error"
        F.scaled_dot_product_attention(*made)
    assert asked == ["before", "after", "after an error"]
