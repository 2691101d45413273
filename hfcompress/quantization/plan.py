"""Which layers are quantized and how; every fault is found here, before the first weight changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from math import gcd

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import ModelError
from hfcompress.packed.experts import routers, split_experts
from hfcompress.packed.format import is_seq2seq
from hfcompress.quantization.checks import check_weights, chosen_layers
from hfcompress.quantization.experts import join_experts_, refuse_dense_experts, split_experts_
from hfcompress.quantization.mixed import check_target
from hfcompress.quantization.options import AUTO, GPTQ
from hfcompress.quantization.planned import LinearMethod, PlannedLinear, fitting_group_size


def plan_linears(model: PreTrainedModel, method: LinearMethod, *, loaded: bool = True) -> list[PlannedLinear]:
    """Return the linear layers of the model's stacks that the method quantizes.

    loaded: False checks a model on the meta device, by shapes alone, before its weights are loaded.  Bits that are yet
    to be chosen stand there as the most that a layer may get.  Raises ModelError when the model is quantized already,
    has layers that cannot be packed, shares or damages a targeted weight, when nothing is left to quantize, or when
    the target for the bits is out of reach. Warns once about group sizes that do not divide, and about options that do
    not concern Conv1D. Routers of experts are left out.
    """
    if not loaded:
        fused = split_experts_(model, method)
        try:
            return _planned(model, method, loaded)
        finally:
            join_experts_(model, fused)
    planned = _planned(model, method, loaded)
    _warn_about_group_sizes(planned)
    _warn_about_conv1d(planned, method)
    return planned


def _planned(model: PreTrainedModel, method: LinearMethod, loaded: bool) -> list[PlannedLinear]:
    chosen = chosen_layers(model, method.exclude, outside_layers(model, method.embeddings, method.head))
    for name in routers(model):
        chosen.pop(name, None)
    refuse_dense_experts(model, chosen)
    also = check_weights(model, chosen, loaded)
    chosen = {name: model.get_submodule(name) for name in also}
    asked = method.group_size
    sizes = {name: _columns(module) for name, module in chosen.items()}
    # Stock Transformers unpacks some models by one scheme only, so there one group size has to fit all.
    plain = method.symmetric and all(isinstance(module, nn.Linear) for module in chosen.values())
    alone = plain and not is_seq2seq(model) and not split_experts(model)
    common = None if alone else gcd(*sizes.values())
    bits = max(method.candidates) if isinstance(method, GPTQ) and method.bits == AUTO else int(method.bits)
    planned = [
        PlannedLinear(
            name,
            module,
            bits,
            fitting_group_size(common or sizes[name], asked),
            asked,
            method.symmetric,
            {other: model.get_submodule(other) for other in also[name]},
        )
        for name, module in chosen.items()
    ]
    if isinstance(method, GPTQ) and method.bits == AUTO:
        check_target(model, planned, method)
    return planned


def _columns(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1])


def outside_layers(model: PreTrainedModel, embeddings: bool, head: bool) -> dict[str, nn.Module]:
    """Return the input embeddings and the output head by name, where they are asked for.

    Raises ModelError when the model has none, such as embeddings of pixels.
    """
    found: dict[str, nn.Module] = {}
    for asked, get, kind in (
        (embeddings, model.get_input_embeddings, nn.Embedding),
        (head, model.get_output_embeddings, nn.Linear),
    ):
        if not asked:
            continue
        module = get()
        if not isinstance(module, kind):
            what = "embeddings" if kind is nn.Embedding else "head"
            raise ModelError(f"{what}=True, but {type(model).__name__} has no {what} over a vocabulary. Leave it out.")
        found[next(name for name, one in model.named_modules() if one is module)] = module
    return found


def _warn_about_group_sizes(planned: Iterable[PlannedLinear]) -> None:
    changed: dict[str, list[str]] = {}
    for one in planned:
        if one.group_size != one.requested_group_size:
            size = "one scale per row" if one.group_size is None else str(one.group_size)
            note = f"{one.requested_group_size} -> {size} for {_columns(one.module)} columns"
            changed.setdefault(note, []).append(one.name)
    if changed:
        parts = [f"{note} ({len(names)} layers, such as {names[0]})" for note, names in changed.items()]
        message = f"Group sizes that do not divide the input columns were changed: {'; '.join(parts)}."
        warnings.warn(message, stacklevel=5)


def _warn_about_conv1d(planned: Iterable[PlannedLinear], method: LinearMethod) -> None:
    """Say which of GPTQ's options are not followed where a group lies across columns, with scales for each column."""
    names = [one.name for one in planned if isinstance(one.module, Conv1D)]
    if names and isinstance(method, GPTQ) and (method.order != "stored" or method.sweeps):
        warnings.warn(
            f"order={method.order!r} and sweeps={method.sweeps} do not concern Conv1D: {len(names)} layers, such as "
            f"{names[0]}, are rounded in stored order without sweeps.",
            stacklevel=5,
        )
