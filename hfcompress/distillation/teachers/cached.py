"""A teacher whose answers are read from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfcompress.distillation.losses.taps import Tap
from hfcompress.distillation.losses.targets import TopK
from hfcompress.distillation.teachers.base import Answer, Teacher
from hfcompress.distillation.teachers.cache import CacheIndex, Collator, read_index, shard_files
from hfcompress.distillation.teachers.keys import keys_of, refuse_left_padding
from hfcompress.distillation.teachers.shards import Shard, Stored, joined
from hfcompress.errors import CheckpointError, DataError
from hfcompress.outputs import Batch, Outputs
from hfcompress.progress import meter

ROWS_AT_ONCE = 64  # are looked up


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
        refuse_left_padding(kind, inputs)
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

    def _find(self, key: bytes) -> tuple[int, int]:
        """Return the shard of an example and its row there."""
        if key not in self.places:
            raise DataError(
                f"{self.folder} holds no answer to one of the examples: it was written from other data, or the "
                "examples change from epoch to epoch (random masks or crops). Run cache-teacher on these data."
            )
        return self.places[key]

    def _read(self, key: bytes) -> Stored:
        shard, row = self._find(key)
        return self.shards[shard].read(row, self.index.temperature)

    def refuse_other_rows(self, rows: Any, collator: Collator) -> None:
        """Raise DataError unless there are answers to a dataset's rows.

        rows: a sequence of encoded examples.  collator: makes a batch of them, as the training does.
        Rows of tokens are all looked up; most of what that takes is to batch them.
        Images and sounds have to be read and resized first, so of their rows it is the first, the middle and the last.
        """
        total = len(rows)
        few = [collator([rows[row]]) for row in sorted({0, total // 2, total - 1})]
        for batch in few:
            self._find_all(batch)
        if any(self._reads_numbers(batch) for batch in few):
            return
        with meter("teacher answers looked up", total) as shown:
            for first in range(0, total, ROWS_AT_ONCE):
                part = range(first, min(first + ROWS_AT_ONCE, total))
                self._find_all(collator([rows[row] for row in part]))
                shown.advance_to(part.stop)

    def _find_all(self, batch: Batch) -> None:
        for key in keys_of(batch, self.columns):
            self._find(key)

    def _reads_numbers(self, batch: Batch) -> bool:
        """Tell whether the teacher reads anything but tokens."""
        inputs = [batch[name] for name in self.columns & batch.keys() if name != "labels"]
        return any(isinstance(one, Tensor) and one.is_floating_point() for one in inputs)
