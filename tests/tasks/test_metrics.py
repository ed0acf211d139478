import math

import numpy as np
import pytest

from mini.tasks.metrics import (
    answer_f1,
    bits_per_byte,
    classification_report,
    confusion_matrix,
    exact_match,
    matthews,
    normalize_answer,
)


def test_bits_per_byte():
    assert bits_per_byte(100 * math.log(2), 50) == pytest.approx(2.0)


def test_classification_report():
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    confusion = confusion_matrix(labels, predictions, 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    report = classification_report(confusion, ["a", "b", "c"])
    assert report["accuracy"] == pytest.approx(0.5) and report["majority"] == pytest.approx(0.5)
    assert report["classes"]["a"] == pytest.approx({"precision": 0.5, "recall": 2 / 3, "f1": 4 / 7, "n": 3})
    assert report["classes"]["b"] == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "n": 2})
    assert report["classes"]["c"] == pytest.approx({"precision": 0, "recall": 0, "f1": 0, "n": 1})
    assert report["f1"] == pytest.approx((4 / 7 + 0.5) / 3)
    assert report["weighted_f1"] == pytest.approx((3 * 4 / 7 + 2 * 0.5) / 6)
    assert report["precision"] == pytest.approx(1 / 3) and report["recall"] == pytest.approx((2 / 3 + 0.5) / 3)
    assert report["mcc"] == pytest.approx(matthews(confusion))


@pytest.mark.parametrize("seed", range(5))
def test_mcc_of_two_classes(seed):
    (tn, fp), (fn, tp) = confusion = np.random.default_rng(seed).integers(1, 50, (2, 2))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(confusion) == pytest.approx(expected)


def test_mcc_of_three_classes():
    # 8 of 10 right; actual 3, 5, 2; predicted 4, 3, 3:
    # (8 * 10 - (3 * 4 + 5 * 3 + 2 * 3)) / sqrt((100 - 9 - 25 - 4) (100 - 16 - 9 - 9)) = 47 / sqrt(62 * 66)
    assert matthews(np.array([[3, 0, 0], [1, 3, 1], [0, 0, 2]])) == pytest.approx(47 / math.sqrt(62 * 66))
    assert matthews(np.diag([3, 5, 2])) == pytest.approx(1)
    assert matthews(np.array([[0, 4], [4, 0]])) == pytest.approx(-1)


@pytest.mark.parametrize("confusion", [[[5, 0], [3, 0]], [[0, 0], [2, 6]], [[7, 0], [0, 0]], [[0, 0], [0, 0]]])
def test_mcc_is_0_where_it_is_undefined(confusion):
    assert matthews(np.array(confusion)) == 0
    assert classification_report(np.array(confusion), ["a", "b"])["mcc"] == 0


def test_answers_are_compared_as_the_official_scripts_do():
    assert normalize_answer("The  quick,\tbrown fox -- an A-team!") == "quick brown fox ateam"
    assert normalize_answer("Theatre and a an the") == "theatre and"
    assert exact_match("the Virgin Mary.", ["a statue", "Virgin  Mary"]) == 1
    assert exact_match("Virgin", ["Virgin Mary"]) == 0
    assert answer_f1("a golden statue of Mary", ["golden statue"]) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert answer_f1("golden golden", ["golden statue of Mary", "gold"]) == pytest.approx(2 * 0.5 * 0.25 / 0.75)
    assert answer_f1("silver", ["golden statue", "Silver!"]) == 1
    assert answer_f1("silver", ["gold"]) == 0


def test_no_answer_is_right_where_there_is_none():
    assert exact_match("", []) == answer_f1("", []) == 1
    assert exact_match("x", []) == answer_f1("x", []) == 0
    assert exact_match("", ["x"]) == answer_f1("", ["x"]) == 0
    assert exact_match("the", ["A"]) == answer_f1("the", ["A"]) == 1  # of both nothing is left
    assert exact_match("", ["the", "x"]) == answer_f1("", ["the", "x"]) == 0  # a gold of which nothing is left is none
