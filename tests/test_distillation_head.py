"""A language model's 16-bit logits are never held in float32: not by us, and not by what wraps the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from hfcompress.distillation import DistillationConfig
from hfcompress.distillation.head import head_gives_logits
from hfcompress.distillation.terms import takes_logits
from hfcompress.logits import chunks
from hfcompress.logits.chunks import sum_over_rows
from hfcompress.logits.forward_kl import forward_kl
from tests.distilling import (
    distiller,
    llama,
    spread,
    text_rows,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("quick_trainers")


CHUNK, VOCABULARY = 576, 72  # eight places of logits


class LargestFloat32(TorchDispatchMode):
    """Notes how many elements of logits in float32 an operation has returned at most."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor) and one.dtype == torch.float32 and one.shape[-1:] == (VOCABULARY,):
                # an embedding's gradient has the vocabulary in its first dimension
                self.largest = max(self.largest, one.numel())
        return result


@pytest.mark.parametrize("losses", [["forward_kl"], ["jensen_shannon"], [{"top_k_kl": {"k": 8}}]])
def test_logits_are_never_whole_in_float32(losses: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks.ELEMENTS_PER_CHUNK, "cpu", CHUNK)
    rows = text_rows()[:8]
    trainer = distiller(
        llama(vocab_size=VOCABULARY), llama(vocab_size=VOCABULARY, seed=1).to(torch.bfloat16), tmp_path, rows,
        bf16=True, temperature=None, losses=losses,
    )  # fmt: skip
    with LargestFloat32() as found:
        trainer.train()
    assert found.largest == CHUNK
    arguments = TrainingArguments(tmp_path, bf16=True, use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
    plain = Trainer(llama(vocab_size=VOCABULARY), arguments, train_dataset=rows)
    with LargestFloat32() as found:  # it would be seen
        plain.train()
    assert found.largest == 8 * 8 * VOCABULARY


class WholeTensors(TorchDispatchMode):
    """Counts the tensors of the size of a batch's logits that are made, views apart."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.size and result.shape[-1:] == (VOCABULARY,):
            given = [one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)]
            self.made += result.untyped_storage().data_ptr() not in given
        return result


def test_logits_in_float32_have_one_gradient_and_its_multiple_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunks.ELEMENTS_PER_CHUNK, "cpu", CHUNK)
    rows = text_rows()[:8]
    trainer = distiller(llama(vocab_size=VOCABULARY), llama(vocab_size=VOCABULARY, seed=1), tmp_path, rows)
    with WholeTensors(8 * 8 * VOCABULARY) as found:
        trainer.train()
    assert found.made == 4  # the teacher's logits, too
    arguments = TrainingArguments(tmp_path, use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
    plain = Trainer(llama(vocab_size=VOCABULARY), arguments, train_dataset=rows)
    with WholeTensors(8 * 8 * VOCABULARY) as found:
        plain.train()
    assert found.made >= 4  # without a teacher


def test_logits_from_the_head_teach_the_same(tmp_path: Path) -> None:
    results = []
    for taken in (True, False):
        student = llama()
        trainer = distiller(student, llama(seed=1), tmp_path, bf16=True, max_steps=2)
        assert trainer.takes_logits
        trainer.takes_logits = taken
        trainer.train()
        results.append((weights_of(student), trainer.state.log_history[1]["loss"]))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)
    for name, weight in results[1][0].items():
        torch.testing.assert_close(results[0][0][name], weight, rtol=0.02, atol=2e-3)


def test_a_cap_or_a_scale_after_the_head_counts(tmp_path: Path) -> None:
    config = hf.CohereConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    student = spread(hf.CohereForCausalLM(config), 0)
    assert not head_gives_logits(student)
    assert head_gives_logits(llama())
    assert not distiller(student, copy.deepcopy(student), tmp_path, text_rows()).takes_logits


def test_small_gradients_in_float16_meet_the_loss_scale_first(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(4, VOCABULARY, generator=generator).half().requires_grad_()
    teacher = half.detach().float() + 0.01 * torch.randn(4, VOCABULARY, generator=generator)
    exact = half.detach().double().requires_grad_()
    # float32 copies of what float16 autocast gives, as the Trainer hands them on, and its GradScaler's first scale
    for logits, scale in ((half.float(), 2.0**16), (exact, 1.0)):
        terms = [lambda own, part: forward_kl(own, teacher[part].to(own.dtype), 1.0)]
        (scale * 1e-6 * sum_over_rows(logits, torch.arange(4), [1.0], terms)[0]).backward()
    assert not exact.grad.half().any()  # without the scale float16 would have nothing of it
    torch.testing.assert_close(half.grad.double() / 2**16, exact.grad, rtol=1e-2, atol=1e-12)
    arguments = DistillationConfig(tmp_path, use_cpu=True)
    assert takes_logits(arguments, llama())
    arguments.fp16 = True
    assert not takes_logits(arguments, llama())
