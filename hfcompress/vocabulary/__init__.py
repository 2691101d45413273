"""Vocabulary pruning: a smaller embedding, head and tokenizer for the texts that a model is used on."""

from __future__ import annotations

from hfcompress.vocabulary.prune import PrunedVocabulary, prune_vocabulary, refuse_unprunable

__all__ = ["PrunedVocabulary", "prune_vocabulary", "refuse_unprunable"]
