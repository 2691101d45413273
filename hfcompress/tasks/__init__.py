"""The tasks that recipes can name."""

from __future__ import annotations

from hfcompress.tasks.base import Head, HeldOut, Task, batches
from hfcompress.tasks.causal_lm import CausalLM
from hfcompress.tasks.image_classification import ImageClassification
from hfcompress.tasks.masked_lm import MaskedLM
from hfcompress.tasks.multiple_choice import MultipleChoice
from hfcompress.tasks.question_answering import QuestionAnswering
from hfcompress.tasks.sentence_embeddings import SentenceEmbeddings
from hfcompress.tasks.seq2seq_lm import Seq2SeqLM
from hfcompress.tasks.sequence_classification import SequenceClassification
from hfcompress.tasks.speech_ctc import SpeechCTC
from hfcompress.tasks.speech_seq2seq import SpeechSeq2Seq
from hfcompress.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CausalLM(),
        MaskedLM(),
        SequenceClassification(),
        TokenClassification(),
        QuestionAnswering(),
        MultipleChoice(),
        Seq2SeqLM(),
        ImageClassification(),
        SpeechSeq2Seq(),
        SpeechCTC(),
        SentenceEmbeddings(),
    )
}

__all__ = ["TASKS", "Head", "HeldOut", "Task", "batches"]
