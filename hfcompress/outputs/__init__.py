"""Kinds of model outputs, and which kind a model has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto import modeling_auto as auto

from hfcompress.outputs.base import (
    ABSENT,
    IGNORED,
    Batch,
    Outputs,
    label_names,
    refuse_other_places,
    require_columns,
    row_count,
)
from hfcompress.outputs.binary import Binary
from hfcompress.outputs.classes import Choices, Classes, NextTokens
from hfcompress.outputs.frames import Frames
from hfcompress.outputs.numbers import Numbers
from hfcompress.outputs.spans import Spans
from hfcompress.outputs.vectors import Pooling, Vectors

__all__ = [
    "ABSENT",
    "IGNORED",
    "Batch",
    "Binary",
    "Choices",
    "Classes",
    "Frames",
    "NextTokens",
    "Numbers",
    "Outputs",
    "Pooling",
    "Spans",
    "Vectors",
    "label_names",
    "outputs_of",
    "refuse_other_places",
    "require_columns",
    "row_count",
]

# The Auto classes' tables of model names, and how classes from elsewhere with the same head are called.
_CLASSIFIERS = (
    (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ("ForSequenceClassification", "ForImageClassification"),
)
_SPANS = (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,), ("ForQuestionAnswering",)
_CHOICES = (auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,), ("ForMultipleChoice",)
_FRAMES = (auto.MODEL_FOR_CTC_MAPPING_NAMES,), ("ForCTC",)
_NEXT_TOKENS = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,), ("ForCausalLM", "LMHeadModel")


def outputs_of(model: nn.Module) -> Outputs:
    """Return the kind of a model's outputs, from its class and its config.

    A class of Transformers or one derived from it is known by its Auto class, others by how they end, and what
    remains chooses classes.  A classifier's config says by ``problem_type`` what its labels are.
    """
    config: Any = getattr(model, "config", None)
    names = [one.__name__ for one in type(model).__mro__]
    if _among(names, *_CLASSIFIERS):
        problem = config.problem_type or ("regression" if config.num_labels == 1 else None)
        return {"regression": Numbers(), "multi_label_classification": Binary()}.get(problem or "", Classes())
    if _among(names, *_SPANS):
        return Spans()
    if _among(names, *_CHOICES):
        return Choices()
    if _among(names, *_FRAMES):
        return Frames(
            getattr(config, "ctc_loss_reduction", "mean"), getattr(model, "_get_feat_extract_output_lengths", None)
        )
    if _among(names, *_NEXT_TOKENS) or _shifts_labels(model):
        return NextTokens()
    return Vectors() if _among(names[:1], (auto.MODEL_MAPPING_NAMES,), ()) else Classes()


def _shifts_labels(model: nn.Module) -> bool:
    """Tell whether a model that is called otherwise predicts the next token, as those that see pictures and write."""
    loss = LOSS_MAPPING.get(str(getattr(model, "loss_type", None)))
    return loss is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)


def _among(names: Iterable[str], mappings: Iterable[Any], endings: tuple[str, ...]) -> bool:
    """Tell whether a class of one of these names is in a mapping of an Auto class, or ends as its classes do."""
    known: set[str] = set()
    for mapping in mappings:
        for named in mapping.values():
            known.update([named] if isinstance(named, str) else named)
    return any(name in known or name.endswith(endings) for name in names)
