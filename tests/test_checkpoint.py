"""A checkpoint appears whole or not at all, and reloads to the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hfcompress.checkpoint import Probe, save_compressed, verify_checkpoint
from hfcompress.checkpoint.atomic import refuse_full_disk
from hfcompress.errors import CheckpointError, ModelError, OutputError
from hfcompress.structure.modes import eval_mode
from tests.conftest import tiny_bert, tiny_gpt2_classifier, tiny_llama
from tests.forks import Forks
from tests.reloading import same_but_for_rounding


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_verified_in_a_process_without_hfcompress(
    make, dtype, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest
):
    if (make, dtype) != (tiny_llama, torch.float32):  # which a new interpreter verifies
        request.getfixturevalue("forked")
    model = make()
    for parameter in model.parameters():  # not .to(): a checkpoint's reader keeps rotary frequencies in float32
        parameter.data = parameter.data.to(dtype)
    saved = save_compressed(model, tmp_path / "out", tokenizer, verify=True)
    assert saved.verification is not None
    assert same_but_for_rounding(saved.verification)
    assert saved.verification.loaded_by in ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    assert json.loads((tmp_path / "out" / "hfcompress.json").read_text())["verified"]["max_logit"] > 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    save_compressed(tiny_llama(), tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o644}


def test_same_files_as_save_pretrained(tmp_path: Path) -> None:
    model = tiny_llama()
    save_compressed(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "plain")
    ours = listing(tmp_path / "ours")
    ours.pop("hfcompress.json")
    assert ours == listing(tmp_path / "plain")


@pytest.mark.usefixtures("forked")
def test_a_checkpoint_of_another_model_is_not_verified(tmp_path: Path) -> None:
    save_compressed(tiny_llama(seed=0), tmp_path / "out")
    with pytest.raises(CheckpointError, match="reloads to a different model: logits differ by"):
        verify_checkpoint(tmp_path / "out", Probe.of(tiny_llama(seed=1)))


@pytest.mark.usefixtures("forked")
def test_a_model_is_verified_in_its_own_precision_after_training_in_mixed_precision(tmp_path: Path) -> None:
    """Training in bfloat16 leaves an autocast around ``forward`` that the model's reload does not have."""
    model = tiny_bert()
    arguments = TrainingArguments(
        str(tmp_path), bf16=True, use_cpu=True, max_steps=1, report_to="none", save_strategy="no"
    )
    rows = [{"input_ids": [1, 2, 3, 4], "attention_mask": [1] * 4, "labels": 1}] * 8
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    wrapped = model.forward
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    with eval_mode(model), torch.no_grad():
        assert torch.equal(model(**inputs).logits, type(model).forward(model, **inputs).logits)
    assert model.forward == wrapped
    save_compressed(model, tmp_path / "out", verify=True)


def test_a_probe_leaves_every_mode_as_it_was_and_ignores_autocast() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    plain = Probe.of(model)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = Probe.of(model)
    assert torch.equal(plain.logits, under_autocast.logits)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        Probe.of(model, {"no_such_input": torch.ones(1)})
    assert [module.training for module in model.modules()] == modes
    assert plain.device == "cpu"


@pytest.mark.usefixtures("forked")
def test_a_classifier_without_a_padding_token_is_verified(tmp_path: Path) -> None:
    saved = save_compressed(tiny_gpt2_classifier(), tmp_path / "out", verify=True)
    assert saved.verification is not None


@pytest.mark.usefixtures("forked")
def test_a_checkpoint_that_does_not_load_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    plain = model.save_pretrained

    def damaged(folder, **options):
        plain(folder, **options)
        weights = Path(folder) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    monkeypatch.setattr(model, "save_pretrained", damaged)
    with pytest.raises(CheckpointError, match="does not load with AutoModelForCausalLM"):
        save_compressed(model, tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_cache_is_on_in_the_saved_config_and_off_again_in_memory(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.use_cache = False  # as the Trainer leaves it
    save_compressed(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
    assert model.config.use_cache is False


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    model = tiny_llama()
    save_compressed(model, tmp_path / "out")
    elements = (tmp_path / "out" / "model.safetensors").stat().st_size / 4
    assert elements < sum(p.numel() for p in model.parameters()) * 1.1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()


def test_nan_weight_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"'bert\.encoder\.layer\.1\.output\.dense\.weight' holds NaN"):
        save_compressed(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_neither_config_nor_record_can_say_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(128, 64, bias=True)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.down_proj\.bias' has shape \(64,\)"):
        save_compressed(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="exists and was not written by hfcompress"):
        save_compressed(tiny_llama(), tmp_path / "out")
    assert listing(tmp_path) == {"out/thesis.txt": b"years of work"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        save_compressed(tiny_llama(), tmp_path / "file")


def test_our_own_folder_is_replaced(tmp_path: Path) -> None:
    save_compressed(tiny_llama(seed=0), tmp_path / "out", extra_files={"old.txt": "x"})
    save_compressed(tiny_llama(seed=1), tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded.model.norm.weight, tiny_llama(seed=1).model.norm.weight)
    assert torch.equal(reloaded.model.embed_tokens.weight, tiny_llama(seed=1).model.embed_tokens.weight)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FULL_DISK = """
import resource, signal
from tests.conftest import tiny_llama
from hfcompress import HFCompressError, save_compressed
model = tiny_llama(seed=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_compressed(model, {folder!r})
except HFCompressError as error:
    print(error)
"""


def test_a_write_that_fails_half_way_changes_nothing(tmp_path: Path, forks: Forks) -> None:
    """The kernel refuses to write past 50 kB, as a full disk would."""
    save_compressed(tiny_llama(seed=0), tmp_path / "out")
    before = listing(tmp_path)
    run = forks.run(["-c", FULL_DISK.format(folder=str(tmp_path / "out"))])
    assert run.returncode == 0, run.stderr
    assert "could not be written" in run.stdout
    assert "Nothing was changed" in run.stdout
    assert listing(tmp_path) == before


def test_a_full_disk_is_known_beforehand(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs 1000000000 MB, but its disk has \d+ MB left"):
        refuse_full_disk(tmp_path / "not" / "there", 10**15)
    refuse_full_disk(tmp_path, 1)


@pytest.mark.usefixtures("forked")
def test_an_image_model_is_verified_on_images(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    model = ViTForImageClassification(config)
    for inputs in (None, {"pixel_values": torch.randn(2, 3, 16, 16)}):
        saved = save_compressed(model, tmp_path / "out", verify=True, inputs=inputs)
        assert saved.verification is not None
        assert saved.verification.loaded_by == "AutoModelForImageClassification"
        assert saved.verification.max_logit > 0


@pytest.mark.usefixtures("forked")
def test_reloads_as_the_task_model(bert_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert_dir)
    save_compressed(model, tmp_path / "out", verify=True)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(reloaded) is type(model)
