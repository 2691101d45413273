"""What must hold on a GPU as it does on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import hfcompress
from hfcompress.packed import packed_layers
from hfcompress.pruning.masks import prunable_weights, sparsity_of
from hfcompress.quantization import rounding
from tests.conftest import tiny_llama, token_batches
from tests.reloading import same_but_for_rounding
from tests.test_column_kernel import run_twins
from tests.test_distillation_across import STUDENT, TEACHER, models_of
from tests.test_distillation_across import rows as rows_of_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine has none"),
]


@pytest.mark.parametrize(
    "method", [hfcompress.RTN(bits=8), hfcompress.GPTQ(bits=4, group_size=32)], ids=["rtn", "gptq"]
)
def test_quantized_on_the_gpu_reloads_on_the_cpu(method: hfcompress.RTN, tmp_path: Path) -> None:
    model = tiny_llama().cuda()
    batches = [{name: value.cuda() for name, value in batch.items()} for batch in token_batches()]
    hfcompress.quantize(model, method, calibration=batches)
    inputs = token_batches(count=1)[0]["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=inputs.cuda()).logits.cpu()
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=inputs).logits
    assert torch.allclose(logits, reloaded, atol=1e-4)


def test_gptqs_kernel_is_its_twin_on_the_gpu() -> None:
    run_twins(TRITON_INTERPRET="0")


@pytest.mark.parametrize("switch", ["1", "0"], ids=["kernel", "loop"])
@pytest.mark.parametrize("options", [{}, {"quality": "best"}, {"order": "columns"}, {"symmetric": False}], ids=str)
def test_gptq_gives_on_the_gpu_what_it_gives_on_the_cpu(
    options: dict[str, Any], switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order may put a weight on the other side of a tie."""
    monkeypatch.setenv(rounding.KERNEL_SWITCH, switch)
    assert rounding.kernel_runs_on(torch.device("cuda")) is (switch == "1")
    method = hfcompress.GPTQ(bits=4, group_size=32, **options)
    reports, codes = [], []
    for device in ("cpu", "cuda"):
        model = tiny_llama().to(device)
        batches = [{name: value.to(device) for name, value in batch.items()} for batch in token_batches()]
        reports.append(hfcompress.quantize(model, method, calibration=batches))
        codes.append({name: one.codes().cpu() for name, one in packed_layers(model).items()})
    for name, ours in codes[1].items():
        assert float((ours != codes[0][name]).float().mean()) < 0.05
    for cpu, gpu in zip(*(report.rows for report in reports), strict=True):
        assert gpu.relative_error == pytest.approx(cpu.relative_error, rel=0.02)


@pytest.mark.parametrize("bits", [4, 8], ids=["nf4", "int8"])
def test_bitsandbytes_on_the_gpu_reloads_there(bits: int, tmp_path: Path) -> None:
    model, inputs = tiny_llama().cuda(), token_batches(count=1)[0]["input_ids"].cuda()
    with torch.no_grad():
        dense = model(input_ids=inputs).logits
        hfcompress.quantize(model, hfcompress.BitsAndBytes(bits=bits))
        logits = model(input_ids=inputs).logits
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0})(input_ids=inputs).logits
    assert 0 < float((logits - dense).norm()) < 0.2 * float(dense.norm())
    assert torch.allclose(logits.float(), reloaded.float(), atol=1e-2 * float(dense.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_on_the_gpu_is_verified_on_the_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    saved = hfcompress.save_compressed(model.cuda(), tmp_path / "out", verify=True)
    assert saved.verification is not None
    assert same_but_for_rounding(saved.verification)


def test_pruning_and_distilling_on_the_gpu(tmp_path: Path) -> None:
    rows = [{name: value[0] for name, value in batch.items()} for batch in token_batches(32, rows=1)]
    options = {"output_dir": str(tmp_path), "max_steps": 8, "save_strategy": "no", "disable_tqdm": True}
    student = tiny_llama(layers=1)
    Trainer(
        model=student,
        args=TrainingArguments(**options, bf16=True),
        train_dataset=rows,
        callbacks=[hfcompress.PruneCallback(sparsity=0.75)],
    ).train()
    weights = prunable_weights(student)
    assert sparsity_of(weights) == pytest.approx(0.75, abs=1e-4)
    trainer = hfcompress.DistillationTrainer(
        model=student,
        teacher_model=tiny_llama(),
        args=hfcompress.DistillationConfig(**options),
        train_dataset=rows,
        callbacks=[hfcompress.PruneCallback(sparsity=0.75)],
    )
    trainer.train()
    assert trainer.teacher_model.device.type == "cuda"
    assert sparsity_of(weights) >= 0.75 - 1e-4


def pair_for(case: str) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any]]:
    """Return a student, a teacher, and what the trainer gets beside them."""
    if case == "universal_logit":
        both = {"processing_class": STUDENT, "teacher_processing_class": TEACHER}
        return *models_of(), {"train_dataset": rows_of_texts(), **both}
    rows = [{name: value[0] for name, value in batch.items()} for batch in token_batches(16, rows=1)]
    return tiny_llama(layers=1), tiny_llama(seed=1), {"train_dataset": rows}


@pytest.mark.parametrize("case", ["forward_kl", "top_k_kl", "hidden_states", "relations", "universal_logit"])
def test_a_teacher_that_stays_on_the_cpu_teaches_the_same(case: str, tmp_path: Path) -> None:
    logged = []
    for place in ("cpu", 0):
        student, teacher, given = pair_for(case)
        teacher.save_pretrained(tmp_path / "teacher")
        teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", device_map={"": place})
        losses = [{"top_k_kl": {"k": 8}}] if case == "top_k_kl" else [case]
        args = hfcompress.DistillationConfig(
            str(tmp_path), max_steps=2, losses=losses, logging_steps=1, save_strategy="no", disable_tqdm=True
        )
        trainer = hfcompress.DistillationTrainer(model=student, teacher_model=teacher, args=args, **given)
        trainer.train()
        assert student.device.type == "cuda"
        assert teacher.device.type == ("cpu" if place == "cpu" else "cuda")
        logged.append([entry["kd_loss"] for entry in trainer.state.log_history if "kd_loss" in entry])
    assert min(logged[0]) > 0
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)
