"""Which states nothing reads any more while a layer goes on, so that their memory can serve others.

Callers hold on to what they hand to a module until it returns, so references do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.parts import states_in


def inputs_are_spent(layer: nn.Module, networks: Sequence[str], run: Callable[[Tensor], Tensor], row: Tensor) -> bool:
    """Tell whether nothing reads a network's input once it has run, nor the layer's once the last network begins.

    Learnt by writing NaN over both: what reads them would give NaN.  networks: modules inside the layer, the last one
    to run at the end.  run: runs the layer.  row: hidden states, (1, tokens, size).
    """
    row = row.clone()

    def spoil(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states = states_in(args, kwargs)
        if isinstance(states, Tensor):
            states.fill_(torch.nan)

    def begin_last(module: nn.Module, args: tuple[Any, ...]) -> None:
        row.fill_(torch.nan)

    modules = [layer.get_submodule(name) for name in networks]
    handles = [module.register_forward_hook(spoil, with_kwargs=True) for module in modules]
    handles.append(modules[-1].register_forward_pre_hook(begin_last))
    try:
        return not bool(run(row).isnan().any())
    finally:
        for handle in handles:
            handle.remove()
