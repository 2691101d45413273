"""Students made from a teacher: some of its layers, heads and neurons, another config, or a pretrained model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hfcompress.bundled import is_packaged, packaged_model
from hfcompress.distillation.losses.layer_map import spread
from hfcompress.errors import ModelError
from hfcompress.packed import packed_layers
from hfcompress.structure import (
    DropLayers,
    Part,
    drop_layers,
    find_attention,
    find_ffn,
    layer_stacks,
    shrink,
    zero_heads_,
    zero_neurons_,
)
from hfcompress.structure.resize import input_dim, output_dim, weight_of

_ANY_HEAD = ("AutoModelForTextEncoding", "AutoModelForPreTraining")


def make_student(
    teacher: PreTrainedModel,
    *,
    layers: int | Sequence[int] | None = None,
    heads: int | None = None,
    neurons: int | None = None,
    config: PreTrainedConfig | None = None,
    pretrained: str | None = None,
) -> PreTrainedModel:
    """Return a smaller model for the teacher's task.  The teacher stays as it is.

    layers: how many layers of each stack to keep, evenly spaced with the last one last (1, 3, 5 for three of six; a
    language model, which is ruined without its first layer, keeps that too: 0, 2, 5), or which ones.
    heads, neurons: how many query heads of each attention and neurons of each feed-forward block to keep: those with
    the largest weights, in whole groups where heads share keys, and the same in all layers of one position bias (T5).
    The kept weights are the teacher's.
    config: a model of this config with random weights instead.  pretrained: a model id, a folder or
    ``package:<name>`` instead.  With either, the student has the teacher's kind of head and its labels.
    Raises ModelError for more than the teacher has, for what its architecture cannot express, and for parts of a
    quantized teacher.
    """
    parts = {"layers": layers, "heads": heads, "neurons": neurons}
    asked = [name for name, value in parts.items() if value is not None]
    if (bool(asked) + (config is not None) + (pretrained is not None)) != 1:
        raise ModelError("make_student takes parts of the teacher (layers, heads, neurons), or config, or pretrained.")
    if config is not None:
        return _auto_class(teacher, config).from_config(_with_labels(copy.deepcopy(config), teacher))
    if pretrained is not None:
        return _pretrained(teacher, pretrained)
    _refuse_quantized(teacher)
    student = copy.deepcopy(teacher)
    _unfreeze(student)
    if layers is not None:
        _drop(student, layers)
    _close(student, heads, neurons)
    if heads is not None or neurons is not None:
        shrink(student)
    return student


def _refuse_quantized(teacher: PreTrainedModel) -> None:
    if packed_layers(teacher) or not all(one.is_floating_point() for one in teacher.parameters()):
        raise ModelError(
            f"The {type(teacher).__name__} is quantized, and weights that are stored so cannot be trained. Make the "
            "student from the model before it was quantized; the quantized one can be its teacher."
        )


def _unfreeze(student: PreTrainedModel) -> None:
    """Have all weights trained but those that the architecture keeps fixed, such as Whisper's positions of frames."""
    with init_empty_weights():
        fresh = type(student)(copy.deepcopy(student.config))
    fixed = {name for name, one in fresh.named_parameters() if not one.requires_grad}
    for name, one in student.named_parameters():
        one.requires_grad_(name not in fixed)


def _pretrained(teacher: PreTrainedModel, name: str) -> PreTrainedModel:
    where, options = _location(name)
    try:
        config = _with_labels(transformers.AutoConfig.from_pretrained(where, **options), teacher)
        auto = _auto_class(teacher, config)
        if "gguf_file" in options:
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        student = auto.from_pretrained(where, config=config, dtype=teacher.dtype, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"Model '{name}' cannot be opened as a student: {error}") from error
    if "gguf_file" in options and hasattr(student.config, "quantization_config"):
        del student.config.quantization_config  # it names the file, which the dense student no longer needs
    return student


def _location(name: str) -> tuple[str, dict[str, Any]]:
    """Return what from_pretrained takes for a model id, a folder or a package, and its options."""
    if not is_packaged(name):
        return name, {}
    packaged = packaged_model(name)
    return str(packaged.path()), {} if packaged.gguf_file is None else {"gguf_file": packaged.gguf_file}


def _with_labels(config: PreTrainedConfig, teacher: PreTrainedModel) -> PreTrainedConfig:
    if teacher.get_output_embeddings() is None:
        config.id2label = copy.copy(teacher.config.id2label)
        config.label2id = copy.copy(teacher.config.label2id)
        config.problem_type = getattr(teacher.config, "problem_type", None)
    return config


def _auto_class(teacher: PreTrainedModel, config: PreTrainedConfig) -> Any:
    """Return the Auto class that makes the teacher, and from this config a model with the same head."""
    named = {name: one for name, one in vars(modeling_auto).items() if name.startswith("AutoModel")}
    autos = {name: one for name, one in named.items() if getattr(one, "_model_mapping", None) is not None}
    # These hold one class for each architecture, whatever its head, so they are asked last.
    ordered = [*(one for name, one in autos.items() if name not in _ANY_HEAD), *(autos[name] for name in _ANY_HEAD)]
    makers = [one for one in ordered if type(teacher) in _made_by(one, type(teacher.config))]
    if not makers:
        raise ModelError(f"No Auto class makes a {type(teacher).__name__}; make the student by its own class.")
    for auto in makers:
        if type(config) in auto._model_mapping:
            return auto
    raise ModelError(
        f"{makers[0].__name__} makes the teacher, a {type(teacher).__name__}, but no model from a "
        f"{type(config).__name__}. Give a student of an architecture that has this head."
    )


def _made_by(auto: Any, config: type) -> tuple[type, ...]:
    """Return the classes that an Auto class makes from configs of a class."""
    found = auto._model_mapping.get(config, ())
    return found if isinstance(found, tuple) else (found,)


def _drop(student: PreTrainedModel, layers: int | Sequence[int]) -> None:
    if not isinstance(layers, int) and (not layers or min(layers) < 0 or list(layers) != sorted(set(layers))):
        raise ModelError(f"layers={list(layers)} must be one index or more, from 0 on, each once and in rising order.")
    for stack in layer_stacks(student):
        total = len(stack)
        if isinstance(layers, int) and not 1 <= layers <= total:
            raise ModelError(f"layers={layers}: {stack.name} of the teacher has {total} layers.")
        place = stack.name.split(".")[-2] if "." in stack.name else None
        if isinstance(layers, int) and student.get_output_embeddings() is not None:
            drop_layers(student, DropLayers(keep=layers, stack=place))
        else:
            kept = tuple(spread(layers, total)) if isinstance(layers, int) else tuple(layers)
            drop_layers(student, DropLayers(layers=kept, stack=place))


def _close(student: PreTrainedModel, heads: int | None, neurons: int | None) -> None:
    """Set the weights of what is not kept to zero, which ``shrink`` then removes."""
    if heads is not None:
        _close_heads(student, heads)
    if neurons is not None:
        _close_neurons(student, neurons)


def _close_heads(student: PreTrainedModel, heads: int) -> None:
    """Close the weakest heads: of attentions that share a position bias the same, weakest in all of them together."""
    sites = find_attention(student)
    scores: dict[str, Tensor] = {}  # of groups, by the attention whose heads they share
    for site in sites:
        if heads % site.group_size or not 1 <= heads <= site.heads:
            raise ModelError(
                f"heads={heads}: {site.name} has {site.heads} heads in groups of {site.group_size}, which stay whole."
            )
        norms = _norms(student, site.output, rows=False) * _norms(student, site.query, rows=True)
        found = norms.reshape(site.key_value_heads, site.group_size).sum(1)
        owner = site.same_heads_as or site.name
        scores[owner] = scores.get(owner, torch.zeros_like(found)) + found
    for site in sites:
        order = scores[site.same_heads_as or site.name].argsort()
        groups = order[: site.key_value_heads - heads // site.group_size].tolist()
        closed = [group * site.group_size + one for group in groups for one in range(site.group_size)]
        zero_heads_(student, site, closed)


def _close_neurons(student: PreTrainedModel, neurons: int) -> None:
    """Close the neurons with the smallest weights."""
    for block in find_ffn(student):
        if not 1 <= neurons <= block.width:
            raise ModelError(f"neurons={neurons}: {block.name} has {block.width} neurons.")
        importance = _norms(student, block.down, rows=False)
        for up in block.ups:
            importance = importance * _norms(student, up, rows=True)
        zero_neurons_(student, block, importance.argsort()[: block.width - neurons].tolist())


@torch.no_grad()
def _norms(model: nn.Module, part: Part, rows: bool) -> Tensor:
    """Return the norm of each unit's weights, (units,), on the CPU."""
    module = model.get_submodule(part.name)
    dimension = output_dim(module) if rows else input_dim(module)
    squares = weight_of(module).detach().float().square().sum(1 - dimension).cpu()
    return squares[part.features].sum(1).sqrt()
