import math

import numpy as np
import pytest

from mini.metrics import bits_per_byte, classification_report, confusion_matrix


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
