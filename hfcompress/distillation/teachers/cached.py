"""A teacher whose answers are read from disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfcompress.distillation.losses.taps import Tap
from hfcompress.distillation.losses.targets import TopK
from hfcompress.distillation.teachers.base import Answer, Teacher
from hfcompress.distillation.teachers.cache import CacheIndex, read_index, shard_files
from hfcompress.distillation.teachers.keys import keys_of
from hfcompress.distillation.teachers.shards import Shard, Stored, joined
from hfcompress.errors import CheckpointError, DataError
from hfcompress.outputs import Batch, Outputs


class CachedTeacher(Teacher):
    """Reads what ``cache_teacher`` wrote; the teacher itself is not needed.

    Raises CheckpointError for a folder that is no cache or an empty one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index: CacheIndex = read_index(self.folder)
        self.classes = self.index.classes
        self.top_k = self.index.k
        self.shards = [Shard(file) for file in shard_files(self.folder)]
        self.places = {key: (at, row) for at, shard in enumerate(self.shards) for row, key in enumerate(shard.keys)}
        if not self.places:
            raise CheckpointError(f"{self.folder} holds no answers yet. Run cache-teacher on the training data first.")

    @property
    def columns(self) -> set[str]:
        """Return the inputs that the teacher read."""
        return set(self.index.columns)

    def answer(self, inputs: Mapping[str, Any], kind: Outputs, rows: Tensor | None, taps: Sequence[Tap]) -> Answer:
        """Look the rows up by their content.  Raises DataError for one that is not there."""
        assert rows is not None, "losses of features are refused"
        found = [self._read(key) for key in keys_of(inputs, self.columns)]
        targets: Stored
        if self.top_k:
            targets = TopK.cat([one for one in found if isinstance(one, TopK)])
        else:
            targets = joined([one for one in found if isinstance(one, Tensor)], kind.classes_in(inputs) or 0)
        count = len(targets.classes) if isinstance(targets, TopK) else len(targets)
        if count != len(rows):
            raise DataError(
                f"{self.folder} holds {count} answers to this batch, but {len(rows)} count here: it was written for "
                "other labels. Run cache-teacher on these data."
            )
        moved = targets.to(rows.device)
        return Answer(moved, torch.arange(count, device=rows.device), None, {})

    def _read(self, key: bytes) -> Stored:
        if key not in self.places:
            raise DataError(
                f"{self.folder} holds no answer to one of the examples: it was written from other data, or the "
                "examples change from epoch to epoch (random masks or crops). Run cache-teacher on these data."
            )
        shard, row = self.places[key]
        return self.shards[shard].read(row, self.index.temperature)

    def refuse_other_data(self, batches: Iterable[Batch], kind: Outputs | None = None) -> None:
        """Raise DataError unless all rows of some batches are there."""
        for batch in batches:
            for key in keys_of(batch, self.columns):
                self._read(key)
