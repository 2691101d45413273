"""Save a compressed model so that ``from_pretrained`` loads it, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.checkpoint.atomic import MARKER, new_folder, recover, refuse_foreign, refuse_full_disk
from hfcompress.checkpoint.dense import to_dense
from hfcompress.checkpoint.files import weights_digest
from hfcompress.checkpoint.remote_code import add_remote_code, refuse_remote_code, remote_class_of
from hfcompress.checkpoint.verify import Probe, Verification, verify_checkpoint
from hfcompress.errors import CheckpointError, ModelError
from hfcompress.loading.record import is_ours, record_uneven
from hfcompress.packed import packed_layers
from hfcompress.packed.bitsandbytes import bitsandbytes_layers, dense_shape
from hfcompress.packed.bytes import byte_layers
from hfcompress.packed.experts import with_fused_experts
from hfcompress.packed.weight import PARTS
from hfcompress.progress import busy, quiet_bars
from hfcompress.structure.shapes import Shapes, meta_twin, resize_


@dataclass(frozen=True)
class SavedCheckpoint:
    """Where a checkpoint was saved, in which format, and what its verification showed (None: not asked for)."""

    folder: Path
    format: str
    verification: Verification | None


def save_compressed(
    model: PreTrainedModel,
    folder: str | Path,
    processor: Any = None,
    *,
    verify: bool = False,
    uneven: Literal["loader", "dense", "remote-code"] = "loader",
    inputs: dict[str, Tensor] | None = None,
    extra_files: Mapping[str, str] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> SavedCheckpoint:
    """Save a model (and its processor) as a checkpoint that ``from_pretrained`` loads.

    Stock Transformers loads it where the config can say the model's shapes, and otherwise once hfcompress is imported;
    the model's config then gets a record of its shapes, with which plain ``save_pretrained`` writes the same files.
    The folder appears only when everything in it is written and, with ``verify``, has been reloaded in a fresh
    process to the same logits.
    uneven: what to do with shapes that the config cannot say. ``loader`` writes them for our loader; ``dense`` fills
    them up with zeros; ``remote-code`` adds a Python file that loads for those who pass ``trust_remote_code=True``.
    inputs: what verification feeds the model; random tokens unless given.
    extra_files: text files by name, written into the same folder.
    finish: writes what tells of the checkpoint, as a card, into a folder that holds it whole and verified, before that
    gets its name.
    Raises OutputError for a folder that hfcompress did not write, to which someone added files, or which another
    process is writing; ModelError for NaN weights; CheckpointError when the model's config cannot describe its shapes,
    the disk is full, or the reload differs.  Then nothing has changed.
    """
    folder = Path(folder).expanduser()
    recover(folder)
    refuse_foreign(folder)
    refuse_nan(model)
    _refuse_rounding(model)
    if uneven == "dense":
        model = to_dense(model, inputs)
    shapes = record_uneven(model)
    remote = uneven == "remote-code" and bool(shapes)
    if remote:
        refuse_remote_code(model)
    _refuse_inexpressible(model, shapes)
    refuse_full_disk(folder, _bytes_of(model))
    probe = Probe.of(model, inputs) if verify else None
    if probe is not None and remote:
        probe = replace(probe, loaded_by=remote_class_of(model))
    form = "remote code" if remote else format_of(model)
    verification = None
    with new_folder(folder) as scratch, _cache_on(model), quiet_bars():
        with busy(f"saving {folder.name}"):
            # Transformers does not translate an older format's names for remote code.
            model.save_pretrained(scratch, save_original_format=not remote)
        if remote:
            add_remote_code(scratch, model)
        if processor is not None:
            processor.save_pretrained(scratch)
        for name, text in (extra_files or {}).items():
            (scratch / name).write_text(text, encoding="utf-8")
        if probe is not None:
            verification = verify_checkpoint(scratch, probe, trust_remote_code=remote)
        facts = {
            "hfcompress": version("hfcompress"),
            "format": form,
            "weights": weights_digest(scratch),
            "verified": asdict(verification) if verification else None,
        }
        (scratch / MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if finish is not None:
            finish(scratch)
    return SavedCheckpoint(folder, form, verification)


def refuse_nan(model: nn.Module) -> None:
    """Raise ModelError, naming the tensor, when a weight is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        values = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite does not know float8
        if not bool(torch.isfinite(values).all()):
            raise ModelError(
                f"Weight '{name}' holds NaN or infinite values; such a model is neither compressed nor saved. "
                "Nothing was changed."
            )


def _refuse_rounding(model: nn.Module) -> None:
    """Raise ModelError for layers that compute with a rounded weight and hold another."""
    for name, module in model.named_modules():
        if hasattr(type(module), "dense_form"):
            raise ModelError(
                f"{name} rounds its weight for quantization-aware training, but holds it unrounded: export the model "
                "by QuantizeAwareCallback.export before it is saved. (Plain save_pretrained saves what it holds.)"
            )


def format_of(model: PreTrainedModel) -> str:
    """Return the name of the format that a model is saved in, once its uneven shapes are recorded."""
    recorded = getattr(model.config, "quantization_config", None) or {}
    values = recorded if isinstance(recorded, dict) else recorded.to_dict()
    inner = (values.get("quantization") or {}) if is_ours(model.config) else values
    if not values:
        return "plain"
    method = getattr(values["quant_method"], "value", values["quant_method"])  # a member of an enum, or text
    library = getattr(inner.get("quant_method"), "value", inner.get("quant_method"))
    parts = (method, inner.get("format") or (library if library != method else ""))
    return " ".join(part for part in parts if part)


def _refuse_inexpressible(model: PreTrainedModel, shapes: Shapes) -> None:
    """Raise CheckpointError unless the config and the record of uneven shapes make a model with the same tensors."""
    twin = meta_twin(model)
    resize_(twin, shapes)
    expected = {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    actual = logical_shapes(model)
    for name in sorted({*expected, *actual}):
        if expected.get(name) != actual.get(name):
            raise CheckpointError(
                f"Tensor '{name}' has shape {actual.get(name)}, but from this config {type(model).__name__} builds "
                f"{expected.get(name)}, so from_pretrained could not load it. Nothing was written."
            )


def logical_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by name, a packed weight as the dense weight that it stands for."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{n}.weight": (one.rows, one.columns) for n, one in packed_layers(model).items()
    }
    packed = {*packed_layers(model), *byte_layers(model)}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):  # what compressed-tensors has loaded and may not have unpacked yet
            packed.add(name)
            if hasattr(module, "weight_packed"):
                shapes[f"{name}.weight"] = tuple(int(size) for size in module.weight_shape)
    hidden = {f"{name}.{part}" for name in packed for part in PARTS}
    shapes.update({name: tuple(value.shape) for name, value in model.state_dict().items() if name not in hidden})
    for name, layer in bitsandbytes_layers(model).items():
        own = {key for key in shapes if key.startswith(f"{name}.") and key != f"{name}.bias"}
        shapes = {key: shape for key, shape in shapes.items() if key not in own}
        shapes[f"{name}.weight"] = dense_shape(layer)
    return with_fused_experts(model, shapes)


def _bytes_of(model: nn.Module) -> int:
    seen = {value.data_ptr(): value.numel() * value.element_size() for value in model.state_dict().values()}
    return sum(seen.values())


@contextmanager
def _cache_on(model: PreTrainedModel) -> Iterator[None]:
    """The Trainer switches ``use_cache`` off; a decoder saved like that would generate slowly for everyone."""
    config = model.config.get_text_config()
    if not (model.can_generate() and getattr(config, "use_cache", None) is False):
        yield
        return
    config.use_cache = True
    try:
        yield
    finally:
        config.use_cache = False
