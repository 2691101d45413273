"""Finished layers on disk while a model is quantized, so that a killed run goes on after them.

A shard is a safetensors file with the tensors of one layer of a stack as quantization left them, and that layer's rows
of the report. It appears whole or not at all. Digests of what decides the result stand beside the shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hfcompress.calibration.running import Batch, tensors_in
from hfcompress.checkpoint.atomic import write_tensors, write_text
from hfcompress.errors import CheckpointError, OutputError
from hfcompress.quantization.folding import Changes, set_
from hfcompress.quantization.placing import empty_twin, put_
from hfcompress.quantization.planned import PlannedLinear
from hfcompress.quantization.report import QuantizedLinear
from hfcompress.structure.offload import stored_tensors

Rows = list[QuantizedLinear]
BEGAN, BITS, SUFFIX = "began.json", "bits.json", ".safetensors"


@dataclass(frozen=True)
class LayerShards:
    """A folder of finished layers.  began: what decides the result, each as a digest."""

    folder: Path
    began: Mapping[str, str]

    @classmethod
    def open(
        cls, folder: str | Path, model: nn.Module, options: Sequence[Any], batches: Sequence[Batch]
    ) -> LayerShards:
        """Return the shards of a run, of which there may be some already.

        options: of everything that is done to the layers.  Raises OutputError when the folder's layers come from
        another model, other options, other calibration data or another version of hfcompress.
        """
        began = {
            "the version of hfcompress": version("hfcompress"),
            "the options": _digest([repr(one).encode() for one in options]),
            "the model": _digest(_bytes_of(stored_tensors(model))),
            "the calibration data": _digest(part for batch in batches for part in _bytes_of(batch.items())),
        }
        shards = cls(Path(folder).expanduser(), began)
        for left in shards.folder.glob(f".*{SUFFIX}.*"):  # what a kill left half written
            left.unlink()
        file = shards.folder / BEGAN
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else began
        changed = [name for name in began if before.get(name) != began[name]]
        if changed:
            raise OutputError(
                f"{folder} holds finished layers of a run that began otherwise: {', '.join(changed)} changed. Undo "
                "that to go on, or remove the folder to begin anew."
            )
        return shards

    def finished(self) -> dict[str, Rows]:
        """Return the rows of each finished layer by its name."""
        found = {}
        for file in sorted(self.folder.glob(f"*{SUFFIX}")):
            with self._reading(file), safe_open(file, framework="pt") as shard:
                rows = json.loads(shard.metadata()["rows"])
                found[file.name.removesuffix(SUFFIX)] = [QuantizedLinear(**row) for row in rows]
        return found

    def load_(self, name: str, layer: nn.Module) -> None:
        """Give a layer, with empty packed layers in their places, the tensors that it was finished with."""
        file = self._file(name)
        with self._reading(file), safe_open(file, framework="pt") as shard:
            layer.load_state_dict({key: shard.get_tensor(key) for key in shard.keys()})  # noqa: SIM118 (no mapping)

    def write(self, name: str, layer: nn.Module, rows: Sequence[QuantizedLinear]) -> None:
        """Write a finished layer.  Raises CheckpointError when the disk is full; earlier layers stay as they are."""
        tensors = {key: one.detach().cpu().clone().contiguous() for key, one in layer.state_dict().items()}
        try:
            self._begin()
            write_tensors(self._file(name), tensors, {"rows": json.dumps([asdict(row) for row in rows])})
        except (OSError, SafetensorError) as error:
            kept = len(list(self.folder.glob(f"*{SUFFIX}")))
            raise CheckpointError(
                f"The finished layer {name} could not be written to {self.folder}: {error}. The {kept} layers before "
                "it are kept there: free some space and resume."
            ) from error

    def bits(self, names: Sequence[str], choose: Callable[[], Mapping[str, int]]) -> Mapping[str, int]:
        """Return the bits of each linear layer that the run began with; a run that begins chooses them.

        Raises CheckpointError when they cannot be read or written.
        """
        file = self.folder / BITS
        if file.is_file():
            with self._reading(file):
                found = json.loads(file.read_text(encoding="utf-8"))
                return {name: int(found[name]) for name in names}
        chosen = choose()
        try:
            self._begin()
            write_text(file, json.dumps(dict(chosen), indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"The chosen bits could not be written to {file}: {error}. Free some space."
            ) from error
        return chosen

    def _begin(self) -> None:
        """Make the folder and note what the run began with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / BEGAN).is_file():
            write_text(self.folder / BEGAN, json.dumps(dict(self.began), indent=2) + "\n")

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    @contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            again = "the bits chosen" if file.name == BITS else "its layer quantized"
            raise CheckpointError(f"{file} is damaged: {error}. Remove it to have {again} again.") from error


def kept_layers(
    store: LayerShards | None,
    model: nn.Module,
    planned: Sequence[PlannedLinear],
    quantize_: Callable[[Sequence[PlannedLinear]], Iterator[tuple[str, Rows]]],
    changes: Changes,
    twin: Callable[[PlannedLinear], nn.Module] = empty_twin,
) -> Iterator[tuple[str, Rows]]:
    """Return the steps of ``quantize_``, whose layers are kept in a store; those that it has already are not redone.

    store: None keeps nothing.  quantize_: given the linear layers that are left, does a layer of the stack at each
    step and yields its name and rows, none for a layer that has nothing left.  changes: takes the values of what a
    kept layer changes beside its linear layers.  twin: makes an empty layer for what is kept of a linear one.
    """
    if store is None:
        return quantize_(planned)
    done = store.finished()
    finished = {row.name for rows in done.values() for row in rows}
    rest = quantize_([one for one in planned if one.name not in finished])
    by_name = {one.name: one for one in planned}

    def bring_(name: str) -> None:
        for row in done[name]:
            as_done = replace(by_name[row.name], bits=row.bits, group_size=row.group_size)
            put_(model, row.name, twin(as_done))
        layer = model.get_submodule(name)
        for parameter in layer.parameters():  # loading writes into norms and biases, which a failure brings back
            set_(parameter, parameter.data.clone(), changes)
        store.load_(name, layer)

    return _through(store, model, done, rest, bring_)


def _through(
    store: LayerShards,
    model: nn.Module,
    done: Mapping[str, Rows],
    steps: Iterator[tuple[str, Rows]],
    bring_: Callable[[str], None],
) -> Iterator[tuple[str, Rows]]:
    """Pass steps on; write what each finishes, or bring what an earlier run has finished.

    Calibration sends its inputs through a layer when the next step is asked for: the layer is in its place by then.
    """
    for name, rows in steps:
        if name in done:
            bring_(name)
        elif rows:
            store.write(name, model.get_submodule(name), rows)
        yield name, done.get(name, rows)


def _bytes_of(values: Iterable[tuple[str, Any]]) -> Iterator[bytes]:
    for name, value in values:
        yield name.encode()
        for tensor in tensors_in(value):
            yield f"{tensor.dtype}{tuple(tensor.shape)}".encode()
            yield _as_bytes(tensor)


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
