"""Every kind of data file gives its rows as they were written."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfcompress.data import load_train_rows
from hfcompress.reading import READERS
from hfcompress.recipe import DataSpec

ROWS = {"text": ['a "good" film, not bad', "null", "tab and\nnew line"], "label": [1, 0, 1]}


def csv_file(path: Path) -> Path:
    path.write_text('text,label\n"a ""good"" film, not bad",1\nnull,0\n"tab and\nnew line",1\n', encoding="utf-8")
    return path


def tsv_file(path: Path) -> Path:
    path.write_text('text\tlabel\na "good" film, not bad\t1\nnull\t0\n"open\t1\n', encoding="utf-8")
    return path


def json_lines(path: Path) -> Path:
    rows = ['{"text": "a \\"good\\" film, not bad", "label": 1}', '{"text": "null", "label": 0}']
    path.write_text("\n".join([*rows, '{"text": "tab and\\nnew line", "label": 1}']) + "\n", encoding="utf-8")
    return path


def parquet_file(path: Path) -> Path:
    pq.write_table(pa.table(ROWS), path)
    return path


def text_file(path: Path) -> Path:
    path.write_text("first line\n\nlast line of one document\n", encoding="utf-8")
    return path


WRITERS = {
    ".csv": (csv_file, ROWS),
    ".tsv": (tsv_file, {**ROWS, "text": [*ROWS["text"][:2], '"open']}),
    ".json": (json_lines, ROWS),
    ".jsonl": (json_lines, ROWS),
    ".parquet": (parquet_file, ROWS),
    ".txt": (text_file, {"text": ["first line\n\nlast line of one document\n"]}),
    ".md": (text_file, {"text": ["first line\n\nlast line of one document\n"]}),
}


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_gives_its_rows(suffix: str, tmp_path: Path) -> None:
    write, rows = WRITERS[suffix]
    file = write(tmp_path / f"data{suffix}")
    assert load_train_rows(DataSpec(files=(str(file),))).to_dict() == rows
    twice = load_train_rows(DataSpec(files=(str(file), str(write(tmp_path / f"more{suffix}")))))
    assert twice.to_dict() == {name: [*column, *column] for name, column in rows.items()}
