"""Which tokens must stay, so that the texts are split as before and whatever could be encoded still can be.

One function per kind of tokenizer.  Each takes the ``model`` part of a tokenizer's JSON and the tokens that occur, and
returns the tokens that are needed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from hfcompress.errors import ModelError, look_up

BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def needed_tokens(model: Mapping[str, Any], occurring: set[str]) -> set[str]:
    """Return the tokens to keep for the ones that occur, those included.

    Characters that have a token of their own stay encodable, and so do words of them.  A token with a character that
    has none (no trainer makes such tokens) is kept.  Where all 256 byte tokens are there to fall back on, they do
    both.  Raises ModelError for a kind of vocabulary that has no smaller pieces to fall back on.
    """
    find = look_up(_NEEDED_BY, str(model["type"]), "kind of tokenizer that can be pruned", ModelError)
    return occurring | find(model, occurring)


def _wordpiece(model: Mapping[str, Any], occurring: set[str]) -> set[str]:
    prefix = model["continuing_subword_prefix"]

    def pieces(token: str) -> list[str]:
        continues = token.startswith(prefix) and token != prefix
        first, *rest = list(token[len(prefix) :] if continues else token)
        return [prefix + first if continues else first, *(prefix + letter for letter in rest)]

    return _alphabet_and_unspellable(model["vocab"], pieces) | {model["unk_token"]}


def _unigram(model: Mapping[str, Any], occurring: set[str]) -> set[str]:
    scores = dict(model["vocab"])
    # The price of an unknown character hangs on the lowest score, and so may the best split of a text.
    needed = {min(scores, key=lambda token: scores[token])}
    if model["unk_id"] is not None:
        needed.add(model["vocab"][model["unk_id"]][0])
    if model["byte_fallback"] and scores.keys() >= BYTE_TOKENS:
        return needed | BYTE_TOKENS
    return needed | _alphabet_and_unspellable(scores, list)


def _alphabet_and_unspellable(vocabulary: Iterable[str], pieces: Callable[[str], list[str]]) -> set[str]:
    """Return the tokens of one piece, and those that the tokens of one piece cannot spell."""
    spelled = {token: pieces(token) for token in vocabulary if token}
    alphabet = {token for token, parts in spelled.items() if len(parts) == 1}
    return alphabet | {token for token, parts in spelled.items() if not alphabet.issuperset(parts)}


def _bpe(model: Mapping[str, Any], occurring: set[str]) -> set[str]:
    vocabulary = model["vocab"]
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    bytes_suffice = model["byte_fallback"] and vocabulary.keys() >= BYTE_TOKENS
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    needed = set(BYTE_TOKENS & vocabulary.keys()) if model["byte_fallback"] else set()
    if model["unk_token"] is not None:
        needed.add(model["unk_token"])
    if not bytes_suffice:
        needed |= {token for token in vocabulary if len(_symbols(token, prefix, suffix)) == 1}
    for token in occurring & vocabulary.keys():
        needed |= merged_parts(_symbols(token, prefix, suffix), ranks, len(prefix))
    return needed & vocabulary.keys()


def _symbols(token: str, prefix: str, suffix: str) -> list[str]:
    """Return what a byte pair encoder begins with when it builds the token."""
    continues = bool(prefix) and token.startswith(prefix)
    ends = bool(suffix) and token.endswith(suffix)
    letters = list(token[len(prefix) if continues else 0 : len(token) - len(suffix) if ends else None])
    if not letters:
        return [token]
    symbols = [(prefix if continues or place else "") + letter for place, letter in enumerate(letters)]
    symbols[-1] += suffix if ends else ""
    return symbols


def merged_parts(symbols: list[str], ranks: Mapping[tuple[str, str], int], prefix_length: int = 0) -> set[str]:
    """Return every token that byte pair encoding passes through from the symbols to one token.

    The merge of lowest rank goes first, the leftmost of equals (Sennrich et al., arXiv 1508.07909); inside a longer
    word the same merges are made, because none of them crosses a border that stays.  Empty when the merges don't lead
    to one token: such a token can only be taken as a whole word (``ignore_merges``).
    """
    passed = set(symbols)
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        place = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], len(ranks)))
        if pairs[place] not in ranks:
            return set()
        left, right = pairs[place]
        symbols = [*symbols[:place], left + right[prefix_length:], *symbols[place + 2 :]]
        passed.add(symbols[place])
    return passed


_NEEDED_BY: dict[str, Callable[[Mapping[str, Any], set[str]], set[str]]] = {
    "WordPiece": _wordpiece,
    "BPE": _bpe,
    "Unigram": _unigram,
}
