"""How fast a model runs on this machine: tokens a second when decoding and in a plain forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hfcompress.errors import DataError, ModelError
from hfcompress.evaluate.modes import device_of, is_encoder_decoder, measuring, on_device

RUNS = 5
DECODE_KIND = "decode, batch 1"


class _Stopwatch(BaseStreamer):
    """Notes when ``generate`` hands over each token; the first hand-over is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> list[float]:
        """Return what each new token took but the first, which includes reading the prompt."""
        return [later - earlier for earlier, later in pairwise(self.times[1:])]


def greedy(model: nn.Module, prompt_ids: Tensor, new_tokens: int, streamer: BaseStreamer | None = None) -> Tensor:
    """Generate exactly ``new_tokens`` tokens greedily, with the key/value cache whatever the config says.

    prompt_ids: (1, length) or (length,).  Returns (new_tokens,). Raises ModelError for a model that cannot generate.
    """
    generate = getattr(model, "generate", None)
    if generate is None or not model.can_generate():  # type: ignore[operator]
        raise ModelError(f"{type(model).__name__} cannot generate, so its decoding speed cannot be measured.")
    prompt_ids = prompt_ids.reshape(1, -1).to(device_of(model))
    own = getattr(model, "generation_config", None) or GenerationConfig()
    end = own.eos_token_id[0] if isinstance(own.eos_token_id, list) else own.eos_token_id
    plain = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        # Trainer switches the cache off for gradient checkpointing, and saves it so.
        use_cache=True,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else end if end is not None else 0,
        decoder_start_token_id=own.decoder_start_token_id,
    )
    with measuring(model):
        tokens = generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            generation_config=plain,
            streamer=streamer,
        )
    return tokens[0, 1:] if is_encoder_decoder(model) else tokens[0, prompt_ids.shape[1] :]


def decode_seconds(model: nn.Module, prompt_ids: Tensor, new_tokens: int = 48, runs: int = RUNS) -> list[list[float]]:
    """Return what each token of greedy decoding at batch 1 took, for each of ``runs`` after a warm-up.

    prompt_ids: (1, length) or (length,).  new_tokens: at least 2; the first one, which includes reading the prompt,
    is not counted. Raises ModelError for a model that cannot generate, DataError for fewer tokens.
    """
    if new_tokens < 2:
        raise DataError(f"Decoding speed needs new_tokens of 2 or more, not {new_tokens}.")
    greedy(model, prompt_ids, new_tokens)
    seconds = []
    for _ in range(runs):
        watch = _Stopwatch()
        greedy(model, prompt_ids, new_tokens, watch)
        seconds.append(watch.seconds())
    return seconds


def rate_of(seconds: Sequence[Sequence[float]]) -> float:
    """Return the tokens a second of the median run."""
    return statistics.median(len(run) / sum(run) for run in seconds)


def decode_speed(model: nn.Module, prompt_ids: Tensor, new_tokens: int = 48, runs: int = RUNS) -> float:
    """Return the tokens a second of greedy decoding at batch 1; see ``decode_seconds``."""
    return rate_of(decode_seconds(model, prompt_ids, new_tokens, runs))


def forward_kind(batch: Mapping[str, Tensor]) -> str:
    """Say what ``forward_speed`` measures on this batch: ``forward, batch 32 x 64 tokens``."""
    return f"forward, batch {' x '.join(map(str, _input_ids(batch).shape))} tokens"


def forward_speed(model: nn.Module, batch: Mapping[str, Tensor], runs: int = RUNS) -> float:
    """Return the tokens a second of forward passes over one batch: the median of ``runs`` after a warm-up.

    batch: tensors with ``input_ids`` (rows, length), maybe with choices between; padding counts, as it takes the same
    time.  Raises DataError for a batch without tokens.
    """
    return _input_ids(batch).numel() / statistics.median(forward_seconds(model, batch, runs, 1))


def forward_seconds(model: nn.Module, batch: Mapping[str, Tensor], runs: int, warm_ups: int) -> list[float]:
    """Return what each of ``runs`` forward passes took.  Labels are left out where the model can do without."""
    labels = () if is_encoder_decoder(model) else ("labels", "start_positions", "end_positions")
    kept = {name: tensor for name, tensor in batch.items() if name not in labels}
    moved, device = on_device(model, kept), device_of(model)
    seconds = []
    with measuring(model):
        for _ in range(warm_ups + runs):
            _wait_for(device)
            started = time.perf_counter()
            model(**moved)
            _wait_for(device)
            seconds.append(time.perf_counter() - started)
    return seconds[warm_ups:]


def _input_ids(batch: Mapping[str, Tensor]) -> Tensor:
    if "input_ids" not in batch:
        raise DataError(f"Speed in tokens needs 'input_ids'; the batch has {', '.join(sorted(batch)) or 'nothing'}.")
    return batch["input_ids"]


def _wait_for(device: torch.device) -> None:
    """Wait until an accelerator has done what was queued; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
