"""Linear layers that are parts of a parameter on disk: they are brought in together, for it is read as a whole."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import ModelHook
from torch import Tensor, nn

from hfcompress.structure.experts import ExpertMatrix
from hfcompress.structure.offload import stored_tensor


class WholeOnDisk:
    """A module on disk whose parameters are parts' weights.  parts: how many are not brought in yet."""

    def __init__(self, module: nn.Module, parts: int) -> None:
        self.module, self.parts = module, parts
        self.read: tuple[str, Tensor] | None = None

    def take(self, part: ExpertMatrix) -> Tensor:
        """Return a part for good; the parameters are read for the first one, and given up after the last."""
        hook: Any = self.module._hf_hook
        if self.module.get_parameter(part.parameter).is_meta:
            hook.pre_forward(self.module)
        values = part.of(self.module)
        self.parts -= 1
        if not self.parts:
            self.module._parameters.clear()
        return values

    def look(self, part: ExpertMatrix) -> Tensor:
        """Return a part as it is stored; one parameter is kept, as its parts are looked at one after another."""
        if self.read is None or self.read[0] != part.parameter:
            self.read = part.parameter, stored_tensor(self.module, part.parameter)
        return part.within(self.read[1])


class PartOnDisk(ModelHook):
    """What accelerate's hooks are for other modules on disk: brings the weight of a linear layer in."""

    def __init__(self, whole: WholeOnDisk, part: ExpertMatrix) -> None:
        self.whole, self.part = whole, part

    @property
    def weights_map(self) -> dict[str, Tensor]:
        """Return the weight as it is stored."""
        return {"weight": self.whole.look(self.part)}

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring the weight in."""
        needs_gradient = module.get_parameter("weight").requires_grad
        module.weight = nn.Parameter(self.whole.take(self.part), needs_gradient)
        return args, kwargs
