"""Quality as numbers. All rates lie between 0 and 1; classification is measured from its confusion matrix."""

import math
import re
import string
from collections import Counter

import numpy as np


def bits_per_byte(loss_sum: float, n_bytes: int) -> float:
    """Summed cross-entropy in nats over the bytes of the predicted text: does not depend on the tokenizer."""
    return loss_sum / math.log(2) / n_bytes


def with_error(name: str, values: np.ndarray) -> dict[str, float]:
    """A mean over independent examples, and its standard error."""
    error = {f"{name}_se": float(values.std(ddof=1) / math.sqrt(len(values)))} if len(values) > 1 else {}
    return {name: float(values.mean())} | error


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
    return f1(shared(predicted, gold), len(predicted), len(gold))


def shared(predicted: list, gold: list) -> int:
    """How many of the things predicted are among the gold ones, each as often as it is there."""
    return sum((Counter(predicted) & Counter(gold)).values())


def f1(hits: int, predicted: int, gold: int) -> float:
    return 2 * hits / max(1, predicted + gold)  # = harmonic mean of precision and recall


# ---------------------------------------------------------------- answers as texts
def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def longest_common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)  # of a's words so far with b's first 0, 1, .., len(b)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]


def rouge(predicted: str, gold: str) -> list[float]:
    """ROUGE-1, -2 and -L (Lin 2004) as F1, of lower-case words without stemming.

    As in Google's rouge-score, words are made of a-z and 0-9 alone: of other scripts nothing is seen.
    """
    p, g = (re.findall("[a-z0-9]+", text.lower()) for text in (predicted, gold))
    pairs = [(ngrams(p, n), ngrams(g, n)) for n in (1, 2)]
    return [f1(shared(a, b), len(a), len(b)) for a, b in pairs] + [f1(longest_common(p, g), len(p), len(g))]


def words_13a(text: str) -> list[str]:
    """Words and punctuation marks, as the script mteval-v13a.pl of NIST's translation evaluation separates them."""
    text = text.strip()
    for written, meant in (("-\n", ""), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(written, meant)
    text = re.sub(r"([!-&(-+:-@\[-`{-~/])", r" \1 ", f" {text} ")  # ASCII's marks but ' , - and .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])-", r"\1 - ", text).split()


def bleu_counts(predicted: str, gold: str) -> list[int]:
    """What BLEU adds up over a corpus: hits of 1- to 4-grams, their numbers, and the words of both texts."""
    p, g = words_13a(predicted), words_13a(gold)
    grams = [(ngrams(p, n), ngrams(g, n)) for n in (1, 2, 3, 4)]
    return [*(shared(a, b) for a, b in grams), *(len(a) for a, _ in grams), len(p), len(g)]


def bleu(counts: list[float]) -> float:
    """Papineni et al. 2002: clipped precisions' geometric mean, and a penalty where the predicted texts are short.

    Nothing is smoothed: it is 0 where no four words in a row are right (sacrebleu's smooth_method "none").
    """
    hits, totals, (predicted, gold) = counts[:4], counts[4:8], counts[8:]
    if not min(hits):
        return 0.0
    brevity = min(0.0, 1 - gold / predicted)
    return math.exp(brevity + sum(math.log(h / n) for h, n in zip(hits, totals, strict=True)) / 4)


def overlap(predicted: str, gold: str) -> list[float]:
    """Sums over texts, of which overlap_figures() makes figures: their number, their ROUGEs, their counts for BLEU."""
    return [1.0, *rouge(predicted, gold), *bleu_counts(predicted, gold)]


def overlap_figures(sums: list[float]) -> dict[str, float]:
    means = [value / sums[0] for value in sums[1:4]]
    return dict(zip(("rouge1", "rouge2", "rougeL"), means, strict=True)) | {"bleu": bleu(sums[4:])}
