"""Metrics equal what one computes by hand, or what the field's own packages compute."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, mean_squared_error

from hfcompress.errors import DataError
from hfcompress.evaluate import METRICS
from hfcompress.evaluate.metrics.tags import entities


def value(name: str, predictions: list[Any], references: list[Any]) -> float:
    found = METRICS[name]().compute(predictions=predictions, references=references)
    assert found is not None
    assert list(found) == [name]
    return float(found[name])


def test_macro_f1_is_the_plain_mean_over_classes() -> None:
    chooser = random.Random(0)
    guesses, labels = ([chooser.randrange(2) for _ in range(50)] for _ in range(2))
    assert value("macro_f1", guesses, labels) == pytest.approx(f1_score(labels, guesses, average="macro"))


def test_metrics_of_numbers_equal_scipy() -> None:
    chooser = random.Random(0)
    labels = [chooser.randrange(5) / 2 for _ in range(40)]  # with ties
    guesses = [label + chooser.gauss(0, 1) for label in labels]
    assert value("mse", guesses, labels) == pytest.approx(mean_squared_error(labels, guesses))
    assert value("pearson", guesses, labels) == pytest.approx(pearsonr(guesses, labels).statistic)
    assert value("spearman", guesses, labels) == pytest.approx(spearmanr(guesses, labels).statistic)
    assert math.isnan(value("pearson", [1.0, 1.0], [0.0, 1.0]))


def test_cosine_is_the_mean_over_rows() -> None:
    assert value("cosine", [[3.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, -2.0]]) == pytest.approx(
        (1 - math.sqrt(0.5)) / 2
    )


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("I-PER I-PER O", [("PER", 0, 1)]),  # IOB1 begins without a B
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("S-PER B-LOC I-LOC E-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 3), ("LOC", 4, 4)]),
        ("U-PER B-LOC L-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("PER PER O LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("O O", []),
    ],
)
def test_entities_of_every_way_to_tag(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert list(entities(tags.split())) == found


def test_entity_f1_counts_whole_entities() -> None:
    wanted = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "I-LOC"]]
    assert value("entity_f1", found, wanted) == pytest.approx(2 * 1 / (3 + 3))
    assert value("entity_f1", [["O"]], [["O"]]) == 1.0


def test_answers_are_compared_as_squad_does() -> None:
    found = ["The cat!", "on a mat", "", "something"]
    right = [["a cat", "dog"], ["the red mat"], [], []]
    assert value("exact_match", found, right) == pytest.approx(2 / 4)
    # "on mat" and "red mat" share one word of two each.
    assert value("answer_f1", found, right) == pytest.approx((1 + 0.5 + 1 + 0) / 4)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "police kill the gunman": of four words, three are a subsequence of the reference's four.
    assert value("rouge_l", ["police kill the gunman"], ["police killed the gunman"]) == pytest.approx(0.75)
    # Another order: the longest common subsequences are "the gunman" and "gunman"; F1 of 2 / 4 and 2 / 5.
    texts = (["the gunman kill police"], ["Police killed the gunman, then"])
    assert value("rouge_l", *texts) == pytest.approx(2 * 0.5 * 0.4 / 0.9)
    assert value("rouge_l", ["", "x"], ["a b", "x"]) == pytest.approx(0.5)


def test_word_error_rate_counts_over_the_whole_corpus() -> None:
    # One change in three words; one insertion and one deletion beside a word that is right.
    found, wanted = ["a b x", "y the end"], ["a b c", "the end now"]
    assert value("wer", found, wanted) == pytest.approx((1 + 2) / 6)
    assert value("wer", ["a b c d"], ["a"]) == 3.0
    with pytest.raises(DataError, match="references with words"):
        value("wer", ["a"], [""])


def test_the_same_text_is_the_same_to_the_letter() -> None:
    assert value("same_text", ["W AO K", "w ao k", "W AO", ""], ["W AO K", "W AO K", "W AO K", ""]) == 0.5


def test_bleu_and_chrf_are_of_the_corpus() -> None:
    wanted = ["the model is small and fast", "the film is good"]
    assert value("bleu", wanted, wanted) == pytest.approx(100)
    assert value("chrf", wanted, wanted) == pytest.approx(100)
    # Each n-gram precision of the corpus by hand: 9/10, 7/8, 5/6, 3/4, and no brevity penalty.
    found = ["the model is small and slow", "the film is good"]
    expected = 100 * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25
    assert value("bleu", found, wanted) == pytest.approx(expected)
    assert 0 < value("chrf", found, wanted) < 100
