"""How evenly heads attend, seen in a forward of its own beside each watched one of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from hfcompress.errors import ModelError
from hfcompress.pruning.inputs import counted, mask_names, take_sums
from hfcompress.structure import AttentionSite
from hfcompress.structure.inputs import dummy_inputs
from hfcompress.structure.modes import attention_implementation, training_flags_kept
from hfcompress.structure.running import running_beside

NAME = "hfcompress_weights"
See = Callable[[nn.Module, Tensor, Tensor], None]
_see: ContextVar[See] = ContextVar("hfcompress_attention_weights")


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return attention weights in float32 and which keys each query may see, (batch, heads, queries, keys) both.

    query: (batch, heads, queries, head_dim).  key: (batch, key/value heads, keys, head_dim).  mask: added to the
    scores, the lowest number of its type where a key is hidden; or bool, False there.  bias: added, hides nothing.
    """
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    # Mixed-precision training would multiply in 16 bits.
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ keys.float().transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if bias is not None:
        scores = scores + bias.float()
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        visible = visible & shown
        scores = scores if mask.dtype == torch.bool else scores + mask.float().where(shown, 0.0)
    # Finite, so that a query which may see nothing has weights, too.
    return scores.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1), visible


def distance_from_even(weights: Tensor, visible: Tensor) -> Tensor:
    """Return by how many nats each query's entropy lies below that of even attention, (batch, heads, queries)."""
    possible = visible.sum(-1).clamp_min(1).to(weights.dtype).log()
    return (possible - torch.special.entr(weights).sum(-1)).clamp_min(0)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as the library's own functions do, and show the weights."""
    weights, visible = attention_weights(query, key, attention_mask, scaling, position_bias)
    _see.get()(module, weights, visible)
    values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (weights.to(values.dtype) @ values).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


class AttentionWatch:
    """Sums each head's distance from even attention over queries, and counts these: (heads + 1,) per weight.

    The training forward keeps its own attention, which gives no weights away: while ``active``, a batch is run once
    more before it, without gradients and dropout, by an attention that computes them.
    sites: by the name of the weight that reads their heads.  Raises ModelError for attention that computes more.
    """

    def __init__(self, model: PreTrainedModel, sites: Mapping[str, AttentionSite]) -> None:
        self.active = False
        self.names = {model.get_submodule(site.name): name for name, site in sites.items()}
        self.masks = mask_names(model, sites)
        self.arguments: dict[str, Any] = {}
        self.sums = {
            name: torch.zeros(site.heads + 1, device=model.get_parameter(name).device) for name, site in sites.items()
        }
        _refuse_other_attention(model, set(self.names))
        self.handle = model.register_forward_pre_hook(self._run_beside, with_kwargs=True)

    @torch.compiler.disable
    def _run_beside(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active and model.training:
            self.arguments = kwargs
            _run(model, args, kwargs, self._add)
            self.arguments = {}

    def _add(self, module: nn.Module, weights: Tensor, visible: Tensor) -> None:
        name = self.names.get(module)
        if name is not None:
            distances = distance_from_even(weights, visible).transpose(1, 2)
            keep = counted(distances, self.arguments.get(self.masks[name]))
            rows = distances.flatten(0, 1)[keep]
            self.sums[name] += torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])

    def take(self) -> dict[str, Tensor]:
        """Return the sums of all processes together since the last call."""
        return take_sums(self.sums)

    def remove(self) -> None:
        """Take the hook off."""
        self.handle.remove()


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], see: See) -> Any:
    token = _see.set(see)
    try:
        with torch.no_grad(), running_beside(), training_flags_kept(model), attention_implementation(model, NAME):
            return model.eval()(*args, **kwargs)
    finally:
        _see.reset(token)


def _refuse_other_attention(model: PreTrainedModel, modules: set[nn.Module]) -> None:
    """Raise ModelError where attention does not go through the interface, or does more than softmax."""
    seen: set[nn.Module] = set()
    inputs = dummy_inputs(model)
    with torch.no_grad(), training_flags_kept(model):
        own = model.eval()(**inputs)[0]
    stand_in = _run(model, (), inputs, lambda module, *_: seen.add(module))[0]
    difference = float((own.float() - stand_in.float()).abs().max() / own.float().abs().max().clamp_min(1e-6))
    if not modules <= seen or not difference < math.sqrt(torch.finfo(own.dtype).eps):
        raise ModelError(
            f"criterion='entropy' computes softmax(query x key) itself, and {type(model).__name__} attends in another "
            "way. Use criterion='taylor' or 'activation'."
        )
