"""One set of measured facts about a model: size, quality, speed and memory, and on what they were taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.errors import DataError
from hfcompress.evaluate.hits import pack_hits
from hfcompress.evaluate.latency import TOKEN, Latency, forward_latency
from hfcompress.evaluate.machine import describe_machine
from hfcompress.evaluate.memory import peak_memory_bytes, reset_peak_memory
from hfcompress.evaluate.modes import device_of, dtype_of
from hfcompress.evaluate.quality import score_model
from hfcompress.evaluate.readers import Reader
from hfcompress.evaluate.size import StoredSize, model_size
from hfcompress.evaluate.speed import DECODE_KIND, decode_seconds, forward_kind, forward_speed, greedy, rate_of
from hfcompress.progress import busy

_NAMES_IN_JSON = {"inf": "infinity", "-inf": "-infinity", "nan": "nan"}


@dataclass(frozen=True)
class Measurement:
    """What was measured on one model; None is what was not.

    bytes_on_disk: of the weight files.  metrics: name to value, infinite where a perplexity overflows.  speed_kind:
    what ``tokens_per_second`` counts, such as ``decode, batch 1``.  peak_memory_bytes: resident memory of the whole
    process while measuring.  continuation: what the model wrote after the prompt.  dtype: what the model ran in while
    it was measured; stored_dtypes: what its weight files hold.  rows, tokens: what the metrics were taken on, padding
    left out.  correct: of each metric that is a share of right answers, which are; see ``pack_hits``.
    """

    parameters: int
    nonzero: int
    metrics: dict[str, float]
    bytes_on_disk: int | None = None
    tokens_per_second: float | None = None
    speed_kind: str | None = None
    peak_memory_bytes: int | None = None
    continuation: str | None = None
    dtype: str | None = None
    stored_dtypes: tuple[str, ...] | None = None
    device: str | None = None
    machine: dict[str, Any] | None = None
    rows: int | None = None
    tokens: int | None = None
    latency: Latency | None = None
    correct: dict[str, str] | None = None

    @property
    def sparsity(self) -> float:
        """Share of the parameters that are zero."""
        return 1 - self.nonzero / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which knows no infinity and no NaN: such a metric is its name as text."""
        metrics = {
            name: value if math.isfinite(value) else _NAMES_IN_JSON[str(value)] for name, value in self.metrics.items()
        }
        stored = None if self.stored_dtypes is None else list(self.stored_dtypes)
        return {**asdict(self), "metrics": metrics, "stored_dtypes": stored}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Build from what ``to_dict`` gave; an optional field that is not there was not measured.

        Raises DataError that names missing and unknown fields, and metrics that are no numbers.
        """
        known = {field.name: field for field in fields(cls)}
        needed = {name for name, field in known.items() if field.default is MISSING}
        missing, unknown = sorted(needed - set(values)), sorted(set(values) - set(known))
        if missing or unknown:
            faults = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(
                unknown
            )
            raise DataError(f"A measurement {' and '.join(faults)}.")
        metrics = {name: _number(name, value) for name, value in values["metrics"].items()}
        stored = values.get("stored_dtypes")
        stored = None if stored is None else tuple(stored)
        latency = None if values.get("latency") is None else Latency(**values["latency"])
        correct = values.get("correct")
        if isinstance(correct, str):  # of the one metric that was kept at first
            kept = next((name for name in ("accuracy", "same_text") if name in metrics), None)
            correct = {kept: correct} if kept else None
        return cls(**{**values, "metrics": metrics, "stored_dtypes": stored, "latency": latency, "correct": correct})


def _number(name: str, value: Any) -> float:
    """Read a metric from JSON: a number, or the name of one that JSON cannot write."""
    if value in _NAMES_IN_JSON.values():
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"Metric '{name}' is {value!r}, not a number or one of {', '.join(_NAMES_IN_JSON.values())}.")
    return float(value)


class _Counted:
    """Batches that pass through and are counted; the first one is kept to time a forward pass on."""

    def __init__(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self.batches = batches
        self.total = len(batches) if isinstance(batches, Sized) else None
        self.first: Mapping[str, Tensor] | None = None
        self.rows = self.tokens = 0

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for batch in self.batches:
            self.first = batch if self.first is None else self.first
            self.rows += len(next(iter(batch.values()), ()))
            if "input_ids" in batch:
                self.tokens += int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
            yield batch


def _speed(
    model: nn.Module, first: Mapping[str, Tensor] | None, prompt_ids: Tensor | None, new_tokens: int
) -> tuple[float | None, str | None, Latency | None]:
    """Time decoding where there is a prompt, else a forward pass; its rate is in tokens, so images have none."""
    if prompt_ids is not None:
        seconds = decode_seconds(model, prompt_ids, new_tokens)
        every = [one for run in seconds for one in run]
        return rate_of(seconds), DECODE_KIND, Latency.of(TOKEN, 1, prompt_ids.shape[-1], every)
    if first is None:
        return None, None, None
    latency = forward_latency(model, first)
    if "input_ids" not in first:
        return None, None, latency
    return forward_speed(model, first), forward_kind(first), latency


def measure(
    model: nn.Module,
    *,
    batches: Iterable[Mapping[str, Tensor]],
    metrics: Sequence[str],
    tokenizer: Any = None,
    prompt: str | None = None,
    new_tokens: int = 48,
    stored: StoredSize | None = None,
    description: str = "measure",
    reader: Reader | None = None,
) -> Measurement:
    """Measure a model's size, quality, speed and memory.

    batches: dicts of tensors with labels (see ``evaluate_model``).  prompt: with ``tokenizer``, what a generating
    model continues by ``new_tokens`` tokens, which are timed and kept; others are timed on the first batch.
    reader: see ``score_model``.  stored: what ``inspect_checkpoint`` counted in the model's folder; None counts the
    tensors in memory, and then the size on disk is not measured. The memory peak starts at the call where the system
    allows (Linux), else at the process's start. Raises what ``evaluate_model`` raises.
    """
    reset_peak_memory()
    counted = _Counted(batches)
    scores = score_model(model, counted, metrics, description, counted.total, reader)
    with busy(f"{description}: timing"):
        prompt_ids, continuation = None, None
        can_generate = getattr(model, "can_generate", None)
        if prompt and tokenizer is not None and can_generate is not None and can_generate():
            prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            continuation = tokenizer.decode(greedy(model, prompt_ids, new_tokens), skip_special_tokens=True)
        speed, kind, latency = _speed(model, counted.first, prompt_ids, new_tokens)
    peak = peak_memory_bytes()
    size = stored if stored is not None else model_size(model)
    return Measurement(
        parameters=size.parameters,
        nonzero=size.nonzero,
        bytes_on_disk=size.bytes_on_disk,
        metrics=scores.values,
        correct={name: pack_hits(hits) for name, hits in scores.hits.items()} or None,
        tokens_per_second=speed,
        speed_kind=kind,
        latency=latency,
        peak_memory_bytes=peak,
        continuation=continuation,
        dtype=str(dtype_of(model)).removeprefix("torch."),
        stored_dtypes=size.dtypes,
        device=str(device_of(model)),
        machine=describe_machine(),
        rows=counted.rows,
        tokens=counted.tokens,
    )
