"""Which weights are pruned: by the names of modules, by their types, or all linear layers of the stack."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hfcompress.errors import ModelError
from hfcompress.structure import stack_linears
from hfcompress.structure.experts import fused_experts

logger = logging.get_logger(__name__)


def prunable_weights(
    model: nn.Module, targets: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the weights to prune by name; a weight shared by two modules appears once.

    targets, exclude: name patterns (``fnmatch``) over module names, or exact names of module types: "Linear",
    "Conv1D", "Embedding".  targets None means every linear and Conv1D module inside the layer stack, which leaves
    embeddings, the head and norms alone.  A shared weight counts as a type only where all its modules are of it, so
    that "Linear" leaves an embedding alone that a head is tied to; it is excluded where any of its modules is.
    Raises ModelError when nothing matches, with names that exist.
    """
    targets, exclude = None if targets is None else tuple(targets), tuple(exclude)
    holders = _holders(model)
    chosen = set(stack_linears(model)) if targets is None else None
    found: dict[str, nn.Parameter] = {}
    for weight, modules in holders.values():
        named = [name for name in modules if (name in chosen if chosen is not None else _named(name, targets or ()))]
        if not named and targets is not None and all(_typed(module, targets) for module in modules.values()):
            named = list(modules)
        if named and not any(_named(name, exclude) or _typed(module, exclude) for name, module in modules.items()):
            found[f"{named[0]}.weight"] = weight
    if not found:
        examples = ", ".join(_examples(model, [next(iter(modules)) for _, modules in holders.values()]))
        raise ModelError(
            f"No weight matches targets={_shown(targets)} and exclude={_shown(exclude)}. "
            f"Names in this model look like: {examples}; types like: Linear, Embedding."
        )
    return found


def _examples(model: nn.Module, names: list[str]) -> list[str]:
    """Return some names that targets could have; names: of all modules with a weight."""
    try:
        return list(stack_linears(model))[:3]
    except ModelError:  # it has no stack of layers
        return names[:3]


def warn_of_experts(model: nn.Module, targets: Iterable[str] | None, what: str) -> None:
    """Warn where the default targets leave out experts, whose matrices are slices of one tensor and so no modules.

    what: prunes.
    """
    experts = {} if targets is not None else fused_experts(model)
    if not experts:
        return
    left_out = sum(model.get_submodule(name).get_parameter(leaf).numel() for name in experts for leaf in experts[name])
    total = sum(weight.numel() for weight in model.parameters())
    logger.warning(
        f"{what} leaves out {left_out:,} of the model's {total:,} weights: the experts of {len(experts)} layers "
        f"('{next(iter(experts))}'), which are slices of one tensor. They stay dense, and the sparsity is that of the "
        "other weights. hfcompress.quantize makes experts smaller."
    )


def _holders(model: nn.Module) -> dict[int, tuple[nn.Parameter, dict[str, nn.Module]]]:
    """Return every weight of two dimensions or more with the modules that have it, by identity."""
    holders: dict[int, tuple[nn.Parameter, dict[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() >= 2:
            holders.setdefault(id(weight), (weight, {}))[1][name] = module
    return holders


def modules_of(model: nn.Module, weight: Tensor) -> list[nn.Module]:
    """Return the distinct modules whose weight this is."""
    return [module for module in model.modules() if getattr(module, "weight", None) is weight]


def lies_transposed(module: nn.Module) -> bool:
    """Say whether a module's weight lies (inputs, outputs), as GPT-2's Conv1D has it."""
    return isinstance(module, Conv1D)


def _named(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _typed(module: nn.Module, patterns: Iterable[str]) -> bool:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return not kinds.isdisjoint(patterns)


def _shown(patterns: Iterable[str] | None) -> str:
    return "None" if patterns is None else str(list(patterns))


def as_rows(tensor: Tensor, transposed: bool) -> Tensor:
    """Return a matrix as (outputs, inputs); a second call with the same flag gives the first layout back."""
    return tensor.t() if transposed else tensor
