"""A class for each word: names, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, ClassVar

from datasets import Dataset
from torch import nn
from transformers import DataCollatorForTokenClassification, PreTrainedConfig

from hfcompress.errors import DataError
from hfcompress.evaluate import Reader
from hfcompress.evaluate.metrics import Form
from hfcompress.evaluate.readers import Found, both
from hfcompress.outputs import IGNORED, Outputs
from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Head, HeldOut, Task, mapped, refuse_slow_tokenizer
from hfcompress.tasks.labels import label_names, numbered, refuse_single


class TokenClassification(Task):
    """Tag each word; a word's first token bears its tag, the others none unless ``label_all_tokens``."""

    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    metrics = ("entity_f1", "accuracy")
    head_name: ClassVar[str | None] = "ForTokenClassification"

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the columns of words and of tags."""
        return [str(spec.text_column), str(spec.label_column)]

    def check(self, config: PreTrainedConfig, processor: Any, spec: DataSpec) -> None:
        """Raise ModelError for a tokenizer that cannot say which word a token belongs to."""
        refuse_slow_tokenizer(processor, self.name)

    def head(self, rows: Dataset, spec: DataSpec) -> Head:
        """Return the tags' names.  Raises DataError for columns that are no lists of the same length."""
        words, tags = str(spec.text_column), str(spec.label_column)
        for index, (one, other) in enumerate(zip(rows[words], rows[tags])):
            if not isinstance(one, list) or not isinstance(other, list):
                raise DataError(
                    f"Columns '{words}' and '{tags}' must hold lists of words and of tags, but row {index} holds "
                    f"{type(one).__name__} and {type(other).__name__}."
                )
            if len(one) != len(other):
                raise DataError(f"Row {index} has {len(one)} words in '{words}' and {len(other)} tags in '{tags}'.")
        names = label_names(rows, tags)
        refuse_single(names)
        return Head(tuple(names))

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> Dataset:
        """Tokenize the words and give each word's tag to its first token, or to all of them."""
        assert labels is not None
        numbers = numbered(rows, str(spec.label_column), labels)
        inside = _inside(labels)
        rows = rows.add_column("hfcompress_tags", numbers)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = _tokenize(batch, processor, spec)
            tags = [
                _of_tokens(encoded.word_ids(index), row, inside if spec.label_all_tokens else None)
                for index, row in enumerate(batch["hfcompress_tags"])
            ]
            return {**encoded, "labels": tags}

        return mapped(rows, tokenize)

    def unlabelled(self, rows: Dataset, processor: Any, spec: DataSpec) -> Dataset:
        """Tokenize the words."""
        return mapped(rows, lambda batch: dict(_tokenize(batch, processor, spec)))

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return the collator that pads tokens, and tags by -100."""
        return DataCollatorForTokenClassification(processor)

    def forms(self, head: Head | None) -> tuple[Form, ...]:
        """Return the forms in which ``reader`` reads answers."""
        return "tags", "classes", "likelihood"

    def reader(self, held_out: HeldOut) -> Reader:
        """Return a reader that puts tags together by row."""
        assert held_out.labels is not None
        return TagReader(held_out.labels)


class TagReader(Reader):
    """Reads each row's tags by name, beside plain classes."""

    def __init__(self, labels: list[str]) -> None:
        super().__init__()
        self.labels = labels

    def forms(self, kind: Outputs) -> tuple[Form, ...]:
        """Return tags beside what classes can be read as."""
        return ("tags", *super().forms(kind))

    def read(self, model: nn.Module, batch: Mapping[str, Any], kind: Outputs, wanted: Set[Form]) -> Found:
        """Read the classes, and from them the tags of each row."""
        found = super().read(model, batch, kind, wanted | {"classes"})
        counts = (batch["labels"] != IGNORED).sum(dim=1).tolist()
        columns = {name: _in_rows([self.labels[one] for one in v], counts) for name, v in found["classes"].items()}
        found["tags"] = both(columns["predictions"], columns["references"])
        return found


def _tokenize(batch: dict[str, list[Any]], processor: Any, spec: DataSpec) -> Any:
    words = batch[str(spec.text_column)]
    return processor(words, truncation=True, max_length=spec.max_length, is_split_into_words=True)


def _of_tokens(words: list[int | None], tags: list[int], inside: list[int] | None) -> list[int]:
    """Return the tag of each token.  words: the word of each token, None for special ones.

    inside: what the later tokens of a word get in place of its tag; None is no tag.
    """
    found, before = [], None
    for word in words:
        if word is None:
            found.append(IGNORED)
        elif word != before:
            found.append(tags[word])
        else:
            found.append(IGNORED if inside is None else inside[tags[word]])
        before = word
    return found


def _inside(labels: list[str]) -> list[int]:
    """Return for each tag the one that goes on with it: I-PER for B-PER, where there is one."""
    numbers = {name: index for index, name in enumerate(labels)}
    return [numbers.get(f"I-{name[2:]}", index) if name[:2] == "B-" else index for index, name in enumerate(labels)]


def _in_rows(values: list[str], counts: list[int]) -> list[list[str]]:
    rows, first = [], 0
    for count in counts:
        rows.append(values[first : first + count])
        first += count
    return rows
