"""Sounds in columns of a dataset: paths, bytes, or what ``datasets.Audio`` holds; read without torchcodec."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from datasets import Audio, Dataset

from hfcompress.errors import DataError, MissingDependencyError
from hfcompress.progress import track


def undecoded(rows: Dataset, column: str) -> Dataset:
    """Return rows whose sounds stay bytes or paths: decoding them in ``datasets`` needs torchcodec."""
    if isinstance(rows.features[column], Audio):
        return rows.cast_column(column, Audio(decode=False))
    return rows


def of_length(rows: Dataset, column: str, shortest: float, longest: float) -> Dataset:
    """Return the rows whose sound lasts from ``shortest`` to ``longest`` seconds; only headers of files are read.

    Raises DataError for a sound that cannot be read, and when none is left.
    """
    durations = [
        _duration(row[column], column, index)
        for index, row in enumerate(track(rows.select_columns([column]), "looking at the sounds", len(rows)))
    ]
    fitting = [index for index, duration in enumerate(durations) if shortest <= duration <= longest]
    if not fitting:
        least, most = min(durations, default=0), max(durations, default=0)
        raise DataError(
            f"All {len(rows)} sounds in column '{column}' are longer than {longest:g} s (data.max_duration_in_seconds)"
            f" or shorter than {shortest:g} s (data.min_duration_in_seconds); they have {least:.1f} to {most:.1f} s."
        )
    return rows if len(fitting) == len(rows) else rows.select(fitting)


def read_sound(value: Any, column: str, index: int, rate: int) -> np.ndarray:
    """Return one channel of samples, (samples,) float32, at ``rate`` samples a second.

    Several channels are averaged; another rate is converted (soxr, high quality).  Raises DataError, naming the row.
    """
    soundfile = _soundfile()
    content, described = _content(value, column, index)
    try:
        samples, own = soundfile.read(content, dtype="float32", always_2d=True)
    except (RuntimeError, OSError, TypeError) as error:
        raise DataError(f"{described} cannot be read: {error}. Remove or replace it.") from error
    mono = samples.mean(axis=1)
    if own == rate:
        return mono
    try:
        import soxr
    except ImportError as error:
        raise MissingDependencyError(
            f"{described} has {own} samples a second and the model takes {rate}. To convert: pip install "
            "'hfcompress[audio]'"
        ) from error
    return np.asarray(soxr.resample(mono, own, rate), dtype=np.float32)


def _duration(value: Any, column: str, index: int) -> float:
    soundfile = _soundfile()
    content, described = _content(value, column, index)
    try:
        return float(soundfile.info(content).duration)
    except (RuntimeError, OSError, TypeError) as error:
        raise DataError(f"{described} cannot be read: {error}. Remove or replace it.") from error


def _content(value: Any, column: str, index: int) -> tuple[Any, str]:
    """Return a path or an open file, and what to call it in messages."""
    content = value if not isinstance(value, dict) else value.get("bytes") or value.get("path")
    name = content if isinstance(content, str) else value.get("path") if isinstance(value, dict) else None
    described = f"The sound in row {index} of column '{column}'{f' ({name})' if name else ''}"
    if not isinstance(content, (str, bytes)) or not content:
        raise DataError(f"{described} is {type(value).__name__}, not a path or the bytes of a sound file.")
    return (content if isinstance(content, str) else io.BytesIO(content)), described


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise MissingDependencyError("Sounds need soundfile: pip install 'hfcompress[audio]'") from error
    return soundfile
