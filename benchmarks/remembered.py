"""A teacher that answers every training row once: each of its students then learns from what is kept on disk.

A student of two or three epochs, and a table of ten students, would have the same teacher read the same rows dozens of
times; without dropout it answers them alike each time.  Logits and the layers' outputs are kept in bfloat16, row after
row, in one file that all students map into memory.
"""

from __future__ import annotations

import fcntl
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.distillation.losses import HiddenStates, Relations
from hfcompress.distillation.losses.taps import Tap, tapped
from hfcompress.distillation.teachers import Answer, LiveTeacher
from hfcompress.outputs import Outputs

Row = tuple[int, ...]
ROWS_AT_ONCE = 128


class RememberedTeacher(LiveTeacher):
    """A sentence classifier whose logits and features of known rows are read from a file, made where it is missing."""

    def __init__(self, model: PreTrainedModel, rows: Dataset, file: Path) -> None:
        super().__init__(model)
        # What HiddenStates looks at in all layers, and Relations in the last.
        (states,), (relations,) = HiddenStates().find(model), Relations().find(model)
        self.modules = list(dict.fromkeys(tap.module for place in (*states, relations[-1]) for tap in place))
        self.widths = self._widths()
        texts: list[Row] = list(dict.fromkeys(tuple(ids) for ids in rows["input_ids"]))
        ends = list(itertools.accumulate(len(text) for text in texts))
        self.first = dict(zip(texts, [0, *ends]))
        self.order = {text: place for place, text in enumerate(texts)}
        shape = ends[-1], sum(self.widths)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes one makes it, and the other waits
            if not file.is_file():
                self._write(texts, file, shape)
        self.features = torch.from_file(str(file), shared=False, size=shape[0] * shape[1], dtype=torch.bfloat16)
        self.features = self.features.view(shape)
        self.logits: Tensor = load_file(file.with_suffix(".safetensors"))["logits"]

    def _widths(self) -> list[int]:
        with torch.no_grad(), tapped(self.model, [Tap(name) for name in self.modules]) as found:
            self.model(input_ids=torch.tensor([[101, 102]]))
            return [found[tap].shape[-1] for tap in found.taps]

    @torch.no_grad()
    def _write(self, texts: list[Row], file: Path, shape: tuple[int, int]) -> None:
        """Run the model over all rows, those of like length together, and keep what it gives."""
        scratch = file.with_suffix(".part")
        features = torch.from_file(str(scratch), shared=True, size=shape[0] * shape[1], dtype=torch.bfloat16)
        features = features.view(shape)
        logits = torch.empty(len(texts), self.model.config.num_labels)
        for _, group in itertools.groupby(sorted(texts, key=len), len):
            like = list(group)
            for start in range(0, len(like), ROWS_AT_ONCE):
                part = like[start : start + ROWS_AT_ONCE]
                taps = [Tap(name) for name in self.modules]
                with torch.autocast("cpu", torch.bfloat16), tapped(self.model, taps) as found:
                    outputs = self.model(input_ids=torch.tensor(part))
                rows = torch.cat([found[tap].bfloat16() for tap in taps], -1)
                for place, text in enumerate(part):
                    features[self.first[text] : self.first[text] + len(text)] = rows[place]
                    logits[self.order[text]] = outputs.logits[place].float()
        save_file({"logits": logits}, file.with_suffix(".safetensors"))
        scratch.replace(file)

    def answer(self, inputs: Mapping[str, Any], kind: Outputs, rows: Tensor | None, taps: Sequence[Tap]) -> Answer:
        """Look the batch's rows up.  A row that is not among the training rows is a KeyError."""
        masks = inputs["attention_mask"].bool()
        texts = [tuple(ids[mask].tolist()) for ids, mask in zip(inputs["input_ids"], masks)]
        asked = dict.fromkeys(tap.module for tap in taps)
        held = {}
        for name, part in zip(self.modules, self._parts()):
            if name in asked:
                held[name] = torch.zeros(*masks.shape, part.stop - part.start, dtype=torch.bfloat16)
                for row, text in enumerate(texts):
                    first = self.first[text]
                    held[name][row, masks[row]] = self.features[first : first + len(text), part]
        found = {
            tap: held[tap.module] if tap.features is None else held[tap.module][..., tap.features] for tap in taps
        }
        logits = self.logits[[self.order[text] for text in texts]]
        return Answer(logits, rows, (len(texts),), found)

    def _parts(self) -> list[slice]:
        ends = list(itertools.accumulate(self.widths))
        return [slice(start, end) for start, end in zip([0, *ends], ends)]
