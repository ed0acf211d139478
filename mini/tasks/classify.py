"""Classification: tell the label of a text, or of a pair of texts."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini.flags import Checked, UserError, nearest, option
from mini.model.config import ModelConfig
from mini.model.transformer import Model
from mini.tasks.base import Batch, FileTask
from mini.tasks.inputs import masked_ids, pad_texts, text_cuts, text_ids
from mini.tasks.metrics import classification_report, confusion_matrix
from mini.tasks.order import mix, uniform
from mini.text.rows import column_texts, read_rows, rows_checksum, text_columns
from mini.text.tokenizer import Tokenizer
from mini.text.words import AUGMENTATIONS, NORMALIZATIONS, augment, normalize, parse_steps


@dataclass
class ClassifyConfig(Checked):
    """Labelled texts, as they are read and as they are varied while training."""

    class_weights: str = option("none", "weight of a class in the loss; balanced: 1 / frequency", ("none", "balanced"))
    normalize: str = option("none", "of every text: any of lower,accents,punctuation,stopwords, or all", fixed=True)
    augment: str = option("none", "of training texts: any of insert,replace,swap,delete,mask, or all")
    augment_share: float = option(0.5, "share of the training texts that are augmented each time", low=0, high=1)
    augment_rate: float = option(0.1, "share of the words of such a text that change", low=0, high=1)


class Classification(FileTask):
    """Texts, or pairs of texts, with one label each; labels are words, numbered in sorted order.

    labels: of the model that is judged, in their order; else they are those of train.
    """

    Config, kinds, command, judged = ClassifyConfig, ("gpt", "bert"), "classify", "classify"
    best = "accuracy"
    files = (".tsv", ".csv", ".jsonl")

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int, batch_size: int,
                 options: ClassifyConfig, labels: Sequence[str] = ()):  # fmt: skip
        if tokenizer.eot is None and tokenizer.cls is None:
            raise UserError("the tokenizer has no [CLS] and no <|endoftext|> to mark a text with: use another one")
        if max_len < 8:
            raise UserError(f"--max_len {max_len}: too short for labelled texts; give at least 8")
        self.tokenizer, self.max_len, self.seed = tokenizer, max_len, seed
        self.steps = parse_steps("normalize", options.normalize, NORMALIZATIONS)
        self.operations = parse_steps("augment", options.augment, AUGMENTATIONS)
        if "mask" in self.operations and tokenizer.mask is None:
            raise UserError("--augment mask: the tokenizer has no [MASK]; name the other operations")
        self.options, self.notes = options, []

        rows, valid_rows = self.read_both(
            train, valid, lambda path, _: read_rows(path, ["text", "label"], ("text_b",)), lambda row: row[1]["text"]
        )
        valid = valid or f"{train}, held out"
        text_columns([*rows, *valid_rows])
        for _, row in [*rows, *valid_rows]:
            row["label"] = row["label"].strip()
        found = Counter(row["label"] for _, row in rows)
        self.labels = list(labels) or sorted(found)
        if len(self.labels) < 2:
            raise UserError(f"{train}: only one label, {self.labels[0]!r}: a classifier needs at least two")
        if once := [label for label in self.labels if found[label] == 1]:
            self.notes.append(f"{train}: {len(once)} of {len(found)} labels occur only once (such as {once[0]!r})")
        self.cut = {}
        self.train, self.valid = self.encode(rows, train, "train"), self.encode(valid_rows, valid, "valid")
        self.group(seed, batch_size)
        self.augmentable = [self.read_texts(row) for _, row in rows] if self.operations else []
        self.words = [word for texts in self.augmentable for text in texts for word in text.split()]
        counts = np.array([found[label] for label in self.labels])
        self.class_weights = None
        if options.class_weights == "balanced" and rows:  # over all examples, their mean is 1 (King & Zeng 2001)
            self.class_weights = torch.tensor(self.n / (len(counts) * counts), dtype=torch.float32)
        self.checksum = rows_checksum(self.train, self.valid)

    @staticmethod
    def texts(path: str) -> Iterator[str]:
        return column_texts(path, ["text"], ("text_b",))

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return config.n_classes > 0

    def heads(self) -> dict[str, object]:
        return dict(n_classes=len(self.labels))

    def losses(self, answers: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, weights = answers["classify"].float(), self.class_weights  # (B, n_classes)
        weights = None if weights is None else weights.to(logits.device)
        return {"classify": F.cross_entropy(logits, inputs["labels"], weights, reduction="sum")}

    def measure(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = model.answer(inputs).float(), inputs["labels"]
        confusion = confusion_matrix(labels.cpu().numpy(), logits.argmax(dim=-1).cpu().numpy(), logits.size(-1))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"classify": loss, "confusion": torch.from_numpy(confusion).double()}

    def metrics(self, sums: dict[str, Tensor]) -> dict:
        confusion = np.rint(sums["confusion"].cpu().numpy()).astype(int)
        val_loss = float(sums["classify"] / sums["count/classify"])
        return {"val_loss": val_loss, **classification_report(confusion, self.labels)}

    def beats_chance(self, figures: dict) -> bool:
        n = np.sum(figures["confusion"])
        return figures["mcc"] > 2 / math.sqrt(n)  # of n guesses the correlation has the standard deviation 1 / sqrt(n)

    def summary(self, result: dict) -> list[str]:
        lines = [
            f"Validation loss {result['val_loss']:.4f} nats, accuracy {result['accuracy']:.4f} (always the largest "
            f"class: {result['majority']:.4f}), F1 {result['f1']:.4f} macro and {result['weighted_f1']:.4f} weighted, "
            f"MCC {result['mcc']:.4f}",
            f"{'':16} precision  recall      F1  | predicted {', '.join(result['classes'])}",
        ]
        for (name, row), counts in zip(result["classes"].items(), result["confusion"], strict=True):
            rates = f"{row['precision']:9.4f} {row['recall']:7.4f} {row['f1']:7.4f}"
            lines.append(f"{name[:16]:16} {rates}  | {' '.join(map(str, counts))}")
        return lines

    def example(self) -> list[str]:
        return ["some text"]

    def read_texts(self, row: dict) -> list[str]:
        return [normalize(row[name], self.steps) for name in ("text", "text_b") if name in row]

    def encode(self, rows: list[tuple[str, dict]], path: str, split: str) -> list[tuple[list[int], list[int], int]]:
        """(ids, segments, number of the label) of each row."""
        numbers = {label: i for i, label in enumerate(self.labels)}
        encoded, empty, lengths = [], [], []
        for place, row in rows:
            if row["label"].splitlines() != [row["label"]] or "\t" in row["label"]:
                raise UserError(f"{place}: the label {row['label']!r} is empty, or has tabs or line breaks in it")
            if row["label"] not in numbers:
                known = ", ".join(self.labels[:10])
                hint = nearest(row["label"], numbers)
                raise UserError(f"{place}: label {row['label']!r} is not one that is learnt{hint}: {known}")
            if not row["text"].strip():
                empty.append(place)
            texts = [self.tokenizer.encode(text) for text in self.read_texts(row)]
            lengths.append(sum(map(len, texts)))
            encoded.append((*text_ids(self.tokenizer, self.max_len, *texts), numbers[row["label"]]))
        if empty:
            self.notes.append(f"{path}: {len(empty)} of {len(rows)} texts are empty (the first: {empty[0]})")
        self.cut[split], notes = text_cuts(path, lengths, len(text_columns(rows)) if rows else 1, self.max_len)
        self.notes += notes
        return encoded

    def batch(self, indices: np.ndarray) -> Batch:
        """Texts of similar lengths; of augmented ones, what is done to them depends on (seed, index)."""
        if not self.operations:
            return super().batch(indices)
        rows = []
        draws = uniform(mix(self.seed, 4), np.asarray(indices), 2)
        for i, example, (draw, which) in zip(indices, self.order(indices), draws, strict=True):
            rows.append(self.train[example])
            if draw < self.options.augment_share:
                operation = self.operations[int(which * len(self.operations))]
                rows[-1] = self.augmented(example, operation, mix(self.seed, 5, int(i)))
        return self.collate(rows)

    def augmented(self, example: int, operation: str, key: int) -> tuple[list[int], list[int], int]:
        rate = self.options.augment_rate
        texts = [augment(t, operation, rate, self.words, mix(key, n)) for n, t in enumerate(self.augmentable[example])]
        ids = [masked_ids(self.tokenizer, t) if operation == "mask" else self.tokenizer.encode(t) for t in texts]
        return (*text_ids(self.tokenizer, self.max_len, *ids), self.train[example][2])

    def collate(self, examples: list[tuple[list[int], list[int], int]]) -> Batch:
        """What pad_texts gives, and labels (B,)."""
        inputs = pad_texts([(ids, segments) for ids, segments, _ in examples], self.tokenizer, self.max_len)
        labels = torch.tensor([label for _, _, label in examples])
        return Batch(inputs | {"labels": labels}, {"classify": len(examples)}, int(inputs["lengths"].sum()))
