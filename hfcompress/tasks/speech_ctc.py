"""Speech recognition by CTC: a token or a blank for each frame of sound."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.evaluate import Reader
from hfcompress.evaluate.metrics import Form
from hfcompress.evaluate.readers import Found, both, refuse_nan, run
from hfcompress.outputs import Outputs
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Head, HeldOut
from hfcompress.tasks.speech import Speech


class SpeechCTC(Speech):
    """Write down what is said, frame by frame."""

    name = "speech-ctc"
    auto_class = "AutoModelForCTC"
    metrics = ("wer",)
    head_name: ClassVar[str | None] = "ForCTC"

    def check(self, config: PreTrainedConfig, processor: Any, spec: DataSpec) -> None:
        """Raise ModelError where the tokenizer's padding is not the model's blank."""
        super().check(config, processor, spec)
        blank, padding = config.pad_token_id, processor.tokenizer.pad_token_id
        if blank != padding:
            raise ModelError(
                f"The tokenizer pads with token {padding}, but the model's blank is its pad_token_id {blank}. Set "
                "both to the same."
            )

    def prepare_(self, model: PreTrainedModel, processor: Any, head: Head | None) -> None:
        """Let a row whose transcript is longer than its frames count nothing instead of an infinite loss."""
        model.config.ctc_zero_infinity = True

    def forms(self, head: Head | None) -> tuple[Form, ...]:
        """Return the forms in which ``reader`` reads answers."""
        return ("texts",)

    def reader(self, held_out: HeldOut) -> Reader:
        """Return a reader that decodes greedily."""
        return FrameReader(held_out)


class FrameReader(Reader):
    """Reads the likeliest token of each frame, repeated ones and blanks left out."""

    def __init__(self, held_out: HeldOut) -> None:
        super().__init__()
        self.tokenizer = held_out.processor.tokenizer
        self.references = list(held_out.rows[str(held_out.spec.text_column)])
        self.seen = 0

    def forms(self, kind: Outputs) -> tuple[Form, ...]:
        """Return the one form."""
        return ("texts",)

    def read(self, model: nn.Module, batch: Mapping[str, Any], kind: Outputs, wanted: Set[Form]) -> Found:
        """Decode one batch; frames of padding are blanks."""
        output, moved = run(model, batch, kind)
        logits = kind.logits(output, moved)
        refuse_nan(logits)
        tokens = logits.argmax(dim=-1).masked_fill(~kind.compared(moved), self.tokenizer.pad_token_id)
        texts = [text.strip() for text in self.tokenizer.batch_decode(tokens.tolist())]
        references = self.references[self.seen : self.seen + len(texts)]
        self.seen += len(texts)
        self.items += len(texts)
        return {"texts": both(texts, references)}
