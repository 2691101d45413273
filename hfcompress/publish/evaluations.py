"""What of a Trainer's log is of the weights as they are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Trainer

from hfcompress.evaluated import OTHER_DATA, ROWS, WEIGHTS, digest_of_model, note_of

_NOT_QUALITY = ("_runtime", "_per_second", "_compilation_time")


@dataclass(frozen=True)
class Evaluation:
    """What a Trainer measured on the weights as they are now.

    told: when that was, or why there are no metrics.  rows: of the one data set that they are of; None of several.
    is_of_other_data: than the Trainer's ``eval_dataset``.
    """

    metrics: dict[str, float]
    told: str
    rows: int | None = None
    is_of_other_data: bool = False


def last_evaluation(trainer: Trainer) -> Evaluation:
    """Return the newest metrics of the weights as they are now; none where it is not known that they are of these."""
    history: list[dict[str, Any]] = trainer.state.log_history
    logged = [(logs, note_of(history, at)) for at, logs in enumerate(history) if _quality(logs)][::-1]
    now = digest_of_model(trainer.model)
    of_these = [(logs, note) for logs, note in logged if note.get(WEIGHTS) == now]
    if not of_these:
        return Evaluation({}, _why_none(logged))
    newest, its_note = of_these[0]
    other = OTHER_DATA in its_note
    metrics: dict[str, float] = {}
    rows = []
    for logs, note in of_these:  # several data sets are evaluated one after another
        new = _quality(logs)
        if (OTHER_DATA in note) == other and not new.keys() <= metrics.keys():
            metrics = {**new, **metrics}
            rows.append(note[ROWS])
    told = f"at step {newest['step']} of {trainer.state.max_steps}{', on data that it was given then' * other}"
    return Evaluation(metrics, told, rows[0] if len(rows) == 1 else None, other)


def _quality(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an entry in the Trainer's log, without its times."""
    return {name.removeprefix("eval_"): float(value) for name, value in logs.items()
            if name.startswith("eval_") and isinstance(value, (int, float))
            and not name.endswith(_NOT_QUALITY)}  # fmt: skip


def _why_none(logged: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    if not logged:
        return "the Trainer's log has no evaluation (`eval_...`)"
    if any(note for _, note in logged):
        return f"the weights have changed since the Trainer evaluated them, last at step {logged[0][0]['step']}"
    return (
        "of which weights the evaluations in the Trainer's log are was not recorded, as our callbacks and "
        "`hfcompress.ModelCardMixin` do"
    )
