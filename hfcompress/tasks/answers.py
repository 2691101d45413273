"""Reads the answer that a model extracts from a context."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor, nn

from hfcompress.evaluate import Reader
from hfcompress.evaluate.metrics import Form
from hfcompress.evaluate.readers import Found, both, refuse_nan, run
from hfcompress.outputs import Outputs
from hfcompress.tasks.base import HeldOut
from hfcompress.tasks.windows import Window, cut_into_windows

CANDIDATES = 20  # starts and ends that are looked at, the likeliest ones (n_best_size in Transformers' example)


class AnswerReader(Reader):
    """Finds, over all windows of a question, the likeliest span; with ``version_2_with_negative`` maybe none."""

    def __init__(self, held_out: HeldOut) -> None:
        super().__init__()
        self.spec = held_out.spec
        columns = held_out.rows[:]
        self.contexts, self.answers = columns[str(self.spec.context_column)], columns[str(self.spec.answer_column)]
        self.windows = cut_into_windows(columns, held_out.processor, self.spec)
        self.seen = 0
        self.best: dict[int, tuple[float, str]] = {}
        self.none: dict[int, float] = {}

    def forms(self, kind: Outputs) -> tuple[Form, ...]:
        """Return the one form: texts against lists of right texts."""
        return ("answers",)

    def read(self, model: nn.Module, batch: Mapping[str, Any], kind: Outputs, wanted: Set[Form]) -> Found:
        """Keep the best span of each window; what a question's answer is, ``finish`` knows."""
        output, moved = run(model, batch, kind)
        logits = kind.logits(output, moved).float().cpu()
        refuse_nan(logits)
        for both_ends in logits:
            self._look_at(self.windows[self.seen], both_ends)
            self.seen += 1
        self.items += len(logits)
        return {}

    def _look_at(self, window: Window, logits: Tensor) -> None:
        row, start_of, end_of = window.row, logits[0].tolist(), logits[1].tolist()
        nothing = start_of[window.first] + end_of[window.first]
        self.none[row] = min(self.none.get(row, nothing), nothing)
        context = self.contexts[row]
        limit = self.spec.max_answer_length or len(start_of)
        inside = [place for place, span in enumerate(window.offsets) if span is not None]
        starts = sorted(inside, key=lambda place: -start_of[place])[:CANDIDATES]
        ends = sorted(inside, key=lambda place: -end_of[place])[:CANDIDATES]
        pairs = [(start, end) for start in starts for end in ends if start <= end < start + limit]
        for start, end in pairs:
            score = start_of[start] + end_of[end]
            if row not in self.best or score > self.best[row][0]:
                first, last = window.offsets[start], window.offsets[end]
                assert first is not None
                assert last is not None
                self.best[row] = score, context[first[0] : last[1]]

    def finish(self) -> Found:
        """Return the answers to all questions whose windows were read."""
        found, right = [], []
        for row, nothing in self.none.items():
            score, text = self.best.get(row, (float("-inf"), ""))
            found.append("" if self.spec.version_2_with_negative and nothing > score else text)
            right.append(list(self.answers[row]["text"]))
        return {"answers": both(found, right)}
