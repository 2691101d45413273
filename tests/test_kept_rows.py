"""What is written of the benchmarks' kept rows is what their script makes of them."""

from __future__ import annotations

import importlib
import json
import math
import re
from typing import Any

import pytest

from tests.documents import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def distill_sst2(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("distill_sst2")


def test_a_sentence_counts_once_however_many_seeds_saw_it(distill_sst2: Any) -> None:
    mean, error = distill_sst2.paired(["1110", "1110"], ["1010", "0010"])
    assert mean == pytest.approx(100 * (0.5 + 1) / 4)
    assert error == pytest.approx(100 * math.sqrt((0.125**2 + 0.625**2 + 2 * 0.375**2) / 3 / 4))
    assert distill_sst2.paired(["1110"] * 2, ["1010"] * 2) == distill_sst2.paired(["1110"], ["1010"])


def test_the_table_of_smaller_students_is_of_the_kept_rows(distill_sst2: Any) -> None:
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    sentences = " ".join(text.split())
    slug = importlib.import_module("sst2").slug
    kept = {
        name: [json.loads((RESULTS / "sst2/rows" / f"{slug(name)}-{seed}.json").read_text()) for seed in range(3)]
        for pair in distill_sst2.PAIRS
        for name in pair
    }
    told = [distill_sst2._compared(*pair, kept) for pair in distill_sst2.PAIRS]
    assert len(told) == 5
    for name, against, points, error in told:
        if against == "3 layers, no teacher":
            (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
            assert line.endswith(f"| {points} ({error}) |")
        else:
            what = name.removeprefix(f"{against} and ")
            assert re.search(rf"{what} (add )?{points[1:]} (points )?\({error}\)", sentences)
