"""Vocabulary pruning: keep the tokens that a set of texts needs, in the model and in its tokenizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfcompress.errors import ModelError
from hfcompress.vocabulary.needed import needed_tokens
from hfcompress.vocabulary.rewrite import backend_of, reloaded, rewritten, special_tokens, take_over_
from hfcompress.vocabulary.texts import chat_texts, token_ids_in
from hfcompress.vocabulary.token_ids import configs_of, named_ids, nested, refuse_several_vocabularies, remap_
from hfcompress.vocabulary.weights import VocabularyPlan, apply_, embedding_rows, first_movable_id, plan_vocabulary

MOST_PADDING = 0.1  # share of embedding rows without a token; what is published has at most 0.03


@dataclass(frozen=True)
class PrunedVocabulary:
    """What ``prune_vocabulary`` did.

    old_ids: (kept,), the id that each of today's ids had before.  rows_before: of the token embedding.
    parameters_before, parameters_after: of the whole model, tied ones counted once.
    """

    old_ids: Tensor
    rows_before: int
    parameters_before: int
    parameters_after: int

    @property
    def rows_after(self) -> int:
        """Return the number of rows of the token embedding now."""
        return len(self.old_ids)

    @property
    def summary(self) -> str:
        """Say in a line what was done."""
        removed = self.parameters_before - self.parameters_after
        return f"{self.rows_after:,} of {self.rows_before:,} tokens kept, {removed:,} parameters removed"


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    keep_extra: Iterable[str | int] = (),
) -> PrunedVocabulary:
    """Keep the tokens that occur in the texts; drop the others from the model and the tokenizer, both in place.

    Also kept: special and added tokens, those that the configs name, what the chat template adds, the characters or
    bytes that other texts fall back on (see ``needed_tokens``), and ``keep_extra``: tokens as the vocabulary spells
    them, or ids.  The texts are then split into the same tokens as before, and the logits of the kept tokens are the
    same; other texts may be split into more tokens.  Tokens keep their order, and rows beyond the tokenizer's
    vocabulary go.  Model and tokenizer, once saved, reload with plain ``from_pretrained``; processors that hold the
    tokenizer must be made anew.  A perplexity per token compares only texts that are split alike.  The idea: Abdaoui
    et al., arXiv 2010.05609.

    texts: read once, as a stream.  Raises, before anything changed: DataError without texts; ModelError for a
    tokenizer without a fast backend or of a word-level vocabulary, a tokenizer of another model, a model with several
    vocabularies or with vocabulary-sized weights of an unknown kind.
    """
    backend = backend_of(tokenizer)
    rows = embedding_rows(model)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    _refuse_unlike(model, tokenizer, vocabulary, rows)
    extra = _extra_tokens(keep_extra, vocabulary)

    content = json.loads(backend.to_str())
    samples = chat_texts(tokenizer)
    occurring = token_ids_in(samples, backend, []) if samples else set()
    occurring |= token_ids_in(texts, backend, samples, sample_count=len(samples) + 64)
    token_of = {index: token for token, index in vocabulary.items()}
    named = {index for config in configs_of(model) for index in named_ids(config) if 0 <= index < rows}
    ids = {*occurring, *named, *range(first_movable_id(model))}
    tokens = {token_of[index] for index in ids if index in token_of} | special_tokens(tokenizer, content) | extra
    tokens = needed_tokens(content["model"], tokens & vocabulary.keys()) & vocabulary.keys()
    kept = sorted({vocabulary[token] for token in tokens} | {index for index in ids if index < rows})

    size = model.num_parameters()
    old_ids = torch.tensor(kept)
    if len(kept) < rows:
        new_ids = {old: new for new, old in enumerate(kept)}
        plan = _plan(model, new_ids, rows)
        ids_of = {token: new_ids[vocabulary[token]] for token in tokens}
        smaller = reloaded(tokenizer, rewritten(content, ids_of), ids_of, samples)
        apply_(model, plan, old_ids)
        for config in configs_of(model):
            remap_(config, new_ids, rows)
        take_over_(tokenizer, smaller)
    return PrunedVocabulary(old_ids, rows, size, model.num_parameters())


def refuse_unprunable(tokenizer: PreTrainedTokenizerBase, keep_extra: Iterable[str | int] = ()) -> None:
    """Raise ModelError for a tokenizer that ``prune_vocabulary`` cannot rewrite, and for unknown tokens to keep."""
    backend = backend_of(tokenizer)
    needed_tokens(json.loads(backend.to_str())["model"], set())
    _extra_tokens(keep_extra, backend.get_vocab(with_added_tokens=True))


def _plan(model: PreTrainedModel, new_ids: Mapping[int, int], rows: int) -> VocabularyPlan:
    config = copy.deepcopy(model.config)
    for part in list(nested(config)):
        remap_(part, new_ids, rows)
    return plan_vocabulary(model, config)


def _refuse_unlike(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int], rows: int
) -> None:
    """Raise ModelError when the config, the embedding and the tokenizer don't speak of one vocabulary."""
    refuse_several_vocabularies(model.config, rows)
    highest = max(vocabulary.values())
    if highest >= rows:
        raise ModelError(
            f"{type(tokenizer).__name__} has token ids up to {highest}, but the embedding of {type(model).__name__} "
            f"has {rows} rows. Give the tokenizer of this model, or call model.resize_token_embeddings first."
        )
    if highest + 1 < (1 - MOST_PADDING) * rows:
        raise ModelError(
            f"{type(tokenizer).__name__} has {highest + 1} tokens, but the embedding of {type(model).__name__} has "
            f"{rows} rows: too many for padding, so this may be another model's tokenizer. If it is the right one, "
            f"call model.resize_token_embeddings({highest + 1}) first."
        )


def _extra_tokens(keep_extra: Iterable[str | int], vocabulary: Mapping[str, int]) -> set[str]:
    token_of = {index: token for token, index in vocabulary.items()}
    extra = [keep_extra] if isinstance(keep_extra, str) else list(keep_extra)
    unknown = [one for one in extra if one not in vocabulary and one not in token_of]
    if unknown:
        raise ModelError(
            f"keep_extra: the tokenizer has no token {unknown[0]!r}; give tokens as its vocabulary spells them."
        )
    return {one if isinstance(one, str) else token_of[one] for one in extra}
