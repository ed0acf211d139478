"""Quality as numbers. All rates lie between 0 and 1; classification is measured from its confusion matrix."""

import math
import re
import string
from collections import Counter

import numpy as np


def bits_per_byte(loss_sum: float, n_bytes: int) -> float:
    """Summed cross-entropy in nats over the bytes of the predicted text: does not depend on the tokenizer."""
    return loss_sum / math.log(2) / n_bytes


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """(n_classes, n_classes) counts: row = true class, column = predicted class."""
    return np.bincount(labels * n_classes + predictions, minlength=n_classes**2).reshape(n_classes, n_classes)


def classification_report(confusion: np.ndarray, names: list[str]) -> dict:
    """Figures of a classifier: over all texts, and for each class.

    f1, precision and recall are the plain means of those of the classes (macro); weighted_f1 counts each class as
    often as it occurs. majority: the accuracy of always guessing the most frequent class. A class that is never
    predicted has precision 0, one that never occurs recall 0.
    """
    hits = confusion.diagonal().astype(float)
    predicted, actual = confusion.sum(axis=0), confusion.sum(axis=1)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(actual, 1)
    f1 = 2 * hits / np.maximum(predicted + actual, 1)  # = harmonic mean of precision and recall
    total = max(1, confusion.sum())
    return {
        "accuracy": float(hits.sum() / total),
        "f1": float(f1.mean()),
        "weighted_f1": float((f1 * actual).sum() / total),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "mcc": matthews(confusion),
        "majority": float(actual.max() / total),
        "classes": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
            for name, p, r, f, n in zip(names, precision, recall, f1, actual, strict=True)
        },
        "confusion": confusion.tolist(),
    }


def matthews(confusion: np.ndarray) -> float:
    """Matthews correlation of any number of classes, -1..1 (R_K of Gorodkin 2004); 0 where all is one class."""
    total = float(confusion.sum())
    predicted, actual = confusion.sum(axis=0) / max(1, total), confusion.sum(axis=1) / max(1, total)
    covariance = confusion.trace() / max(1, total) - predicted @ actual
    variances = (1 - predicted @ predicted) * (1 - actual @ actual)
    return float(covariance / math.sqrt(variances)) if variances > 0 else 0.0


# As in the official scripts evaluate-v1.1.py and evaluate-v2.0.py (Rajpurkar et al. 2016, 2018).
def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def gold_answers(golds: list[str]) -> list[str]:
    """The golds, normalised, of which something is left; [""] if there are none: no answer is the right one."""
    return [gold for gold in map(normalize_answer, golds) if gold] or [""]


def exact_match(prediction: str, golds: list[str]) -> float:
    """1 if the normalised prediction is one of the golds, else 0. Without golds, "" is right."""
    return float(normalize_answer(prediction) in gold_answers(golds))


def answer_f1(prediction: str, golds: list[str]) -> float:
    """F1 of the words that a prediction shares with a gold, the best over all golds. Without golds, "" has 1."""
    return max(words_f1(normalize_answer(prediction).split(), gold.split()) for gold in gold_answers(golds))


def words_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    shared = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * shared / (len(predicted) + len(gold))  # = harmonic mean of precision and recall
