"""Texts that the student writes itself, for on-policy distillation of causal language models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hfcompress.distillation.losses.base import FORBID, Temperature
from hfcompress.errors import DataError, HFCompressError, ModelError
from hfcompress.outputs import IGNORED
from hfcompress.structure.modes import training_flags_kept

TOKEN_COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True, config=FORBID)
class OnPolicy:
    """Let the student write part of the texts that the teacher scores (GKD, Agarwal et al., arXiv 2306.13649).

    fraction: share of the optimizer steps whose completions the student samples, GKD's lambda; the other steps take
    the data's.  max_new_tokens: of a completion, which also ends at the model's end token.
    temperature: of the sampling; no other rule shapes it, so the samples are the student's own distribution.
    prompt_tokens: how many tokens of a row are its prompt; None: those before its first label.
    GKD's beta is that of the loss: ``losses=[{"jensen_shannon": {"beta": 0.5}}]``.
    """

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: Temperature = 1.0
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None

    def is_due(self, seed: int, step: int) -> bool:
        """Tell whether a step is the student's: a draw that only the seed and the step decide."""
        return _number(seed, step) / 2**64 < self.fraction


def read_on_policy(given: OnPolicy | Mapping[str, Any]) -> OnPolicy:
    """Return the options from an object or a recipe's mapping.  Raises HFCompressError for wrong ones."""
    try:
        return TypeAdapter(OnPolicy).validate_python(given)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise HFCompressError(f"on_policy={given!r} has faults: {faults}. Give OnPolicy or its options.") from error


def _number(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


@contextmanager
def own_randomness(device: torch.device, *parts: int) -> Iterator[None]:
    """Draw random numbers that only ``parts`` decide, and leave the generators as they were.

    So a resumed run samples what the uninterrupted one does, and dropout is not moved by the sampling.
    """
    on_cpu = device.type == "cpu"
    places = [] if on_cpu else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(places, device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(_number(*parts))
        yield


def prompts_of(batch: Mapping[str, Any], prompt_tokens: int | None) -> list[Tensor | None]:
    """Return the tokens of each row's prompt; None for a row without any label, which has no completion to replace.

    Raises DataError for other columns than those of tokens, which would not fit another text, and for a row that
    has no token before its first label.
    """
    others = [name for name in batch if name not in TOKEN_COLUMNS]
    if others or "labels" not in batch:
        raise DataError(
            f"On-policy distillation needs batches of {', '.join(TOKEN_COLUMNS)} alone, not of {', '.join(batch)}: "
            "other columns would not fit the texts that the student writes."
        )
    ids, labels = batch["input_ids"], batch["labels"]
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    prompts: list[Tensor | None] = []
    for row in range(len(ids)):
        answered = (labels[row] != IGNORED) & real[row]
        if not bool(answered.any()):
            prompts.append(None)
            continue
        before = ids[row][real[row]][:prompt_tokens] if prompt_tokens else _before(ids[row], real[row], answered)
        if len(before) == 0:
            raise DataError(
                "A row has labels from its first token on, so it has no prompt to complete. Give "
                "on_policy.prompt_tokens, or set the labels of the prompt to -100."
            )
        prompts.append(before)
    return prompts


def _before(ids: Tensor, real: Tensor, answered: Tensor) -> Tensor:
    first = int(answered.nonzero()[0])
    return ids[:first][real[:first]]


def padded_left(rows: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Return rows of tokens in one matrix, their ends in line as ``generate`` needs them, and its attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), padding, dtype=rows[0].dtype, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask


def lengths_of(completions: Tensor, ends: Sequence[int]) -> Tensor:
    """Return how many tokens of each completion count: up to its first end token, which counts.

    completions: (rows, tokens).  Returns (rows,) integers.
    """
    is_end = torch.isin(completions, torch.tensor(ends, dtype=completions.dtype, device=completions.device))
    return ((is_end.cumsum(1) - is_end.long()) == 0).sum(1)


def joined(prompts: Sequence[Tensor | None], completions: Sequence[Tensor], padding: int) -> dict[str, Tensor]:
    """Return a batch of prompts with their completions, padded on the right; only completions have labels.

    Positions then count from the first real token, whatever the model does about padding.
    completions: one for each prompt that is not None; the other rows become padding.
    """
    left = iter(completions)
    like = completions[0]
    pairs = [(like.new_empty(0), like.new_empty(0)) if one is None else (one, next(left)) for one in prompts]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.full((len(pairs), width), padding, dtype=like.dtype, device=like.device)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.cat([prompt, completion])
        labels[row, len(prompt) : end] = completion
        # A row that attends to nothing has no softmax.
        mask[row, : max(end, 1)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def write_completions(
    student: PreTrainedModel, batch: Mapping[str, Any], options: OnPolicy, device: torch.device, *seed: int
) -> dict[str, Any]:
    """Return the batch with completions that the student sampled in evaluation mode, in place of the data's.

    seed: decides the samples.  Raises DataError for rows without prompts, ModelError for prompts that leave no room.
    """
    moved = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in batch.items()}
    prompts = prompts_of(moved, options.prompt_tokens)
    real = [one for one in prompts if one is not None]
    if not real:
        return moved
    ends, padding = special_tokens(student)
    ids, mask = padded_left(real, padding)
    _refuse_too_long(student, ids.shape[1], options)
    config = GenerationConfig(
        do_sample=True, temperature=options.temperature, top_k=0, top_p=1.0, use_cache=True,
        max_new_tokens=options.max_new_tokens, eos_token_id=ends or None, pad_token_id=padding,
    )  # fmt: skip
    generate: Any = student.generate
    with _sampling(student), own_randomness(device, *seed):
        written: Tensor = generate(input_ids=ids, attention_mask=mask, generation_config=config)
    completions = written[:, ids.shape[1] :]
    lengths = lengths_of(completions, ends).tolist()
    return joined(prompts, [row[:length] for row, length in zip(completions, lengths)], padding)


def special_tokens(student: PreTrainedModel) -> tuple[list[int], int]:
    """Return the tokens that end a text, and one to pad with (which never counts, so any will do)."""
    found = student.generation_config.eos_token_id if student.generation_config is not None else None
    if found is None:
        found = student.config.get_text_config().eos_token_id
    ends = [] if found is None else [found] if isinstance(found, int) else list(found)
    padding = student.config.get_text_config().pad_token_id
    return ends, padding if isinstance(padding, int) and padding >= 0 else (ends or [0])[0]


def refuse_prompts(student: PreTrainedModel, batch: Mapping[str, Any], options: OnPolicy) -> None:
    """Raise DataError for rows without prompts, ModelError for prompts that leave no room, as the writing does."""
    real = [one for one in prompts_of(batch, options.prompt_tokens) if one is not None]
    _refuse_too_long(student, max((len(one) for one in real), default=0), options)


def _refuse_too_long(student: PreTrainedModel, prompt: int, options: OnPolicy) -> None:
    limit = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt + options.max_new_tokens > limit:
        raise ModelError(
            f"A prompt of {prompt} tokens with on_policy.max_new_tokens={options.max_new_tokens} is longer than the "
            f"{limit} tokens that the student takes. Cut the prompts, or write fewer tokens."
        )


@contextmanager
def _sampling(student: PreTrainedModel) -> Iterator[None]:
    """Turn dropout off, and with it gradient checkpointing, which allows no cache; set no defaults of the model."""
    defaults = student.generation_config
    # What a model's own defaults set (top_p, repetition_penalty) would fill in for what is not given.
    student.generation_config = GenerationConfig()
    try:
        with training_flags_kept(student):
            student.eval()
            yield
    finally:
        student.generation_config = defaults
