"""A fast tokenizer with fewer tokens: its JSON rewritten, loaded as a user will load it, and compared."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hfcompress.errors import ModelError
from hfcompress.progress import quiet_bars

TOKENIZER_FILE = "tokenizer.json"


def backend_of(tokenizer: Any) -> Tokenizer:
    """Return the ``tokenizers.Tokenizer`` of a fast tokenizer.  Raises ModelError when it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        inside = " Pass the processor's own .tokenizer." if hasattr(tokenizer, "tokenizer") else ""
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer (one with a tokenizers backend), so its vocabulary "
            f"cannot be rewritten.{inside or ' Convert it, for example by loading it with AutoTokenizer.'}"
        )
    return backend


def special_tokens(tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any]) -> set[str]:
    """Return the tokens that a tokenizer adds, matches whole or names.  content: its JSON."""
    found = {token["content"] for token in content["added_tokens"]} | set(tokenizer.all_special_tokens)
    for processor in _processors(content["post_processor"]):
        for template in (processor.get("special_tokens") or {}).values():
            found.update(template["tokens"])
        found.update(processor[place][0] for place in ("sep", "cls") if place in processor)
    if content["padding"] is not None:
        found.add(content["padding"]["pad_token"])
    return found


def _processors(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the post-processor, or the parts of a sequence of them."""
    if processor is None:
        return
    if processor["type"] != "Sequence":
        yield processor
        return
    for part in processor["processors"]:
        yield from _processors(part)


def rewritten(content: Mapping[str, Any], new_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the tokenizer's JSON with only the tokens of ``new_ids``, under their new ids."""
    new = copy.deepcopy(dict(content))
    model = new["model"]
    if model["type"] == "Unigram":
        unknown = None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
        model["vocab"] = [[token, score] for token, score in model["vocab"] if token in new_ids]
        model["unk_id"] = None if unknown is None else new_ids[unknown]
    else:
        model["vocab"] = {token: new_ids[token] for token in model["vocab"] if token in new_ids}
    if model["type"] == "BPE":
        skipped = len(model["continuing_subword_prefix"] or "")
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in new_ids and right in new_ids and left + right[skipped:] in new_ids
        ]
    for token in new["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    for processor in _processors(new["post_processor"]):
        for template in (processor.get("special_tokens") or {}).values():
            template["ids"] = [new_ids[token] for token in template["tokens"]]
        for place in ("sep", "cls"):
            if place in processor:
                processor[place] = [processor[place][0], new_ids[processor[place][0]]]
    if new["padding"] is not None and new["padding"]["pad_token"] in new_ids:
        new["padding"]["pad_id"] = new_ids[new["padding"]["pad_token"]]
    return new


def reloaded(
    tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any], new_ids: Mapping[str, int], samples: list[str]
) -> PreTrainedTokenizerBase:
    """Save the tokenizer with other JSON, load it with its own class and return it.

    Raises ModelError when it does not come back with the ids of ``new_ids``, or splits a sample text otherwise.
    """
    with tempfile.TemporaryDirectory() as folder, quiet_bars():
        tokenizer.save_pretrained(folder)
        Path(folder, TOKENIZER_FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        new: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    if new.get_vocab() != dict(new_ids):
        differing = sorted(set(new.get_vocab().items()) ^ set(new_ids.items()), key=lambda pair: pair[1])
        raise ModelError(
            f"{type(tokenizer).__name__} does not load a smaller vocabulary as it was saved: token "
            f"{differing[0][0]!r} would have another id, so this tokenizer cannot be pruned."
        )
    for text in samples:
        before, after = (one.convert_ids_to_tokens(one(text, verbose=False)["input_ids"]) for one in (tokenizer, new))
        if before != after:
            raise ModelError(
                f"{type(tokenizer).__name__} would split {text[:60]!r} otherwise once it is reloaded from its files, "
                "so its vocabulary was left as it is. Save it, load it again and see whether it still does the same."
            )
    return new


def take_over_(tokenizer: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer, in place, the backend and every id of another one.

    What is text or a switch (its name, padding side, language) stays as it was set; its old vocabulary files go.
    """
    own = vars(tokenizer)
    stays = {name: value for name, value in own.items() if isinstance(value, (str, bool))}
    own.update({**vars(new), **stays})
    tokenizer.init_kwargs["name_or_path"] = tokenizer.name_or_path
    for file in type(tokenizer).vocab_files_names:
        own.pop(file, None)
        tokenizer.init_kwargs.pop(file, None)
