"""Speech recognition as Whisper does it: an encoder hears, a decoder writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.errors import ModelError
from hfcompress.evaluate import Reader
from hfcompress.evaluate.metrics import Form
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Head, HeldOut
from hfcompress.tasks.seq2seq_lm import TextReader
from hfcompress.tasks.speech import Speech, SpeechCollator

START_TOKENS = 4  # of Whisper: start, language, task, no timestamps


class SpeechSeq2Seq(Speech):
    """Write down what is said, token by token."""

    name = "speech-seq2seq"
    auto_class = "AutoModelForSpeechSeq2Seq"
    metrics = ("perplexity", "wer")

    def check(self, config: PreTrainedConfig, processor: Any, spec: DataSpec) -> None:
        """Raise ModelError for more transcript tokens than the decoder takes, and a language it has not."""
        super().check(config, processor, spec)
        limit = getattr(config, "max_target_positions", None)
        if limit is not None and spec.max_target_length is not None and spec.max_target_length > limit:
            raise ModelError(
                f"data.max_target_length is {spec.max_target_length} tokens, but the model writes at most {limit}. "
                f"Use {limit} or less there."
            )
        if spec.language is not None:
            if not hasattr(processor.tokenizer, "set_prefix_tokens"):
                raise ModelError(
                    f"data.language is for multilingual Whisper; {type(processor).__name__} has no languages."
                )
            processor.tokenizer.set_prefix_tokens(language=spec.language, task="transcribe")

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return the collator; a start token that the model puts before the labels itself is taken off them."""
        tokenizer = processor.tokenizer
        # Whisper's transcripts begin with a token that is not its tokenizer's bos_token.
        start = (getattr(tokenizer, "prefix_tokens", None) or [tokenizer.bos_token_id])[0]

        def without_start(labels: Tensor) -> Tensor:
            return labels[:, 1:] if bool((labels[:, 0] == start).all()) else labels

        return SpeechCollator(processor.feature_extractor, processor.tokenizer, without_start)

    def prepare_(self, model: PreTrainedModel, processor: Any, head: Head | None) -> None:
        """Change nothing."""

    def forms(self, head: Head | None) -> tuple[Form, ...]:
        """Return the forms in which ``reader`` reads answers."""
        return "texts", "classes", "likelihood"

    def reader(self, held_out: HeldOut) -> Reader:
        """Return a reader that generates where a metric wants texts."""
        return TranscriptReader(held_out, list(held_out.rows[str(held_out.spec.text_column)]))


class TranscriptReader(TextReader):
    """Reads transcripts, for whose start the decoder needs places, too."""

    def new_tokens(self, model: Any) -> int | None:
        """Return how many tokens a transcript may have after the tokens that it starts with."""
        asked, limit = super().new_tokens(model), getattr(model.config, "max_target_positions", None)
        return asked if asked is None or limit is None else max(1, min(asked, limit - START_TOKENS))
