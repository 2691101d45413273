"""The DistillationTrainer of encoder-decoders whose evaluations read what the student writes by itself."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hfcompress.distillation.config import DistillationConfig
from hfcompress.distillation.trainer import DistillationTrainer


@dataclass
class Seq2SeqDistillationConfig(DistillationConfig, Seq2SeqTrainingArguments):
    """DistillationConfig with what Seq2SeqTrainingArguments adds: ``predict_with_generate`` and how to generate."""


class Seq2SeqDistillationTrainer(DistillationTrainer, Seq2SeqTrainer):
    """A DistillationTrainer that evaluates as Seq2SeqTrainer does.

    With ``predict_with_generate=True`` the student writes its answers to evaluations and predictions, and
    ``compute_metrics`` gets those tokens: ROUGE, BLEU and word error rates.  ``evaluate`` and ``predict`` take
    ``max_length``, ``num_beams`` and other options of ``generate``.  ``eval_loss`` stays the task loss with the right
    target so far before the student's eyes.  Training, and all arguments, are DistillationTrainer's.
    """

    args: Seq2SeqDistillationConfig
