"""Which layers matter least, measured on batches: by how little they turn the hidden states, or by the loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.errors import DataError, ModelError
from hfcompress.progress import meter, track
from hfcompress.structure.running import Batch, run_batch, watching
from hfcompress.structure.stack import LayerStack


def least_angular_block(model: nn.Module, stack: LayerStack, count: int, batches: Sequence[Batch]) -> list[int]:
    """Return the ``count`` consecutive layers that turn the hidden states least (Gromov et al., arXiv 2403.17887).

    A block and not single layers (ShortGPT's Block Influence, arXiv 2403.03853): its distance is between the two
    states that will be joined, so what its layers undo of each other counts for nothing, while scores of single
    layers don't say what two of them do together.  Of equals the first.
    """
    distances = block_distances(model, stack, count, batches)
    movable = droppable_layers(stack)
    starts = [start for start in range(len(distances)) if movable.issuperset(range(start, start + count))]
    if not starts:
        raise ModelError(f"{stack.name} has no {count} consecutive layers that are alike, so none can be dropped.")
    first = min(starts, key=lambda start: float(distances[start]))
    return list(range(first, first + count))


def block_distances(model: nn.Module, stack: LayerStack, count: int, batches: Sequence[Batch]) -> Tensor:
    """Return the angular distances, in half turns, between the input and output of every block of ``count`` layers.

    The result is (layers - count + 1,), float64; entry i is the mean over all tokens that are not padding (the paper
    takes each text's last token, which only a decoder gives a meaning) of arccos(cosine) / pi.
    """
    total = torch.zeros(len(stack) - count + 1, dtype=torch.float64)
    tokens = 0
    states: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(_hidden_of(args, kwargs))

    def keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(keep_input, with_kwargs=True) for layer in stack.layers]
    handles.append(stack.layers[-1].register_forward_hook(keep_output))
    try:
        with watching(model):
            for batch in track(batches, "measuring how much layers turn the hidden states"):
                states.clear()
                run_batch(model, batch)
                real = _real_tokens(batch, states[0], stack)
                tokens += int(real.sum())
                pairs = zip(states, states[count:])
                total += torch.stack([_angular(before[real], after[real]).sum() for before, after in pairs]).cpu()
    finally:
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise DataError("The calibration batches hold nothing but padding.")
    return total / tokens


def _angular(one: Tensor, other: Tensor) -> Tensor:
    """Return the angle between rows (tokens, hidden) in half turns; exact also where they are nearly the same."""
    one, other = (nn.functional.normalize(rows.double(), dim=-1) for rows in (one, other))
    return 2 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1)) / math.pi


def _real_tokens(batch: Batch, hidden: Tensor, stack: LayerStack) -> Tensor:
    """Return which of the stack's tokens are not padding, (batch, tokens), as far as the batch says so."""
    mask = batch.get("attention_mask")
    if "decoder" in stack.name.split(".") and "decoder_attention_mask" in batch:
        mask = batch["decoder_attention_mask"]
    elif "decoder" in stack.name.split(".") and isinstance(batch.get("labels"), Tensor):
        mask = batch["labels"] != -100
    if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
        return mask.to(hidden.device).bool()
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


def least_loss_layers(
    model: nn.Module, stack: LayerStack, count: int, batches: Sequence[Batch], greedy: bool
) -> list[int]:
    """Return the ``count`` layers whose skipping raises the loss least, each skipped alone; of equals the first.

    greedy: skip the cheapest, measure the others again with it skipped, and so on: ``count`` times the work, and
    layers that stand in for each other are not both dropped.  Raises DataError for batches without labels.
    """
    if not all("labels" in batch for batch in batches):
        raise DataError("select='loss' compares losses, so every calibration batch needs labels.")
    movable = sorted(droppable_layers(stack))
    if len(movable) < count:
        raise ModelError(f"{stack.name} has only {len(movable)} layers that are alike; {count} cannot be dropped.")
    dropped: list[int] = []
    rounds = count if greedy else 1
    with watching(model), meter("measuring the loss without each layer", _measurements(len(movable), rounds)) as shown:
        if not math.isfinite(_mean_loss(model, batches)):
            raise DataError("The loss on the calibration batches is not finite, so losses cannot be compared.")
        for _ in range(rounds):
            losses = {}
            for index in movable:
                if index not in dropped:
                    with skipping(stack.layers[one] for one in (*dropped, index)):
                        losses[index] = _mean_loss(model, batches)
                    shown.advance(note=f"layer {index}: {losses[index]:.4f}")
            cheapest = sorted(losses, key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)
            dropped += cheapest[: 1 if greedy else count]
    return sorted(dropped)


def _measurements(layers: int, rounds: int) -> int:
    return sum(layers - done for done in range(rounds))


def _mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the loss per label over all batches."""
    total, labels = 0.0, 0
    for batch in batches:
        loss = run_batch(model, batch).loss
        if loss is None:
            raise ModelError(f"{type(model).__name__} returns no loss for its labels; use another select.")
        count = int((batch["labels"] != -100).sum())
        total += float(loss) * count
        labels += count
    return total / max(1, labels)


@contextmanager
def skipping(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let the layers hand on their input hidden states, whether they return a tensor or a tuple."""
    handles = [layer.register_forward_hook(_hand_on, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_on(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    hidden = _hidden_of(args, kwargs)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def droppable_layers(stack: LayerStack) -> set[int]:
    """Return the layers with the same tensors as most: T5's first alone holds the position bias of all, and stays."""
    names = [frozenset(layer.state_dict()) for layer in stack.layers]
    usual, _ = Counter(names).most_common(1)[0]
    return {index for index, own in enumerate(names) if own == usual}
