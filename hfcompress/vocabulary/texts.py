"""Which tokens occur in a stream of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import jinja2
from tokenizers import Tokenizer

from hfcompress.errors import DataError
from hfcompress.progress import meter

TEXTS_AT_ONCE = 512


def token_ids_in(texts: Iterable[str], backend: Tokenizer, samples: list[str], sample_count: int = 64) -> set[int]:
    """Return the ids of all tokens that occur in the texts, special tokens included; shows progress.

    The texts are read once and not kept, except the first ``sample_count``, which are added to ``samples``.
    Raises DataError when there is no text, or something that is not a text.
    """
    if isinstance(texts, (str, bytes)):
        raise DataError("texts must be an iterable of texts, such as a list; it is one text.")
    reader = Tokenizer.from_str(backend.to_str())
    reader.encode_special_tokens = backend.encode_special_tokens
    reader.no_truncation()
    reader.no_padding()
    found: set[int] = set()
    with meter("reading texts for their tokens", len(texts) if isinstance(texts, Sized) else None) as shown:
        for several in _groups(texts):
            samples += several[: max(0, sample_count - len(samples))]
            for encoding in reader.encode_batch_fast(several):
                found.update(encoding.ids)
            shown.advance(len(several), f"{len(found)} tokens")
        if shown.done == 0:
            raise DataError("There are no texts, so no token occurs in them; give the texts that the model will see.")
    if not found:
        raise DataError(f"The {shown.done} texts are empty; give the texts that the model will see.")
    return found


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    stream = iter(texts)
    while several := list(islice(stream, TEXTS_AT_ONCE)):
        for text in several:
            if not isinstance(text, str):
                raise DataError(f"texts must hold texts only; it holds a {type(text).__name__}.")
        yield several


def chat_texts(tokenizer: Any) -> list[str]:
    """Return what the tokenizer's chat template adds around messages, with and without a system message."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    messages = [{"role": role, "content": "."} for role in ("system", "user", "assistant", "user")]
    rendered = []
    for conversation in (messages, messages[1:]):
        try:
            rendered.append(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        except (jinja2.TemplateError, TypeError, ValueError):
            continue  # how templates say that they have no place for such a message, or that there are several
    return rendered
