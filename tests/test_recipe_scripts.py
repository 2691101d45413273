"""The scripts that prepare what recipes begin with: held-out rows share nothing with training rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from PIL import Image

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def script(name: str) -> ModuleType:
    """Import a script by its path, without its folder."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_training_phrase_is_part_of_a_held_out_review() -> None:
    whole = [(f"film {number} is a quite good one", number % 2) for number in range(20)]
    parts = [(text.split(" is ")[0], label) for text, label in whole]
    train, held_out = script("sst2_minilm").split([*whole, *parts, ("a quite good one", 1), ("other words", 0)], 5)
    assert len(held_out) == 5
    assert set(held_out) <= set(whole)
    assert not [text for text, _ in train for other, _ in held_out if f" {text} " in f" {other} "]
    assert len(train) == 15 + 15 + 1, "what occurs in no held-out review stays; 'a quite good one' is in all of them"


def test_reviews_are_read_with_their_quotation_marks(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('sentence\tlabel\n"good  film " \t1\n', encoding="utf-8")
    assert script("sst2_minilm").read(tmp_path / "train.tsv") == [('"good film "', 1)]


def test_held_out_words_are_of_other_families() -> None:
    bart = script("bart_pronunciation")
    stems = [f"{first}{second}alk" for first in "bcdfghjk" for second in "aeiou"]
    words = {f"{stem}{end}": [["B", "AO1", "K"], ["B", "AA0"]] for stem in stems for end in ("", "s", "ing")}
    pairs = bart.pairs_of({**words, "a.d.": [["EY1"]], "cat": [["K"]]})
    assert len(pairs) == len(words)
    assert set(dict(pairs).values()) == {"B AO K"}
    train, held_out = bart.split(pairs, 10)
    families = [{spelling.replace(" ", "")[:4] for spelling, _ in part} for part in (train, held_out)]
    assert len(held_out) == 10
    assert not families[0] & families[1]


def test_letters_and_phones_survive_their_tokenizer() -> None:
    bart = script("bart_pronunciation")
    tokenizer = bart.tokenizer_of([("w a l k", "W AO K")])
    ids = tokenizer(text_target="W AO K")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "W AO K"


def test_a_digit_is_a_picture_of_its_class(tmp_path: Path) -> None:
    script("vit_digits").write_images(tmp_path)
    assert len(list(tmp_path.glob("*/*.png"))) == 1797
    with Image.open(tmp_path / "0" / "0000.png") as first:
        assert first.size == (8, 8)
