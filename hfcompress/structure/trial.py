"""Try whether ``shrink`` could remove heads and neurons, on a model that is afterwards as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.structure.cut import say_what_forward_reads_, slice_
from hfcompress.structure.inputs import dummy_inputs
from hfcompress.structure.plan import Plan, plan_heads, plan_neurons
from hfcompress.structure.resize import Edits, input_dim, weight_of
from hfcompress.structure.running import float_outputs
from hfcompress.structure.shrink import prove_equal
from hfcompress.structure.sites import AttentionSite, FfnSite


@torch.no_grad()
def refuse_unremovable(
    model: PreTrainedModel, sites: Sequence[AttentionSite | FfnSite], closed: Mapping[str, Tensor]
) -> None:
    """Raise ModelError, with the reason that ``shrink`` gives, when these heads or neurons cannot be removed.

    closed: the units to try, (units,) bool by the site's name, for every site in ``sites``.  The model runs twice on a
    small input: with zeros for these units, and without them.
    """
    attention = [site for site in sites if isinstance(site, AttentionSite)]
    ffn = [site for site in sites if isinstance(site, FfnSite)]
    plan = Plan(attention, ffn, plan_heads(attention, closed), plan_neurons(ffn, closed))
    edits = Edits()
    try:
        for site in sites:
            reader = site.output if isinstance(site, AttentionSite) else site.down
            module = model.get_submodule(reader.name)
            weight = weight_of(module)
            columns = reader.features[closed[site.name]].flatten().to(weight.device)
            edits.set_data(module, "weight", weight.index_fill(input_dim(module), columns, 0))
        inputs = dummy_inputs(model)
        expected = float_outputs(model, inputs)
        slice_(model, edits, plan)
        say_what_forward_reads_(model, edits, plan)
        prove_equal(model, inputs, expected)
    finally:
        edits.undo()
