"""Quality as numbers. All rates lie between 0 and 1; classification is measured from its confusion matrix."""

import math

import numpy as np


def bits_per_byte(loss_sum: float, n_bytes: int) -> float:
    """Summed cross-entropy in nats over the bytes of the predicted text: does not depend on the tokenizer."""
    return loss_sum / math.log(2) / n_bytes


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """(n_classes, n_classes) counts: row = true class, column = predicted class."""
    return np.bincount(labels * n_classes + predictions, minlength=n_classes**2).reshape(n_classes, n_classes)


def classification_report(confusion: np.ndarray, names: list[str]) -> dict:
    """Accuracy, macro F1, precision, recall and F1 of each class, and the accuracy of always guessing one class.

    A class that is never predicted has precision 0, one that never occurs recall 0.
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
        "majority": float(actual.max() / total),
        "classes": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
            for name, p, r, f, n in zip(names, precision, recall, f1, actual, strict=True)
        },
        "confusion": confusion.tolist(),
    }
