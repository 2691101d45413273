"""Where two tokenizers have read the same part of a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

NOWHERE = -1
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def aligned(student: Sequence[int], teacher: Sequence[int]) -> list[int]:
    """Return, for each student token, the teacher token that ends at the same character, or NOWHERE.

    student, teacher: the character after each token, NOWHERE for a token that ends inside of one or is no text.
    Of several tokens with one end the last is meant.
    """
    places = {end: place for place, end in enumerate(teacher) if end != NOWHERE}
    last = {end: place for place, end in enumerate(student) if end != NOWHERE}
    return [places.get(end, NOWHERE) if last.get(end) == place else NOWHERE for place, end in enumerate(student)]


class Spans:
    """Says where a tokenizer's tokens end in a text.

    tokenizer: of Transformers; ``encode`` needs a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.core = _untrimmed(tokenizer.backend_tokenizer) if tokenizer.is_fast else None

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, without special ones around it, and the character after each."""
        assert self.core is not None
        found = self.core.encode(text, add_special_tokens=False)
        ends = [end for _, end in found.offsets]
        for place, (start, _) in enumerate(found.offsets[1:]):
            if start < ends[place]:
                ends[place] = NOWHERE  # inside of a character
        return list(found.ids), ends

    def decode(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Return the text of some tokens, of which none is special, and the character after each."""
        text = self._text(ids)
        if self.core is not None:
            again, ends = self.encode(text)
            if again == list(ids):
                return text, ends
        return text, self.ends_by_decoding(ids, text)

    def ends_by_decoding(self, ids: Sequence[int], text: str) -> list[int]:
        """Return the character after each token: of tokens that the tokenizer would not choose for ``text``.

        Each token is decoded behind those before it that make whole characters, as it may look otherwise alone.
        All are NOWHERE where the pieces do not make the text.
        """
        ends: list[int] = []
        pieces, start, read = "", 0, 0
        for count in range(1, len(ids) + 1):
            before, now = self._text(ids[start:read]), self._text(ids[start:count])
            if now.endswith(_BROKEN) or not now.startswith(before):
                ends.append(NOWHERE)
                continue
            pieces += now[len(before) :]
            ends.append(len(pieces))
            start, read = read, count
        return ends if text.startswith(pieces) else [NOWHERE] * len(ids)

    def _text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens as it is: nothing is left out or cleaned up."""
        decode: Any = self.tokenizer.decode
        return str(decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _untrimmed(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer whose offsets count the spaces of a token, without padding or truncation."""
    plain = json.loads(tokenizer.to_str())
    copy = Tokenizer.from_str(json.dumps({**plain, "post_processor": _with_spaces(plain["post_processor"])}))
    copy.no_padding()
    copy.no_truncation()
    return copy


def _with_spaces(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: False if key == "trim_offsets" else _with_spaces(value) for key, value in plain.items()}
    return [_with_spaces(one) for one in plain] if isinstance(plain, list) else plain
