"""Takes a language model's logits from its head itself, before anything copies them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.structure.inputs import dummy_inputs
from hfcompress.structure.running import runs_beside, watching


def run_for_logits(model: nn.Module, student: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """Return the model's output with the logits as the head gives them.

    accelerate makes float32 copies of all that a model under autocast returns: of bfloat16 logits, twice their size.
    model: the student as it is wrapped for training.
    """
    with _outputs_of_head(student, keep=False) as taken:
        output = model(**inputs)
    output["logits"] = taken[0]
    return output


def head_gives_logits(model: PreTrainedModel) -> bool:
    """Tell whether a model's logits are what its head gives, with no scale or cap after it; found by running it."""
    if model.get_output_embeddings() is None:
        return False
    with watching(model), _outputs_of_head(model, keep=True) as taken:
        output = model(**dummy_inputs(model))
    return len(taken) == 1 and output.get("logits") is taken[0]


@contextmanager
def _outputs_of_head(model: PreTrainedModel, keep: bool) -> Iterator[list[Tensor]]:
    """Give a list in which the head leaves its output when the model runs.  keep: the model goes on with it, too."""
    taken: list[Tensor] = []

    def take(module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        if runs_beside():
            return None
        taken.append(output)
        return None if keep else output[..., :0]

    handle = model.get_output_embeddings().register_forward_hook(take)
    try:
        yield taken
    finally:
        handle.remove()
