"""Write the data of recipes/sst2_minilm*.yaml: SST-2, of which whole sentences are held out.

    python recipes/sst2_minilm.py [FILE]

FILE is SST-2's training split as GLUE ships it, tab separated with the columns ``sentence`` and ``label``; without one
the split is downloaded (``stanfordnlp/sst2`` on the Hub).  Into runs/sst2-data go train.tsv and validation.tsv.

The split's rows are phrases of one treebank: parts of a row that is held out at random are training rows, with labels
that agree.  Here 2,000 whole sentences are held out, and no training row occurs inside one of them.
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import load_dataset

Row = tuple[str, int]
HELD_OUT = 2000
FOLDER = Path("runs/sst2-data")


def phrases_in(sentence: str) -> Iterator[str]:
    """Yield every run of words of a sentence."""
    words = sentence.split()
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            yield " ".join(words[start:end])


def split(rows: list[Row], held_out: int = HELD_OUT) -> tuple[list[Row], list[Row]]:
    """Hold out whole sentences (rows that are part of no other row) and drop training rows that occur in them."""
    texts = {text for text, _ in rows}
    inner = {part for text in texts for part in phrases_in(text) if part != text and part in texts}
    whole = sorted((text, label) for text, label in set(rows) if text not in inner and len(text.split()) > 5)
    chosen = random.Random(0).sample(whole, held_out)
    seen = {part for text, _ in chosen for part in phrases_in(text)}
    return [row for row in rows if row[0] not in seen], chosen


def read(file: Path) -> list[Row]:
    """Return the sentences and labels of a tab separated file."""
    with file.open(encoding="utf-8", newline="") as handle:
        lines = csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(" ".join(line["sentence"].split()), int(line["label"])) for line in lines]


def download() -> list[Row]:
    """Return the same rows from the Hub."""
    found = load_dataset("stanfordnlp/sst2", split="train")
    return [(" ".join(row["sentence"].split()), row["label"]) for row in found]


def write(file: Path, rows: Iterable[Row]) -> None:
    """Write rows as the recipes read them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{text}\t{label}\n" for text, label in rows]
    file.write_text("sentence\tlabel\n" + "".join(lines), encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Write both parts and say how large they are."""
    train, held_out = split(read(Path(arguments[0])) if arguments else download())
    # Sorted, so that the same rows in another order are the same file.
    write(FOLDER / "train.tsv", sorted(set(train)))
    write(FOLDER / "validation.tsv", held_out)
    print(f"{FOLDER}: {len(set(train))} phrases to train on, {len(held_out)} sentences held out")


if __name__ == "__main__":
    main(sys.argv[1:])
