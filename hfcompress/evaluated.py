"""Which weights and how many rows an evaluation in a Trainer's log was of: cards show no metrics of other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hfcompress.callbacks import unwrapped
from hfcompress.packed import PackedWeight

if TYPE_CHECKING:
    from transformers import Trainer

# In an entry of ``state.log_history``, which checkpoints keep; the last for data that are not eval_dataset.
WEIGHTS, ROWS, OTHER_DATA = "evaluated_weights", "evaluated_rows", "evaluated_other_data"


def note_evaluation(trainer: Trainer | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Write before metrics that were logged last which weights they are of, and of how many rows; return that entry.

    It has an entry of its own, as the Trainer's card shows all that is in one with metrics as results.
    Several callbacks may ask for it: the first does it.  Where no Trainer has logged the metrics, the result is empty.
    """
    timed = next((name for name in metrics if name.endswith("_runtime")), None)
    history: list[dict[str, Any]] = [] if trainer is None else trainer.state.log_history
    at = next((at for at in reversed(range(len(history))) if timed in history[at]), None)
    if trainer is None or at is None:
        return {}
    known = note_of(history, at)
    if known:
        return known
    rows = _rows(trainer.callback_handler.eval_dataloader)
    note = {WEIGHTS: digest_of_model(trainer.model), ROWS: rows, "step": history[at]["step"]}
    history.insert(at, note)
    return note


def note_of(history: Sequence[dict[str, Any]], at: int) -> dict[str, Any]:
    """Return what was written of the metrics in an entry of a log; empty where nothing was."""
    before = history[at - 1] if at else {}
    return before if WEIGHTS in before else {}


def _rows(loader: Any) -> int | None:
    """Return how many rows a loader has given; None where its data have no length or the last ones are left out."""
    data = getattr(loader, "dataset", None)
    return len(data) if isinstance(data, Sized) and not getattr(loader, "drop_last", False) else None


@torch.no_grad()
def digest_of_model(model: Any) -> str:
    """Return a digest of the weights that a model computes with; of sharded ones, of those that are here.

    So a model that rounds its weights in training has the same one when it is packed to exactly these.
    """
    digest = hashlib.sha256()
    for name, module in unwrapped(model).named_modules():
        with align_module_device(module):  # of what lies on disk, for the length of the block
            for key, tensor in sorted(_computed_with(module).items()):
                for held in _plain(tensor):
                    digest.update(f"{name}.{key} {tuple(held.shape)}\n".encode())
                    digest.update(held.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that hold a tensor's values: of a sharded one those here, of a packed one its parts."""
    whole = getattr(tensor, "ds_tensor", tensor)  # DeepSpeed leaves an empty one in a sharded one's place
    here: Tensor = whole.to_local() if hasattr(whole, "to_local") else whole
    parts = here.__tensor_flatten__()[0] if hasattr(here, "__tensor_flatten__") else None
    if parts is None:
        yield here
    for name in parts or ():
        yield from _plain(getattr(here, name))


def _computed_with(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters, and the buffers that are saved; of a packed weight, what it stands for."""
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if isinstance(module, PackedWeight):
        return {**own, "weight": module.dequantize()}
    rounded: Callable[[], Tensor] | None = getattr(module, "rounded_weight", None)
    if rounded is not None:
        return {**own, "weight": rounded()}
    hidden = module._non_persistent_buffers_set
    return own | {name: one for name, one in module.named_buffers(recurse=False) if name not in hidden}
