"""Distillation losses: each a frozen options class and a pure function, in one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hfcompress.distillation.losses.base import LogitLoss, Loss
from hfcompress.distillation.losses.embeddings import Embeddings
from hfcompress.distillation.losses.features import FeatureLoss
from hfcompress.distillation.losses.feed_forward import FeedForward
from hfcompress.distillation.losses.forward_kl import ForwardKL
from hfcompress.distillation.losses.hidden_states import HiddenStates
from hfcompress.distillation.losses.jensen_shannon import JensenShannon
from hfcompress.distillation.losses.logit_cosine import LogitCosine
from hfcompress.distillation.losses.logit_mse import LogitMSE
from hfcompress.distillation.losses.relations import Relations
from hfcompress.distillation.losses.reverse_kl import ReverseKL
from hfcompress.distillation.losses.sentence_embedding import SentenceEmbedding
from hfcompress.distillation.losses.top_k_kl import TopKKL
from hfcompress.distillation.losses.universal_logit import UniversalLogit
from hfcompress.errors import HFCompressError, look_up

LOSSES: dict[str, type[Loss]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "top_k_kl": TopKKL,
    "logit_mse": LogitMSE,
    "logit_cosine": LogitCosine,
    "universal_logit": UniversalLogit,
    "hidden_states": HiddenStates,
    "relations": Relations,
    "feed_forward": FeedForward,
    "embeddings": Embeddings,
    "sentence_embedding": SentenceEmbedding,
}

__all__ = ["LOSSES", "FeatureLoss", "LogitLoss", "Loss", "name_of", "named", "read_losses", "to_plain"]


def name_of(loss: Loss) -> str:
    """Return a loss's name in recipes and logs."""
    return next(name for name, kind in LOSSES.items() if type(loss) is kind)


def named(losses: Sequence[Loss]) -> dict[str, Loss]:
    """Return the losses by name; the second of a kind is ``hidden_states-2``."""
    names = [name_of(loss) for loss in losses]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return {name if count == 1 else f"{name}-{count}": loss for name, count, loss in zip(names, counts, losses)}


def to_plain(losses: Sequence[Loss]) -> list[dict[str, dict[str, Any]]]:
    """Return the losses as a recipe writes them."""
    return [{name_of(loss): dataclasses.asdict(loss)} for loss in losses]


def read_losses(given: Sequence[Loss | str | Mapping[str, Any]]) -> tuple[Loss, ...]:
    """Return losses from objects, names, or a recipe's ``{name: options}``.

    Raises HFCompressError for an unknown name or option, and where there is none.
    """
    if isinstance(given, (str, Mapping, Loss)) or not given:
        raise HFCompressError(f"losses={given!r} must be a list of one or more losses.")
    return tuple(_read(one) for one in given)


def _read(given: Loss | str | Mapping[str, Any]) -> Loss:
    if isinstance(given, Loss):
        return given
    pairs = [(given, None)] if isinstance(given, str) else list(given.items()) if isinstance(given, Mapping) else []
    if len(pairs) != 1:
        raise HFCompressError(f"A loss is a name with its options, such as {{'forward_kl': {{}}}}, not {given!r}.")
    name, options = pairs[0]
    kind = look_up(LOSSES, name, "loss")
    try:
        loss: Loss = TypeAdapter(kind).validate_python(options or {})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise HFCompressError(f"Loss {name} has faults: {faults}.") from error
    return loss
