"""Checks the ``training`` options of a stage: the fields of transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import InitErrorDetails, to_jsonable_python

from hfcompress.recipe.faults import fault_error, members, misplaced_booleans, near, not_one_of, translate

_ONE_PROCESS = "a recipe trains in one process; shard a DistillationTrainer of your own with 'accelerate launch'"
REFUSED = {
    "output_dir": "is set by the recipe's output",
    "seed": "is set by the recipe's seed",
    "max_steps": "use steps of the stage",
    "num_train_epochs": "use epochs of the stage",
    "save_only_model": "would leave checkpoints that --resume cannot go on from exactly",
    "resume_from_checkpoint": "a killed run goes on with 'hfcompress run --resume'",
    "hub_token": "a token does not belong in a file; log in with 'hf auth login'",
    "parallelism_config": _ONE_PROCESS,
    "fsdp": _ONE_PROCESS,
    "fsdp_config": _ONE_PROCESS,
    "deepspeed": _ONE_PROCESS,
}


@functools.cache
def training_types() -> dict[str, Any]:
    """Return the type of every field of TrainingArguments, by name."""
    from transformers import TrainingArguments

    types = typing.get_type_hints(TrainingArguments)
    return {field.name: types[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


def choices_of(hint: Any) -> list[str] | None:
    """Return the values of a field that is an enumeration (TrainingArguments types these ``SomeEnum | str``)."""
    for one in members(hint):
        if isinstance(one, type) and issubclass(one, enum.Enum):
            return [member.value for member in one]
    return None


def _typed(name: str, value: Any) -> tuple[Any, list[InitErrorDetails]]:
    """Return the value in the type of its field, and what is wrong with it."""
    hint = training_types()[name]
    choices = choices_of(hint)
    if choices is not None:
        value = value.value if isinstance(value, enum.Enum) else value
        if value is False and "no" in choices:  # YAML 1.1 reads a bare `no` as false
            value = "no"
        if value in choices:
            return value, []
        return None, [InitErrorDetails(type=fault_error(not_one_of(value, choices)), loc=(name,), input=value)]
    faults = misplaced_booleans(hint, value)
    result = None
    if not faults:
        try:
            result = to_jsonable_python(TypeAdapter(hint).validate_python(value))
        except ValidationError as error:
            faults = translate(error, hint, value)
    return result, [
        InitErrorDetails(type=fault_error(fault.text), loc=(name, *fault.path), input=value) for fault in faults
    ]


def check_training(raw: Any) -> Any:
    """Return the options in their fields' types; refuse unknown ones and those that the recipe sets itself.

    YAML's ``2e-4`` is text to PyYAML; it becomes a number here.
    """
    if not isinstance(raw, Mapping):
        return raw
    result: dict[str, Any] = {}
    errors: list[InitErrorDetails] = []
    for name, value in raw.items():
        if name in REFUSED:
            errors.append(InitErrorDetails(type=fault_error(REFUSED[name]), loc=(name,), input=value))
        elif name not in training_types():
            hint = near(name, training_types().keys() - REFUSED.keys()) or "; see transformers.TrainingArguments"
            text = f"unknown option '{name}'{hint}"
            errors.append(InitErrorDetails(type=fault_error(text, "unknown_option"), loc=(name,), input=value))
        else:
            result[name], found = _typed(name, value)
            errors += found
    if errors:
        raise ValidationError.from_exception_data("training", errors)
    return result


Training = Annotated[dict[str, Any], BeforeValidator(check_training), WithJsonSchema({"type": "object"})]
