"""Memory that a calibrated layer does not need any more serves others, and what a file holds is not kept twice."""

from __future__ import annotations

import subprocess
import sys
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hfcompress.calibration import joined, parts, walk_layers
from hfcompress.calibration.blocks import Blocks
from hfcompress.calibration.joined import Ground
from hfcompress.calibration.observe import GRAM, TokenMasks
from hfcompress.calibration.record import LayerCall
from hfcompress.calibration.turn_pass import Turn, TurnPass
from hfcompress.calibration.turns import Turns
from hfcompress.devices import ENTRY, PAGEMAP, _glibc, unmap_unchanged
from hfcompress.quantization import GPTQ, quantize
from hfcompress.structure.stack import linear_weights_of
from tests.conftest import tiny_llama, token_batches
from tests.families import FAMILIES

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells which pages are in memory.")

NAMED = (("a", 1, 2), ("b", 2, 4))  # names, tokens for a row, and sizes
# Prints how many MiB a process holds less than when its heap was full: once its holes have gone back, once blocks lie
# in holes again (an aligned block needs a larger one), and once those are freed without the heap having grown.
HOLES = """
from pathlib import Path
import torch
from hfcompress.devices import freed_memory_kept, give_back_holes

def blocks(count, mib):
    return [torch.ones(mib << 18) for _ in range(count)]

def resident_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) >> 10

with freed_memory_kept():
    give_back_holes()
    kept = blocks(40, 8)
    del kept[::2]
    full = resident_mib()
    give_back_holes()
    print(full - resident_mib())
    again = blocks(20, 7)
    print(full - resident_mib())
    del again
    give_back_holes()
    print(full - resident_mib())
    assert len(kept) == 20
"""


def pages_in_memory(tensor: Tensor) -> int:
    """Count the pages of which a tensor has all that are mapped now."""
    first = -(-tensor.data_ptr() // PAGESIZE)
    count = (tensor.data_ptr() + tensor.nbytes) // PAGESIZE - first
    with PAGEMAP.open("rb") as pagemap:
        pagemap.seek(first * ENTRY)
        return int((torch.frombuffer(bytearray(pagemap.read(count * ENTRY)), dtype=torch.int64) < 0).sum())


@pytest.mark.parametrize(
    ("family", "network", "spent"),
    [("llama", "mlp", True), ("gpt2", "mlp", True), ("gemma3", "mlp", True), ("gpt_neox", "mlp", False)],
)
def test_what_nothing_reads_again_makes_room(
    family: str, network: str, spent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's input goes when its last network begins, whose output takes its input's place; nothing else changes.

    Where attention and network stand side by side (GPT-NeoX), the layer's input is read at the end.
    """
    monkeypatch.setattr(parts, "PART", 3 * 12)
    model = FAMILIES[family].model()
    data = token_batches(2, rows=5, length=12)
    found: list[list[Tensor]] = []
    for learn in (joined.inputs_are_spent, lambda *args: False):
        monkeypatch.setattr(joined, "inputs_are_spent", learn)
        visit = next(iter(walk_layers(model, data)))
        whole = visit.joined_()
        assert whole is not None
        places: list[bool] = []
        handle = visit.layer.get_submodule(network).register_forward_hook(
            lambda module, args, output, places=places: places.append(args[0].data_ptr() == output.data_ptr())
        )
        visit.compress_(list(linear_weights_of(visit.layer)), GRAM, lambda found: None)
        handle.remove()
        found.append([one.hidden for one in visit.batches if one.hidden is not None])
        assert places[-1] is (spent and not found[1:])  # the second time it has not been learnt
        assert (whole[2].untyped_storage().nbytes() == 0) is places[-1]
    for states, expected in zip(*found, strict=True):
        assert torch.equal(states, expected)


class _SharingLayer(nn.Module):
    """A linear layer and a network beside it that get the same states."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.beside = nn.LayerNorm(16), nn.Linear(16, 16)
        self.network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, states: Tensor) -> Tensor:
        states = self.norm(states)
        output: Tensor = self.beside(states) + self.network(states)
        return output


def test_an_input_that_a_turn_waits_with_is_not_written_over() -> None:
    layer, hidden = _SharingLayer().requires_grad_(False), torch.randn(6, 4, 16)
    inputs = layer.norm(hidden).flatten(0, 1)
    groups = [["beside"], ["network.0"], ["network.2"]]
    dense = {"": [torch.zeros(24, 16)], "network.0": [inputs.clone()], "network.2": [torch.zeros(24, 32)]}
    linears = {name: layer.get_submodule(name) for (name,) in groups}
    turns: dict[str, Turn] = {}
    ground = Ground(layer, linears, groups, TokenMasks(None, None))
    turn_pass = TurnPass(ground, {"beside": ""}, dense, lambda turn: turns.update({turn.found.names[0]: turn}))
    with torch.no_grad():
        expected = layer(hidden)
        torch.testing.assert_close(turn_pass.run(LayerCall((), {}, False), hidden), expected)
    assert turn_pass.spent
    torch.testing.assert_close(turns["beside"].found.hessian, inputs.T @ inputs)


def test_rows_of_batches_lie_side_by_side() -> None:
    """As many fit in as the batches have tokens, whichever is the largest, and where padding is left out, too."""
    tokens = [10, 4, 6, 2]
    blocks = Blocks(tokens)
    given = {name: [torch.randn(count // share, size) for count in tokens] for name, share, size in NAMED}
    kept = {name: [blocks.copy(name, rows) for rows in given[name]] for name in given}
    for name, rows in kept.items():
        assert all(torch.equal(one, other) for one, other in zip(rows, given[name], strict=True))
        sizes = [one.nbytes for one in rows]
        assert [one.data_ptr() - rows[0].data_ptr() for one in rows] == [sum(sizes[:i]) for i in range(len(rows))]
        assert rows[0].untyped_storage().nbytes() == sum(sizes)


def test_rows_that_are_more_than_expected_begin_a_block() -> None:
    blocks = Blocks([3, 3, 3])
    given = [torch.randn(count, 2) for count in (3, 7, 5)]
    kept = [blocks.copy("a", rows) for rows in given]
    assert all(torch.equal(one, other) for one, other in zip(kept, given, strict=True))
    assert [one.untyped_storage().nbytes() // 8 for one in kept] == [9, 14, 14]


def test_the_dense_models_states_take_no_room_twice() -> None:
    """Its output of a layer lies where the layer's input lay."""
    visit = next(iter(walk_layers(tiny_llama(), token_batches(2, rows=5, length=12))))
    hidden = [states.clone() for states in visit.hidden_states]
    expected = [visit.output(index) for index in range(2)]
    turns = Turns(visit, list(linear_weights_of(visit.layer)), hidden)
    assert [one.data_ptr() for one in turns.outputs] == [one.data_ptr() for one in hidden]
    assert all(torch.equal(one, other) for one, other in zip(turns.outputs, expected, strict=True))


@pytest.mark.skipif(_glibc("mallinfo2") is None, reason="The C library does not tell of its heap.")
def test_holes_go_back_once_a_block_fits_into_none_of_them() -> None:
    """And only then: what fits into them finds its pages there.  In a process whose heap has no other holes."""
    run = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True)
    assert [int(mib) for mib in run.stdout.split()] == pytest.approx([160, 20, 20], abs=16)


def test_holes_are_looked_for_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr("hfcompress.calibration.walk.give_back_holes", lambda: calls.append(None))
    model = tiny_llama(layers=3)
    quantize(model, GPTQ(bits=4, group_size=16), token_batches(4, rows=8, length=12))
    assert len(calls) == 2  # of the last one nothing goes on


def test_states_of_all_batches_are_joined_once() -> None:
    model = FAMILIES["llama"].model()
    walk = walk_layers(model, token_batches(2, rows=5, length=12))
    first = next(walk)
    first.compress_(list(linear_weights_of(first.layer)), GRAM, lambda found: None)
    second = next(walk)
    one, other = second.joined_(), second.joined_()
    assert one is not None
    assert other is not None
    assert one[2] is other[2]
    assert one[2].data_ptr() == second.hidden_states[0].data_ptr()
    second.batches[0].hidden, second.batches[0].whole = second.hidden_states[0] + 1, None
    changed = second.joined_()
    assert changed is not None
    assert torch.equal(changed[2], torch.cat(second.hidden_states))
    assert not torch.equal(changed[2], one[2])


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
