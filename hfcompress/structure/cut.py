"""Slice a model to a plan: weights, the sizes that its modules hold, and its config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.structure.config import Resized, say_heads_, say_widths_
from hfcompress.structure.plan import Kept, Plan
from hfcompress.structure.resize import Edits, all_features, keep_features_, refuse_uncuttable
from hfcompress.structure.sites import AttentionSite, FfnSite, Part


def cut_(model: PreTrainedModel, edits: Edits, plan: Plan) -> dict[str, int]:
    """Slice the weights, set the sizes that modules hold, and say the new sizes in the config."""
    slice_(model, edits, plan)
    said = _say_in_config(model, edits, plan)
    return said | say_what_forward_reads_(model, edits, plan)


def slice_(model: PreTrainedModel, edits: Edits, plan: Plan) -> None:
    """Slice the weights, and set the sizes that modules hold."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def mark(masks: dict[str, Tensor], part: Part, units: Iterable[int], is_output: bool) -> None:
        mask = masks.setdefault(part.name, all_features(model.get_submodule(part.name), is_output))
        gone = sorted(set(range(len(part))) - set(units))
        mask[part.features[gone].flatten()] = False

    for site in plan.attention:
        kept = plan.heads[site.name]
        for part in (site.query, *site.extra):
            mark(outputs, part, kept.units, True)
        for part in (site.key, site.value):
            mark(outputs, part, kept.key_value_heads, True)
        mark(inputs, site.output, kept.units, False)
    for block in plan.ffn:
        for part in block.ups:
            mark(outputs, part, plan.neurons[block.name].units, True)
        mark(inputs, block.down, plan.neurons[block.name].units, False)
    cut = [(name, mask, True) for name, mask in outputs.items()] + [
        (name, mask, False) for name, mask in inputs.items()
    ]
    cut = [(name, mask, is_output) for name, mask, is_output in cut if not bool(mask.all())]
    refuse_uncuttable(model, [name for name, _, _ in cut])
    for name, mask, is_output in cut:
        keep_features_(edits, model.get_submodule(name), mask.nonzero().flatten(), is_output)
    for site in plan.attention:
        _set_counts(edits, model.get_submodule(site.name), site, plan.heads[site.name])
    for block in plan.ffn:
        _set_width(edits, model, block, len(plan.neurons[block.name].units))


def _set_counts(edits: Edits, module: nn.Module, site: AttentionSite, kept: Kept) -> None:
    """Set the head counts and widths that an attention module holds as integers, by value and by what they count."""
    heads, kv_heads = len(kept.units), len(kept.key_value_heads)
    for name, value in list(vars(module).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        is_width = any(part in name for part in ("inner", "all_head", "split", "q_size", "kv_size"))
        if "groups" in name and value == site.group_size:
            edits.set(module, name, heads // kv_heads if kv_heads else 1)
        elif is_width and "kv" in name and value == site.key_value_heads * site.head_dim:
            edits.set(module, name, kv_heads * site.head_dim)
        elif is_width and value == site.heads * site.head_dim:
            edits.set(module, name, heads * site.head_dim)
        elif "head" in name and ("key_value" in name or "kv" in name) and value == site.key_value_heads:
            edits.set(module, name, kv_heads)
        elif "head" in name and "dim" not in name and "size" not in name and value == site.heads:
            edits.set(module, name, heads)


def _set_width(edits: Edits, model: nn.Module, block: FfnSite, width: int) -> None:
    """Set the width that the module around a feed-forward block holds as an integer."""
    module = model.get_submodule(block.name.rpartition(".")[0])
    for name, value in list(vars(module).items()):
        if type(value) is int and value == block.width and any(part in name for part in ("inter", "inner", "ffn")):
            edits.set(module, name, width)


def _say_in_config(model: PreTrainedModel, edits: Edits, plan: Plan) -> dict[str, int]:
    blocks = [
        Resized(f"{block.name}.weight", (block.width,), (len(plan.neurons[block.name].units),)) for block in plan.ffn
    ]
    sites = []
    for site in plan.attention:
        kept = plan.heads[site.name]
        new = len(kept.units), len(kept.key_value_heads)
        sites.append(Resized(f"{site.output.name}.weight", (site.heads, site.key_value_heads), new))
    head_dim = max((site.head_dim for site in plan.attention), default=0)
    return say_widths_(model, edits, blocks) | say_heads_(model, edits, sites, head_dim)


def say_what_forward_reads_(model: PreTrainedModel, edits: Edits, plan: Plan) -> dict[str, int]:
    """Write head counts that the forward itself reads from the config, even where other sizes stay unsaid."""
    said: dict[str, int] = {}
    for site in plan.attention:
        kept = plan.heads[site.name]
        for key in site.config_counts:
            config: Any = model.get_submodule(site.name).config
            count = len(kept.key_value_heads) if "key_value" in key or "kv" in key else len(kept.units)
            if getattr(config, key) != count:
                said |= {"head_dim": site.head_dim, key: count}
                edits.set(config, "head_dim", site.head_dim)
                edits.set(config, key, count)
    return said
