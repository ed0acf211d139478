"""Labelled examples for fine-tuning: rows of files -> texts with a label, prompts with an answer."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mini.augment import AUGMENTATIONS, NORMALIZATIONS, augment, normalize, parse_steps
from mini.config import ClassifyConfig, UserError, nearest
from mini.data import IGNORE, Batch, Grouped, mix, uniform
from mini.tokenizer import Tokenizer


def read_rows(path: str | Path, columns: list[str], optional: tuple[str, ...] = ()) -> list[tuple[str, dict]]:
    """Rows of a .tsv or .csv file with a header or of a .jsonl file, as (place, {column: text}).

    place is 'file:line', for messages. Raises UserError for a missing file, column or value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in (".tsv", ".csv", ".jsonl"):
        raise UserError(f"{path}: expected .tsv or .csv with a header, or .jsonl")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start:,} is not UTF-8: convert the file") from None
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"{path}:{n}", parse_json_row(line, f"{path}:{n}")) for n, line in lines if line.strip()]
    else:
        rows = read_table(text, path, columns)
    for place, row in rows:
        for name in columns:
            if row.get(name) is None:
                raise UserError(f"{place}: no {name!r} (expected {', '.join(columns)})")
    if not rows:
        raise UserError(f"{path}: no rows")
    return [(place, {k: str(row[k]) for k in (*columns, *optional) if row.get(k) is not None}) for place, row in rows]


def text_columns(rows: list[tuple[str, dict]]) -> list[str]:
    """text, or text and text_b, whichever all of these rows have. Raises UserError where they differ."""
    pairs = "text_b" in rows[0][1]
    for place, row in rows:
        if ("text_b" in row) != pairs:
            raise UserError(f"{place}: {'no' if pairs else 'a'} 'text_b', unlike in {rows[0][0]}")
    return ["text", "text_b"] if pairs else ["text"]


def read_table(text: str, path: Path, columns: list[str]) -> list[tuple[str, dict]]:
    # A tab-separated file quotes nothing: a quotation mark in it is text.
    form = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if path.suffix == ".tsv" else {}
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), **form, strict=True)
    rows = []
    try:
        for name in columns:
            if name not in (reader.fieldnames or []):
                found = ", ".join(reader.fieldnames or ["nothing"])
                raise UserError(f"{path}:1: the header has no column {name!r} (it has {found[:80]})")
        for row in reader:
            if None in row:
                raise UserError(f"{path}:{reader.line_num}: more columns than the header has")
            rows.append((f"{path}:{reader.line_num}", row))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None
    return rows


def parse_json_row(text: str, place: str) -> dict:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object {{...}}")
    return {name: value for name, value in row.items() if isinstance(value, str | int | float)}


def column_texts(path: str, columns: list[str], optional: tuple[str, ...] = ()) -> Iterator[str]:
    """All texts in these columns of a file."""
    for _, row in read_rows(path, columns, optional):
        yield from row.values()


def checksum(*examples: list) -> str:
    """Tells whether two runs learnt from the same encoded examples."""
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()


# ---------------------------------------------------------------- texts
def text_ids(tokenizer: Tokenizer, max_len: int, *texts: list[int]) -> tuple[list[int], list[int]]:
    """[CLS] text [SEP], or [CLS] text [SEP] text_b [SEP], and the segment of each: 0, or 1 from text_b on.

    They are cut to max_len from the end of the longer text. A tokenizer without [CLS] and [SEP] has <|endoftext|>
    in their places.
    """
    first, last = (tokenizer.eot, tokenizer.eot) if tokenizer.cls is None else (tokenizer.cls, tokenizer.sep)
    parts = [text[:max_len] for text in texts]
    while sum(map(len, parts)) > max_len - len(parts) - 1:
        max(parts, key=len).pop()
    ids, segments = [first], [0]
    for segment, part in enumerate(parts):
        ids += [*part, last]
        segments += [segment] * (len(part) + 1)
    return ids, segments


def masked_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's ids, where "[MASK]" in it stands for that token."""
    before, *rest = text.split("[MASK]")
    if rest and tokenizer.mask is None:
        raise UserError("the tokenizer has no [MASK]")
    ids = []
    for part in (before, *rest):
        # A byte-level token holds the space before it: so the one before a mask belongs to what is masked.
        ids += [*tokenizer.encode(part.rstrip(" ") if tokenizer.lossless and rest else part), tokenizer.mask]
    return ids[:-1]


def pad(rows: list[list[int]], filling: int) -> Tensor:
    """Rows of different lengths -> (B, T), filled up at the right."""
    out = np.full((len(rows), max(map(len, rows))), filling, dtype=np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(out)


def filling(tokenizer: Tokenizer) -> int:
    return next(i for i in (tokenizer.pad, tokenizer.eot, 0) if i is not None)


def pad_texts(rows: list[tuple[list[int], list[int]]], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """What text_ids gives, as tokens and segments (B, T), padded at the right, and lengths (B,)."""
    return {
        "tokens": pad([ids for ids, _ in rows], filling(tokenizer)),
        "segments": pad([segments for _, segments in rows], 0),
        "lengths": torch.tensor([len(ids) for ids, _ in rows]),
    }


class LabelledTexts:
    """Texts, or pairs of texts, with one label each; labels are words, numbered in sorted order.

    notes: what a person should know of the files.
    """

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int, batch_size: int,
                 options: ClassifyConfig):  # fmt: skip
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

        rows, valid_rows = (
            [
                (place, row | {"label": row["label"].strip()})
                for place, row in read_rows(path, ["text", "label"], ("text_b",))
            ]
            for path in (train, valid)
        )
        text_columns([*rows, *valid_rows])
        found = Counter(row["label"] for _, row in rows)
        self.labels = sorted(found)
        if len(self.labels) < 2:
            raise UserError(f"{train}: only one label, {self.labels[0]!r}: a classifier needs at least two")
        if once := [label for label in self.labels if found[label] == 1]:
            self.notes.append(f"{train}: {len(once)} of {len(found)} labels occur only once (such as {once[0]!r})")
        self.train, self.valid = self.encode(rows, train), self.encode(valid_rows, valid)
        self.n = len(self.train)
        self.order = Grouped(np.array([len(ids) for ids, _, _ in self.train]), seed, batch_size)
        self.texts = [self.read_texts(row) for _, row in rows] if self.operations else []
        self.words = [word for texts in self.texts for text in texts for word in text.split()]
        counts = np.array([found[label] for label in self.labels])
        self.class_weights = None
        if options.class_weights == "balanced":  # over all examples, their mean is 1 (King & Zeng 2001)
            self.class_weights = torch.tensor(self.n / (len(counts) * counts), dtype=torch.float32)
        self.checksum = checksum(self.train, self.valid)

    def read_texts(self, row: dict) -> list[str]:
        return [normalize(row[name], self.steps) for name in ("text", "text_b") if name in row]

    def encode(self, rows: list[tuple[str, dict]], path: str) -> list[tuple[list[int], list[int], int]]:
        """(ids, segments, number of the label) of each row."""
        numbers = {label: i for i, label in enumerate(self.labels)}
        encoded, empty = [], []
        for place, row in rows:
            if not row["label"]:
                raise UserError(f"{place}: the label is empty")
            if row["label"] not in numbers:
                known = ", ".join(self.labels[:10])
                hint = nearest(row["label"], numbers)
                raise UserError(f"{place}: label {row['label']!r} is not in the training file{hint}: {known}")
            if not row["text"].strip():
                empty.append(place)
            texts = [self.tokenizer.encode(text) for text in self.read_texts(row)]
            encoded.append((*text_ids(self.tokenizer, self.max_len, *texts), numbers[row["label"]]))
        if empty:
            self.notes.append(f"{path}: {len(empty)} of {len(rows)} texts are empty (the first: {empty[0]})")
        return encoded

    def batch(self, indices: np.ndarray) -> Batch:
        """Texts of similar lengths; of augmented ones, what is done to them depends on (seed, index)."""
        examples = self.order(indices)
        rows = [self.train[i] for i in examples]
        if self.operations:
            draws = uniform(mix(self.seed, 4), np.asarray(indices), 2)
            for b, (draw, which) in enumerate(draws):
                if draw < self.options.augment_share:
                    operation = self.operations[int(which * len(self.operations))]
                    rows[b] = self.augmented(examples[b], operation, mix(self.seed, 5, int(indices[b])))
        return self.collate(rows)

    def augmented(self, example: int, operation: str, key: int) -> tuple[list[int], list[int], int]:
        rate = self.options.augment_rate
        texts = [augment(t, operation, rate, self.words, mix(key, n)) for n, t in enumerate(self.texts[example])]
        ids = [masked_ids(self.tokenizer, t) if operation == "mask" else self.tokenizer.encode(t) for t in texts]
        return (*text_ids(self.tokenizer, self.max_len, *ids), self.train[example][2])

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        order = sorted(range(len(self.valid)), key=lambda i: len(self.valid[i][0]))  # alike lengths: less padding
        for start in range(0, len(order), batch_size):
            yield self.collate([self.valid[i] for i in order[start : start + batch_size]])

    def collate(self, examples: list[tuple[list[int], list[int], int]]) -> Batch:
        """What pad_texts gives, and labels (B,)."""
        inputs = pad_texts([(ids, segments) for ids, segments, _ in examples], self.tokenizer)
        labels = torch.tensor([label for _, _, label in examples])
        return Batch(inputs | {"labels": labels}, {"loss": len(examples)}, int(inputs["lengths"].sum()))


class PromptAnswers:
    """prompt answer <eot>, where only the answer and its <eot> are to be predicted."""

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int, batch_size: int):
        if tokenizer.eot is None:
            raise UserError("the tokenizer has no <|endoftext|>, which ends answers: use another one")
        self.tokenizer, self.max_len = tokenizer, max_len
        self.train = self.encode(train)
        self.valid = self.encode(valid)
        self.n = len(self.train)
        self.order = Grouped(np.array([len(ids) for ids, _ in self.train]), seed, batch_size)
        self.checksum = checksum(self.train, self.valid)

    def encode(self, path: str) -> list[tuple[list[int], int]]:
        """(ids, number of ids before the answer) of each row. Long prompts lose their beginning."""
        encoded = []
        for place, row in read_rows(path, ["prompt", "answer"]):
            answer = [*self.tokenizer.encode(row["answer"]), self.tokenizer.eot]
            prompt = self.tokenizer.encode(row["prompt"])
            if not prompt or len(answer) < 2:
                raise UserError(f"{place}: the {'answer' if prompt else 'prompt'} is empty")
            room = self.max_len + 1 - len(answer)  # for the prompt; the last token is a target only
            if room < 1:
                raise UserError(f"{place}: the answer has {len(answer)} tokens, --max_len is {self.max_len}")
            prompt = prompt[max(0, len(prompt) - room) :]
            encoded.append((prompt + answer, len(prompt)))
        return encoded

    def batch(self, indices: np.ndarray) -> Batch:
        return self.collate([self.train[i] for i in self.order(indices)])

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        for start in range(0, len(self.valid), batch_size):
            yield self.collate(self.valid[start : start + batch_size])

    def collate(self, examples: list[tuple[list[int], int]]) -> Batch:
        """tokens and targets (B, T), padded at the right; targets IGNORE up to the answer."""
        targets = [[IGNORE] * (start - 1) + ids[start:] for ids, start in examples]
        inputs = {"tokens": pad([ids[:-1] for ids, _ in examples], self.tokenizer.eot), "targets": pad(targets, IGNORE)}
        answers = [ids[start:] for ids, start in examples]
        n_bytes = sum(int(self.tokenizer.byte_lengths[ids].sum()) for ids in answers)
        n_tokens = sum(len(ids) - 1 for ids, _ in examples)
        return Batch(inputs, {"loss": sum(map(len, answers)), "bytes": n_bytes}, n_tokens)
