"""What a checkpoint on disk holds: parameters, zeros, bits and bytes, counted from its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfcompress.checkpoint.bitsandbytes import bitsandbytes_group, count_packed, is_companion, packed_kind
from hfcompress.checkpoint.files import read_header, read_json, weight_files
from hfcompress.checkpoint.summary import CheckpointSummary, Part, QuantizationGroup
from hfcompress.errors import CheckpointError
from hfcompress.formats import METHOD
from hfcompress.packed.packing import PACKABLE_BITS, unpack_codes

__all__ = ["CheckpointSummary", "Part", "QuantizationGroup", "inspect_checkpoint", "read_header", "weight_files"]
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
}
_COMPANIONS = {
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "output_scale",
    "k_scale",
    "v_scale",
}
_BUFFERS = {"running_mean", "running_var", "num_batches_tracked", "inv_freq", "position_ids", "masked_bias"}
_EMBEDDINGS = re.compile(r"embed|wte$|wpe$|shared$|cls_token$|class_token$|mask_token$")
_HEAD = re.compile(r"head$|classif|^score$|^qa_outputs$|^cls$|^proj_out$|_projection$|^decoder_proj|^embed_out$")
_LAYER = re.compile(r"(?:^|\.)\d+(?=\.)")


def _quantization(config: dict[str, Any], folder: Path) -> tuple[str, tuple[QuantizationGroup, ...]]:
    """Return the format's name and its groups; raise for formats whose tensors do not tell their logical size."""
    options = config.get("quantization_config")
    if not options:
        return "plain", ()
    method = options.get("quant_method")
    if method == METHOD:
        inner, inner_groups = _quantization({"quantization_config": options.get("quantization")}, folder)
        return f"{METHOD} {inner.removeprefix('compressed-tensors ')}".strip(), inner_groups
    if method == "bitsandbytes":
        return "bitsandbytes", (bitsandbytes_group(options),)
    if method != "compressed-tensors":
        raise CheckpointError(
            f"{folder} is stored by the quantization method '{method}'. "
            "Only plain, hfcompress, compressed-tensors and bitsandbytes checkpoints can be counted."
        )
    groups = []
    for group in options.get("config_groups", {}).values():
        weights = group.get("weights") or {}
        if weights:
            groups.append(
                QuantizationGroup(
                    weights["num_bits"],
                    weights.get("type", "int"),
                    weights.get("symmetric", True),
                    weights.get("group_size"),
                    tuple(group.get("targets", ())),
                )
            )
    return f"compressed-tensors {options.get('format', '')}".strip(), tuple(groups)


def _uneven(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    options = config.get("quantization_config") or {}
    modules: dict[str, dict[str, Any]] = options.get("modules", {}) if options.get("quant_method") == METHOD else {}
    return dict(sorted(modules.items(), key=lambda item: [int(p) if p.isdigit() else p for p in item[0].split(".")]))


@dataclass(frozen=True)
class _Tensor:
    name: str
    parameters: int
    nonzero: int
    bytes: int
    dtype: str


class _Store:
    """The tensors of all files by name, read one at a time."""

    def __init__(self, files: list[Path], stack: ExitStack) -> None:
        self.headers = {name: tensor for path in files for name, tensor in read_header(path).items()}
        try:
            handles = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        except SafetensorError as error:
            raise CheckpointError(f"{files[0].parent} is damaged: {error}. Copy or download it again.") from error
        self._home = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        if name not in self._home:
            raise CheckpointError(f"The checkpoint lacks the tensor '{name}'. Copy or download it again.")
        return self._home[name].get_tensor(name)


def _packed_bits(module: str, words: int, columns: int, groups: tuple[QuantizationGroup, ...]) -> int:
    """Bits of one code: of the group that names the module, else of the one that fits the packed width."""
    named = {group.bits for group in groups if group.names(module)} or {group.bits for group in groups}
    fitting = {bits for bits in named if -(-columns * bits // 32) == words}
    if len(fitting) != 1:
        raise CheckpointError(
            f"{module}.weight_packed has {words} words a row for {columns} columns, which fits "
            f"{len(fitting)} of the groups in config.json's quantization_config."
        )
    return fitting.pop()


def _group_of_columns(store: _Store, module: str, columns: int, groups: int) -> Tensor:
    """Return the group of each input column, (columns,) int64."""
    if f"{module}.weight_g_idx" in store.headers:
        return store.read(f"{module}.weight_g_idx").long()
    return torch.arange(columns) // -(-columns // groups)


def _count_packed(store: _Store, name: str, groups: tuple[QuantizationGroup, ...], size: int) -> _Tensor:
    module = name.removesuffix(".weight_packed")
    packed = store.read(name)
    rows, columns = (int(n) for n in store.read(f"{module}.weight_shape"))
    bits = _packed_bits(module, packed.shape[-1], columns, groups)
    if bits not in PACKABLE_BITS:
        raise CheckpointError(f"{module} has codes of {bits} bits; only {PACKABLE_BITS} bits can be unpacked.")
    codes = unpack_codes(packed, bits, columns)
    zero: Tensor | int = 0
    if f"{module}.weight_zero_point" in store.headers:
        # Zero points are packed down the rows, codes along the columns.
        points = unpack_codes(store.read(f"{module}.weight_zero_point").T.contiguous(), bits, rows).T
        zero = points[:, _group_of_columns(store, module, columns, points.shape[1])]
    nonzero = int(torch.count_nonzero(codes != zero))
    return _Tensor(name, rows * columns, nonzero, size, f"int{bits}")


def _count(store: _Store, name: str, groups: tuple[QuantizationGroup, ...], quantized: bool) -> _Tensor:
    header = store.headers[name]
    size = header["data_offsets"][1] - header["data_offsets"][0]
    dtype = _DTYPES.get(header["dtype"], header["dtype"].lower())
    leaf = name.rpartition(".")[2]
    if leaf == "weight_packed" and quantized:
        return _count_packed(store, name, groups, size)
    packed_by = packed_kind(name, store.headers) if quantized else None
    if packed_by is not None:
        parameters, nonzero = count_packed(store.read, name, packed_by)
        return _Tensor(name, parameters, nonzero, size, packed_by)
    causal_mask = name.endswith("attn.bias") and len(header["shape"]) == 4  # old GPT-2 files hold it
    if leaf in _BUFFERS or causal_mask or (quantized and (leaf in _COMPANIONS or is_companion(name, store.headers))):
        return _Tensor(name, 0, 0, size, dtype)
    tensor = store.read(name)
    comparable = tensor.float() if dtype.startswith("float8") else tensor
    return _Tensor(name, tensor.numel(), int(torch.count_nonzero(comparable)), size, dtype)


def _place(name: str) -> tuple[str, str]:
    """Return the part of a tensor and, for a layer, the layer's name (up to the first ``.N.``)."""
    layer = _LAYER.search(name)
    above = (name[: layer.start()] if layer else name.rpartition(".")[0] or name).split(".")
    if any(_HEAD.search(piece) for piece in above):
        return "head", ""
    if layer:
        return "layers", name[: layer.end()]
    return ("embeddings" if any(_EMBEDDINGS.search(piece) for piece in name.split(".")) else "other"), ""


def _part(name: str, tensors: Iterable[_Tensor]) -> Part:
    tensors = list(tensors)
    weights: dict[str, int] = {}
    for tensor in tensors:
        if tensor.parameters:
            weights[tensor.dtype] = weights.get(tensor.dtype, 0) + tensor.parameters
    return Part(
        name,
        sum(t.parameters for t in tensors),
        sum(t.nonzero for t in tensors),
        sum(t.bytes for t in tensors),
        tuple(sorted(weights, key=lambda d: (-weights[d], d))),
    )


def _layer_order(name: str) -> tuple[str, int]:
    stack, _, index = name.rpartition(".")
    return stack, int(index)


def inspect_checkpoint(folder: str | Path) -> CheckpointSummary:
    """Count what a checkpoint folder holds, one tensor in memory at a time; tied weights count once.

    Raises CheckpointError for a missing or damaged file and for a format that cannot be counted.
    """
    folder = Path(folder)
    files = weight_files(folder)
    config = read_json(folder / "config.json")
    form, groups = _quantization(config, folder)
    with ExitStack() as stack:
        store = _Store(files, stack)
        tensors = [_count(store, name, groups, form != "plain") for name in sorted(store.headers)]
    by_part: dict[str, list[_Tensor]] = {"embeddings": [], "layers": [], "head": [], "other": []}
    by_layer: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        part, layer = _place(tensor.name)
        by_part[part].append(tensor)
        if layer:
            by_layer.setdefault(layer, []).append(tensor)
    return CheckpointSummary(
        folder=str(folder),
        architectures=tuple(config.get("architectures") or ()),
        model_type=config.get("model_type", ""),
        format=form,
        groups=groups,
        files=tuple(path.name for path in files),
        total=_part("total", tensors),
        parts=tuple(_part(name, found) for name, found in by_part.items() if found),
        layers=tuple(_part(name, by_layer[name]) for name in sorted(by_layer, key=_layer_order)),
        bytes_on_disk=sum(path.stat().st_size for path in files),
        has_recipe=(folder / "recipe.yaml").is_file(),
        has_measurements=(folder / "measurements.json").is_file(),
        uneven=_uneven(config),
    )
