"""What a calibrated method needs before and while it walks through a model, and how it says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hfcompress.calibration.experts import ColdExperts
from hfcompress.calibration.observe import InputHessian, InputSquares, Observed, Statistic
from hfcompress.calibration.running import Batch
from hfcompress.calibration.turn_pass import Turn
from hfcompress.calibration.turns import KnownSites, Turns
from hfcompress.calibration.walk import LayerVisit, walk_layers
from hfcompress.errors import DataError, ModelError


def calibration_list(method: str, calibration: Iterable[Mapping[str, Any]] | None) -> list[Batch]:
    """Return the calibration batches as a list.

    method: what asks for them, for messages.  Raises DataError when they are missing, empty, or not mappings of
    tensors.
    """
    if calibration is None:
        raise DataError(
            f"{method} needs calibration=batches: a list of dicts of tensors, as model(**batch) takes them."
        )
    batches = list(calibration)
    if not batches:
        raise DataError(f"calibration has 0 batches; {method} needs some text or images to see what the layers see.")
    for index, batch in enumerate(batches):
        values = batch.values() if isinstance(batch, Mapping) else ()
        tensors = [value for value in values if isinstance(value, Tensor)]
        if not tensors:
            raise DataError(f"calibration batch {index} is no dict of tensors but {type(batch).__name__}.")
        if any(tensor.dim() and len(tensor) == 0 for tensor in tensors):
            raise DataError(f"calibration batch {index} has 0 rows.")
    return batches


def observe_layers(
    model: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    observe: Callable[[LayerVisit, Sequence[str]], list[Observed]],
) -> Iterator[tuple[LayerVisit, list[Observed]]]:
    """Walk through a model and yield every layer with what the linear layers ``names`` inside it see.

    observe: ``LayerVisit.input_hessians`` or another of its methods.  The next layer's inputs come from this one as it
    is by then.  Raises ModelError when one of the linear layers sees no token, or NaN or infinite inputs.
    """
    wanted = list(names)
    warned = False
    for visit in walk_layers(model, batches):
        inside = _inside(visit, wanted)
        found = observe(visit, inside) if inside else []
        _check_all_seen(visit, inside, found)
        warned = warned or _warn_about_few_tokens(visit, found)
        yield visit, found
        # A large layer's Hessians go before the next layer's come.
        found.clear()


def compress_layers(
    model: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    statistic: Statistic[Observed],
    compress: Callable[[LayerVisit, Observed], None],
) -> Iterator[LayerVisit]:
    """Walk through a model and have its linear layers ``names`` compressed; yield every layer after that.

    compress: gets the statistic of what some linear layers of a layer see in common, and changes or replaces them;
    see ``LayerVisit.compress_``.
    Raises ModelError as ``observe_layers`` does.
    """
    wanted = list(names)
    warned, experts = False, ColdExperts()
    for visit in walk_layers(model, batches):
        inside = _inside(visit, wanted)
        done: list[Observed] = []

        def one(found: Observed, visit: LayerVisit = visit, done: list[Observed] = done) -> None:
            compress(visit, found)
            done.append(found)

        if inside:
            visit.compress_(inside, statistic, one)
        _check_all_seen(visit, inside, done)
        warned = warned or _warn_about_few_tokens(visit, done)
        experts.count(visit.name, visit.layer, inside, done)
        yield visit
    experts.warn()


def _inside(visit: LayerVisit, names: Iterable[str]) -> list[str]:
    """Return the names of a layer's own linear layers, relative to it."""
    prefix = f"{visit.name}."
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def compress_in_turn(
    model: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    compress: Callable[[LayerVisit, Turn], None],
    finish: Callable[[LayerVisit, Sequence[Tensor]], None] | None = None,
) -> Iterator[LayerVisit]:
    """Walk through a model and have its linear layers ``names`` compressed in the order in which they run.

    compress: gets every turn, whose linear layers it replaces.  finish: gets every layer with compressed ones once all
    are, and its output in the dense model for each batch that reaches it.  Yields every layer after that. The dense
    model, whose hidden states are kept beside, has a decoder see its encoder as it is by then. Raises ModelError as
    ``observe_layers`` does.
    """
    wanted = list(names)
    warned, experts = False, ColdExperts()
    hidden: list[Tensor] = []
    known: KnownSites = {}
    for visit in walk_layers(model, batches):
        inside = _inside(visit, wanted)
        if visit.index == 0:
            hidden = [states.clone() for states in visit.hidden_states]
        done: list[InputHessian] = []

        def one(turn: Turn, visit: LayerVisit = visit, done: list[InputHessian] = done) -> None:
            compress(visit, turn)
            done.append(turn.found)

        if hidden:
            hidden = _take_turns(Turns(visit, inside, hidden, known), one, stay=finish is not None)
            if finish is not None and inside:
                finish(visit, hidden)
        warned = warned or _warn_about_few_tokens(visit, done)
        _check_all_seen(visit, inside, done)
        experts.count(visit.name, visit.layer, inside, done)
        yield visit
    experts.warn()


def _take_turns(turns: Turns, compress: Callable[[Turn], None], stay: bool) -> list[Tensor]:
    """Have a layer's linear layers compressed in turn; return its output in the dense model, for each batch.

    What else the turns hold, the states inside the layer, is gone with this call: it is the most of all memory.
    """
    turns.take_(compress, stay)
    return turns.outputs


def _check_all_seen(visit: LayerVisit, names: Iterable[str], found: Iterable[InputHessian | InputSquares]) -> None:
    seen = {name for one in found if one.tokens or (isinstance(one, InputHessian) and one.lent) for name in one.names}
    missing = [f"{visit.name}.{name}" for name in names if name not in seen]
    if missing:
        raise ModelError(
            f"No calibration token reaches {', '.join(missing)}. Add inputs that do (another modality, labels for a "
            "decoder, more text for experts), or exclude these layers."
        )


def _warn_about_few_tokens(visit: LayerVisit, found: Iterable[InputHessian | InputSquares]) -> bool:
    short = [one for one in found if isinstance(one, InputHessian) and one.tokens + one.lent < len(one.hessian)]
    for one in short[:1]:
        warnings.warn(
            f"{one.tokens} calibration tokens are fewer than the {len(one.hessian)} input columns of "
            f"{visit.name}.{one.names[0]}, so its Hessian is singular and leans on damping; use more data.",
            stacklevel=5,
        )
    return bool(short)


def warn_about_damping(names: Iterable[str], asked: float, used: float) -> None:
    """Say so when a Hessian needed more damping than was asked for."""
    if used > asked:
        warnings.warn(
            f"The Hessian of {', '.join(names)} could not be factored with damping {asked:g} and was damped by "
            f"{used:g} of its mean diagonal; its layers lose more than others. Use more or more varied data.",
            stacklevel=5,
        )
