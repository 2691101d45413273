"""Hand what a callback knows to the callbacks that report: TensorBoard, trackers, progress bars."""

from __future__ import annotations

import inspect

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


def handler_of(callback: TrainerCallback) -> CallbackHandler | None:
    """Return the handler that is calling this callback now, or None outside of events.

    Events get everything but the handler, and reporting callbacks come before a user's own in its list, so that what
    a callback adds to ``logs`` reaches none of them.  The handler is found as the object whose method is running.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler) and any(one is callback for one in owner.callbacks):
            return owner
        frame = frame.f_back
    return None


def peers_of(callback: TrainerCallback) -> list[TrainerCallback]:
    """Return all callbacks of this one's kind in the same Trainer, in order and with itself."""
    handler = handler_of(callback)
    found = [] if handler is None else [one for one in handler.callbacks if isinstance(one, type(callback))]
    return found or [callback]
