"""Reads the ``losses`` of a distill stage: names, each with the options of its class in ``LOSSES``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError, WithJsonSchema
from pydantic_core import InitErrorDetails

from hfcompress.distillation.losses import LOSSES, Loss
from hfcompress.recipe.faults import Fault, fault_error, not_a, not_one_of, read_options

_A_LOSS = "a loss's name, or one name with its options"


def read_losses(raw: Any) -> Any:
    """Return the losses as objects; every fault has its place."""
    if not isinstance(raw, (list, tuple)):
        return raw
    if not raw:
        raise ValueError("must not be empty; leave it out for the loss that fits the task")
    faults: list[Fault] = []
    losses = tuple(_read(one, index, faults) for index, one in enumerate(raw))
    if faults:
        raise ValidationError.from_exception_data("losses", [_details(fault) for fault in faults])
    return losses


def _read(raw: Any, index: int, faults: list[Fault]) -> Loss | None:
    if isinstance(raw, Loss):
        return raw
    named = {raw: None} if isinstance(raw, str) else raw
    if not isinstance(named, Mapping) or len(named) != 1:
        faults.append(Fault((index,), not_a(_A_LOSS, raw)))
        return None
    name, options = next(iter(named.items()))
    if name not in LOSSES:
        faults.append(Fault((index,), not_one_of(name, list(LOSSES))))
        return None
    return read_options(LOSSES[name], {} if options is None else options, (index, name), faults)


def _details(fault: Fault) -> InitErrorDetails:
    """Return a fault as an error that ``faults.translate`` turns into the same fault again."""
    kind = "fault" if fault.line_of is None else "unknown_option"
    return InitErrorDetails(type=fault_error(fault.text, kind), loc=fault.line_of or fault.path, input=None)


Losses = Annotated[
    tuple[Loss, ...] | None,
    BeforeValidator(read_losses),
    WithJsonSchema({"type": "array", "minItems": 1, "default": None}),
]
