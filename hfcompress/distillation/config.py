"""The arguments of a distillation run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainingArguments

from hfcompress.distillation.losses import Loss, read_losses, to_plain
from hfcompress.distillation.on_policy import OnPolicy, read_on_policy
from hfcompress.errors import HFCompressError

DEFAULT_TEMPERATURE = 2.0


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments with the distillation's own options.

    The loss is ``alpha * KD + (1 - alpha) * task loss``.  KD is the sum of ``losses``, each times its weight; without
    any it is the forward KL at ``temperature``; for regression the mean squared error, for embeddings that and the
    cosine.  A loss is an object, a name, or ``{name: options}`` as recipes write it.  On a command line ``losses`` and
    ``on_policy`` are JSON, as other options of TrainingArguments are.
    With ``on_policy`` a causal language model writes part of the texts itself; the loss of those steps is
    ``alpha * KD`` alone.
    """

    temperature: float | None = field(
        default=None, metadata={"help": "Softens both distributions; above 0; 2 unless given."}
    )
    alpha: float = field(default=0.5, metadata={"help": "Weight of the distillation term, from 0 to 1."})
    losses: Sequence[Loss | str | Mapping[str, Any]] | str | None = field(
        default=None, metadata={"help": "What the distillation term is the sum of."}
    )
    on_policy: OnPolicy | str | Mapping[str, Any] | None = field(
        default=None, metadata={"help": "How much of the texts the student writes itself, and how."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        if self.losses is not None:
            self.losses = read_losses(_plain("losses", self.losses))
        if self.on_policy is not None:
            self.on_policy = read_on_policy(_plain("on_policy", self.on_policy))

    def check(self) -> None:
        """Raise HFCompressError for options out of their range; a search sets them after the config was made."""
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise HFCompressError(f"temperature={self.temperature} must be above 0 and finite.")
        if not 0 <= self.alpha <= 1:
            raise HFCompressError(f"alpha={self.alpha} must lie between 0 and 1.")
        if self.losses is not None and self.temperature is not None:
            raise HFCompressError(
                f"temperature={self.temperature} is an option of the losses that have one: give it to them."
            )

    @property
    def chosen(self) -> tuple[Loss, ...]:
        """Return the losses as objects; none where the default is meant."""
        return () if self.losses is None else read_losses(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain values, as loggers take them."""
        plain = super().to_dict()
        if self.losses is not None:
            plain["losses"] = to_plain(self.chosen)
        if isinstance(self.on_policy, OnPolicy):
            plain["on_policy"] = asdict(self.on_policy)
        return plain


def _plain(name: str, given: Any) -> Any:
    """Return an option, read from JSON where it is a text.  Raises HFCompressError for a text that is none."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise HFCompressError(f"{name}={given!r} is no JSON: {error}.") from error
