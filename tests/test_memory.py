"""What a file holds is not kept in memory for longer than it is needed."""

from __future__ import annotations

import sys
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hfcompress.devices import ENTRY, PAGEMAP, unmap_unchanged
from hfcompress.quantization import GPTQ, quantize
from hfcompress.structure.stack import linear_weights_of
from tests.conftest import tiny_llama, token_batches

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells which pages are in memory.")


def pages_in_memory(tensor: Tensor) -> int:
    """Count the pages of which a tensor has all that are mapped now."""
    first = -(-tensor.data_ptr() // PAGESIZE)
    count = (tensor.data_ptr() + tensor.nbytes) // PAGESIZE - first
    with PAGEMAP.open("rb") as pagemap:
        pagemap.seek(first * ENTRY)
        return int((torch.frombuffer(bytearray(pagemap.read(count * ENTRY)), dtype=torch.int64) < 0).sum())


@ON_LINUX
def test_what_a_file_holds_is_unmapped_and_what_was_changed_stays(tmp_path: Path) -> None:
    file, size = tmp_path / "weights", 64 * PAGESIZE
    expected = torch.arange(size, dtype=torch.int64) % 251
    file.write_bytes(bytes(expected.tolist()))
    read, written = (torch.from_file(str(file), size=size, dtype=torch.uint8) for _ in range(2))
    plain = expected.to(torch.uint8)
    written[5 * PAGESIZE] = 255
    for tensor in (read, written, plain):
        tensor.sum()
    unmap_unchanged([read, written, plain, read.view(64, -1).T, torch.empty(0)])
    assert pages_in_memory(read) == 0
    assert pages_in_memory(written) == 64
    assert pages_in_memory(plain) >= 63
    assert torch.equal(read.long(), expected)
    assert written[5 * PAGESIZE] == 255
    assert torch.equal(plain.long(), expected)


@ON_LINUX
def test_quantize_keeps_no_pages_of_the_checkpoint_and_puts_its_weights_back(tmp_path: Path) -> None:
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = [module.weight for module in linear_weights_of(model.model.layers[0]).values()]

    assert all(pages_in_memory(weight) for weight in weights)

    def fail(name: str, rows: object) -> None:
        if name.endswith(".0"):
            assert not any(pages_in_memory(weight) for weight in weights)
        else:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, GPTQ(group_size=32), token_batches(8), on_layer=fail)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
