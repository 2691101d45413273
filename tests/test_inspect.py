"""What a checkpoint holds is counted from its tensors; damage is named before anything is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from hfcompress.checkpoint.inspect import inspect_checkpoint, read_header, weight_files
from hfcompress.errors import CheckpointError
from hfcompress.packed import pack_codes
from hfcompress.publish import inspection_tables
from tests.conftest import tiny_bert, tiny_llama

WEIGHTS = "model.safetensors"


def parameters_of(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters and non-zeros, tied ones once."""
    tensors = list(model.parameters())
    return sum(p.numel() for p in tensors), sum(int(p.count_nonzero()) for p in tensors)


@pytest.mark.parametrize("shard", ["5GB", "100KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_model(tmp_path: Path, shard: str, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained(tmp_path, max_shard_size=shard)
    found = inspect_checkpoint(tmp_path)
    assert (found.parameters, found.nonzero) == parameters_of(model)
    assert found.format == "plain"
    assert found.architectures == ("LlamaForCausalLM",)
    assert len(found.files) == (1 if shard == "5GB" else 4)
    assert found.bytes_on_disk == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    for parts in (found.parts, [*found.layers, *(part for part in found.parts if part.name != "layers")]):
        for field in ("parameters", "nonzero", "bytes"):
            assert sum(getattr(part, field) for part in parts) == getattr(found.total, field)
    assert {part.name for part in found.parts} == {"embeddings", "layers", "other"} | (set() if tied else {"head"})
    layer = model.model.layers[1]
    zeros = sum(int((p == 0).sum()) for p in layer.parameters())
    assert found.layers[1].sparsity == pytest.approx(zeros / sum(p.numel() for p in layer.parameters()))
    assert found.total.bits_per_weight == 32


def test_layers_of_both_stacks_stand_in_numeric_order(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=11, num_decoder_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    names = [f"decoder.block.{i}" for i in range(2)] + [f"encoder.block.{i}" for i in range(11)]
    assert [layer.name for layer in found.layers] == names
    assert (found.parameters, found.nonzero) == parameters_of(model)


def test_classifier_and_its_head(bert_dir: Path) -> None:
    found = inspect_checkpoint(bert_dir)
    assert {part.name: part.parameters for part in found.parts}["head"] == 32 * 2 + 2
    assert (found.parameters, found.nonzero) == parameters_of(tiny_bert())
    assert not found.has_recipe
    (bert_dir / "recipe.yaml").write_text("name: x")
    (bert_dir / "measurements.json").write_text("{}")
    assert inspect_checkpoint(bert_dir).has_recipe
    assert inspect_checkpoint(bert_dir).has_measurements


def packed_checkpoint(folder: Path, schemes: dict[str, int], zero_points: bool = False) -> tuple[int, int]:
    """Pack random codes in place of the linear layers named by the keys; returns parameters and non-zeros."""
    model = tiny_llama()
    model.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name, tensor in tensors.items() if tensor.dim() == 2 and "layers" in name]:
        bits = next(bits for part, bits in schemes.items() if part in name)
        weight, stem = tensors.pop(name), name.removesuffix(".weight")
        rows, columns = weight.shape
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, (rows, columns), generator=generator)
        points = torch.zeros(rows, columns // 32, dtype=torch.int64)
        if zero_points:
            points = torch.randint(-half, half, (rows, columns // 32), generator=generator)
            tensors[f"{stem}.weight_zero_point"] = pack_codes(points.T, bits).T.contiguous()
        tensors[f"{stem}.weight_packed"] = pack_codes(codes, bits)
        tensors[f"{stem}.weight_scale"] = torch.ones(rows, columns // 32)
        tensors[f"{stem}.weight_shape"] = torch.tensor([rows, columns])
        values = codes - points.repeat_interleave(32, dim=1)
        with torch.no_grad():
            model.get_parameter(name).copy_(values)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(schemes) == 1 else [f"re:.*{part}.*"],
            "weights": {"num_bits": bits, "type": "int", "symmetric": not zero_points, "group_size": 32},
        }
        for index, (part, bits) in enumerate(schemes.items())
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return parameters_of(model)


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_weights_are_counted_by_their_logical_shape(tmp_path: Path, bits: int, zero_points: bool) -> None:
    expected = packed_checkpoint(tmp_path, {"layers": bits}, zero_points)
    found = inspect_checkpoint(tmp_path)
    assert (found.parameters, found.nonzero) == expected
    assert found.format == "compressed-tensors pack-quantized"
    assert [(group.bits, group.group_size, group.symmetric) for group in found.groups] == [(bits, 32, not zero_points)]
    assert found.layers[0].dtypes[0] == f"int{bits}"
    scales = 32 / 32 + (bits / 32 if zero_points else 0)
    # Norms stay float32 and shapes take bytes, so a little more than the codes and their scales.
    assert bits + scales < found.layers[0].bits_per_weight < bits + scales + 0.35


def test_groups_of_different_bits_are_told_apart(tmp_path: Path) -> None:
    expected = packed_checkpoint(tmp_path, {"self_attn": 8, "mlp": 4})
    found = inspect_checkpoint(tmp_path)
    assert (found.parameters, found.nonzero) == expected
    assert found.layers[0].dtypes == ("int4", "int8", "float32")


def test_summary_is_json_and_a_table(tmp_path: Path) -> None:
    packed_checkpoint(tmp_path, {"layers": 4})
    found = inspect_checkpoint(tmp_path)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["total"]["parameters"] == found.parameters
    assert values["layers"][0]["bits_per_weight"] == found.layers[0].bits_per_weight
    assert values["parts"][0]["sparsity"] == found.parts[0].sparsity
    console = Console(width=100)
    with console.capture() as captured:
        console.print(*inspection_tables(found))
    text = captured.get()
    for needed in ("model.layers.1", "int4, group size 32", f"{found.parameters:,}", "LlamaForCausalLM", "absent"):
        assert needed in text


def damaged(path: Path, change: str) -> None:
    """Harm a file in one way."""
    content = path.read_bytes()
    path.write_bytes({
        "truncated": content[:-7],
        "cut in the header": content[:40],
        "longer": content + b"\0",
        "empty": b"",
        "short": content[:5],
        "text": b"this is not a checkpoint at all",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "header": content[:12] + b"\xff\xfe{{{" + content[18:],
    }[change])  # fmt: skip


DAMAGE = {
    "truncated": r"damaged: its header describes (\d+) bytes, the file has (\d+)\. Copy or download it again",
    "cut in the header": r"damaged: its header describes (\d+) bytes, the file has 40",
    "longer": "damaged: its header describes",
    "empty": "is empty",
    "short": r"is not a safetensors file \(5 bytes\)",
    "text": "is not a safetensors file",
    "pointer": "is a Git LFS pointer",
    "header": "its header cannot be read",
}


@pytest.mark.parametrize("change", DAMAGE)
def test_damage_is_named(bert_dir: Path, change: str) -> None:
    assert len(read_header(bert_dir / WEIGHTS)) == len(load_file(bert_dir / WEIGHTS))
    damaged(bert_dir / WEIGHTS, change)
    with pytest.raises(CheckpointError, match=DAMAGE[change]) as caught:
        inspect_checkpoint(bert_dir)
    assert WEIGHTS in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        weight_files(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        weight_files(tmp_path)
    tiny_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    names = [path.name for path in weight_files(tmp_path)]
    assert len(names) == 4
    (tmp_path / names[2]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {names[2]}"):
        weight_files(tmp_path)


def test_a_checkpoint_without_a_config_is_refused(bert_dir: Path) -> None:
    (bert_dir / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        inspect_checkpoint(bert_dir)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return pytest.fail, ("a pickle was opened",)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle, which is never opened\. Convert it"):
        weight_files(tmp_path)


def test_formats_that_cannot_be_counted_are_refused(bert_dir: Path) -> None:
    config = json.loads((bert_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (bert_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'awq'"):
        inspect_checkpoint(bert_dir)


def test_buffers_are_not_parameters(bert_dir: Path) -> None:
    before = inspect_checkpoint(bert_dir)
    tensors: dict[str, Tensor] = load_file(bert_dir / WEIGHTS)
    tensors["bert.embeddings.position_ids"] = torch.arange(64)
    tensors["bert.norm.running_mean"] = torch.ones(8)
    save_file(tensors, bert_dir / WEIGHTS, metadata={"format": "pt"})
    after = inspect_checkpoint(bert_dir)
    assert (after.parameters, after.nonzero) == (before.parameters, before.nonzero)
    assert after.total.bytes == before.total.bytes + 64 * 8 + 8 * 4
