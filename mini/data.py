"""From a step to its batch: which examples, as which tensors, all a function of (seed, index).

Example number i of a training run (i = step * batch_size + place in the batch) belongs to epoch i // n and stands
at place i % n of that epoch's order. So the batch of a step is the same however many processes share it, and
resuming needs nothing but the step.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mini import corpus, tokens
from mini.config import DataConfig, UserError, nearest
from mini.fetch import cache_folder
from mini.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from mini.tokens import TokenFile, TokenFolder

IGNORE = -100  # a target that is not predicted
BPE_BYTES = 10_000_000  # of text, evenly spread over the corpus, are what a BPE is trained on


@dataclass
class Batch:
    """What a model's loss takes, and what its sums are divided by."""

    inputs: dict[str, Tensor]
    counts: dict[str, int]  # for each loss: over how many predictions it is summed
    n_tokens: int  # real tokens that go through the model

    def to(self, device: torch.device) -> "Batch":
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.counts, self.n_tokens)


# ---------------------------------------------------------------- order
def mix(*values: int) -> int:
    """A 64-bit number that depends on every bit of every value (the finaliser of SplitMix64, Steele et al. 2014)."""
    h = 0
    for value in values:
        h = (h ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h


def permute(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of 0..n-1, chosen by key, sends each place; stores nothing of size n.

    A Feistel network permutes the 2^(2k) >= n numbers; results of n or more are sent on until they are smaller
    ("cycle walking", Black & Rogaway 2002), fewer than four rounds of it on average.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # k bits on each side
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(mix(key, i)) for i in range(4)]
    x = places.astype(np.uint64)
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & low
        for k in keys:
            h = (right + k) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
            h = (h ^ h >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (h >> np.uint64(32)) & low
        x[todo] = left << np.uint64(half) | right
        todo = x >= n
    return x.astype(np.int64)


def shuffled(indices: np.ndarray, n: int, seed: int) -> np.ndarray:
    """For example numbers of a run, which of the n examples each is: every epoch all of them, in a new order."""
    epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), n)
    out = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permute(places[here], n, mix(seed, int(epoch)))
    return out


# ---------------------------------------------------------------- text -> token folder
def init_tokenizer(init: str, spec: str | None) -> Tokenizer:
    """The tokenizer of a run to start from. Published weights may come without one: then spec names it."""
    try:
        own = load_tokenizer(init)
    except UserError:
        if spec in (None, "bpe"):
            raise
        return make_tokenizer(spec, list, 0)
    if spec and (spec == "bpe" or make_tokenizer(spec, list, 0).fingerprint != own.fingerprint):
        raise UserError(f"--tokenizer {spec}: {init} brings a tokenizer of its own, on which its weights depend")
    return own


def prepare_tokens(
    config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None, given: set[str] = frozenset()
) -> tuple[TokenFolder, Tokenizer]:
    """The corpus of --data as tokens: opened if it is a token folder, taken from the cache, or made now.

    tokenizer: that of the run to start from, if any. given: flags of the command line, of which a token folder
    refuses those that come too late for it.
    """
    if tokens.is_token_folder(config.data):
        if late := given & {"tokenizer", "vocab_size", "valid", "valid_fraction", "separator", "errors"}:
            raise UserError(f"--{min(late)}: {config.data} is made of tokens already; make it anew with that flag")
        made_with = load_tokenizer(config.data)
        if tokenizer and tokenizer.fingerprint != made_with.fingerprint:
            raise UserError(f"{config.data} was made with another tokenizer than the run of --init has")
        return tokens.open_tokens(config.data), made_with
    if not tokenizer and config.tokenizer != "bpe":
        tokenizer = make_tokenizer(config.tokenizer, list, vocab_size)
    text = corpus.fingerprint(config.data, config.valid, config.valid_fraction, config.separator, config.errors)
    name = f"{tokenizer.kind}-{tokenizer.fingerprint[:12]}" if tokenizer else f"bpe{vocab_size}"
    path = cache_folder() / "tokens" / f"{text[:24]}-{name}"
    if not tokens.is_token_folder(path):
        write_token_folder(config, vocab_size, tokenizer, path)
    return tokens.open_tokens(path), load_tokenizer(path)


def write_token_folder(
    config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None, out: Path, workers: int | None = None
) -> TokenFolder:
    """Reads the corpus of --data and writes it as a token folder; trains or opens the tokenizer if none is given."""
    split = config.valid, config.valid_fraction, config.separator, config.errors
    train, valid = corpus.open_corpus(config.data, *split)
    tokenizer = tokenizer or make_tokenizer(config.tokenizer, lambda: train.texts(limit=BPE_BYTES), vocab_size)
    return tokens.write_tokens({"train": train, "valid": valid}, tokenizer, out, workers=workers)


# ---------------------------------------------------------------- language modelling
class LMWindows:
    """Windows of max_len tokens that tile the corpus, each with the tokens that follow as targets."""

    def __init__(self, train: TokenFile, valid: TokenFile, tokenizer: Tokenizer, max_len: int, seed: int):
        self.train, self.valid, self.max_len, self.seed = train.tokens, valid.tokens, max_len, seed
        self.byte_lengths = tokenizer.byte_lengths
        self.n = (len(self.train) - 1) // max_len
        if self.n < 1:
            raise UserError(
                f"the training text has {len(self.train):,} tokens, but a window takes {max_len + 1}: "
                f"give more text or a smaller --max_len"
            )
        if len(self.valid) < 2:
            raise UserError("the validation text has fewer than 2 tokens: give more text or a larger --valid_fraction")

    def batch(self, indices: np.ndarray) -> Batch:
        """The windows of these example numbers: tokens and targets (B, T)."""
        starts = shuffled(indices, self.n, self.seed) * self.max_len
        rows = self.train[starts[:, None] + np.arange(self.max_len + 1)].astype(np.int64)  # (B, T + 1)
        rows = torch.from_numpy(rows)
        size = rows.numel() - len(rows)
        return Batch({"tokens": rows[:, :-1], "targets": rows[:, 1:]}, {"loss": size}, size)

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        """Every token of the validation text once (or of its first `limit` tokens), the last window too."""
        end = min(len(self.valid), limit + 1) if limit else len(self.valid)
        T = self.max_len
        for start in range(0, end - 1, T * batch_size):
            flat = self.valid[start : min(start + T * batch_size + 1, end)].astype(np.int64)
            n = len(flat) - 1  # predictions
            B = -(-n // T)
            inputs, targets = np.zeros(B * T, dtype=np.int64), np.full(B * T, IGNORE, dtype=np.int64)
            inputs[:n], targets[:n] = flat[:-1], flat[1:]
            pair = {"tokens": torch.from_numpy(inputs).view(B, T), "targets": torch.from_numpy(targets).view(B, T)}
            yield Batch(pair, {"loss": n, "bytes": int(self.byte_lengths[flat[1:]].sum())}, n)


# ---------------------------------------------------------------- labelled text and prompt/answer pairs
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
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object {{...}}")
    return {name: value for name, value in row.items() if isinstance(value, str | int | float)}


def labelled_tokenizer(config: DataConfig, columns: list[str], vocab_size: int) -> Tokenizer:
    """The tokenizer of --tokenizer for training on labelled texts from scratch; a BPE is trained on them."""

    def texts() -> Iterator[str]:
        for _, row in read_rows(config.train, columns):
            yield from row.values()

    return make_tokenizer(config.tokenizer, texts, vocab_size)


def check_eot(tokenizer: Tokenizer) -> None:
    if tokenizer.eot is None:
        raise UserError("the tokenizer has no <|endoftext|>, which ends texts and answers: use another one")


def pad(rows: list[list[int]], filling: int) -> Tensor:
    """Rows of different lengths -> (B, T), filled up at the right."""
    out = np.full((len(rows), max(map(len, rows))), filling, dtype=np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(out)


def text_ids(tokenizer: Tokenizer, max_len: int, text: str, text_b: str | None = None) -> list[int]:
    """<eot> text <eot>, or <eot> text <eot> text_b <eot>, cut to max_len from the end of the longer text."""
    parts = [tokenizer.encode(part)[:max_len] for part in ([text] if text_b is None else [text, text_b])]
    while sum(map(len, parts)) > max_len - len(parts) - 1:
        max(parts, key=len).pop()
    ids = [tokenizer.eot]
    for part in parts:
        ids += [*part, tokenizer.eot]
    return ids


def checksum(*examples: list) -> str:
    """Tells whether two runs learnt from the same encoded examples."""
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()


class LabelledTexts:
    """Texts, or pairs of texts, with one label each; labels are words, numbered in sorted order."""

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int):
        check_eot(tokenizer)
        if max_len < 8:
            raise UserError(f"--max_len {max_len}: too short for labelled texts; give at least 8")
        train_rows = read_rows(train, ["text", "label"], ("text_b",))
        self.labels = sorted({row["label"] for _, row in train_rows})
        if len(self.labels) < 2:
            raise UserError(f"{train}: only one label, {self.labels[0]!r}: a classifier needs at least two")
        self.tokenizer, self.max_len, self.seed = tokenizer, max_len, seed
        self.train = self.encode(train_rows)
        self.valid = self.encode(read_rows(valid, ["text", "label"], ("text_b",)))
        self.n = len(self.train)
        self.checksum = checksum(self.train, self.valid)

    def encode(self, rows: list[tuple[str, dict]]) -> list[tuple[list[int], int]]:
        numbers = {label: i for i, label in enumerate(self.labels)}
        encoded = []
        for place, row in rows:
            if not row["label"].strip():
                raise UserError(f"{place}: the label is empty")
            if row["label"] not in numbers:
                known = ", ".join(self.labels[:10])
                hint = nearest(row["label"], numbers)
                raise UserError(f"{place}: label {row['label']!r} is not in the training file{hint}: {known}")
            ids = text_ids(self.tokenizer, self.max_len, row["text"], row.get("text_b"))
            encoded.append((ids, numbers[row["label"]]))
        return encoded

    def batch(self, indices: np.ndarray) -> Batch:
        return self.collate([self.train[i] for i in shuffled(indices, self.n, self.seed)])

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        order = sorted(range(len(self.valid)), key=lambda i: len(self.valid[i][0]))  # alike lengths: less padding
        for start in range(0, len(order), batch_size):
            yield self.collate([self.valid[i] for i in order[start : start + batch_size]])

    def collate(self, examples: list[tuple[list[int], int]]) -> Batch:
        """tokens (B, T) padded at the right, lengths (B,), labels (B,)."""
        rows = [ids for ids, _ in examples]
        lengths = torch.tensor([len(ids) for ids in rows])
        labels = torch.tensor([label for _, label in examples])
        inputs = {"tokens": pad(rows, self.tokenizer.eot), "lengths": lengths, "labels": labels}
        return Batch(inputs, {"loss": len(rows)}, int(lengths.sum()))


class PromptAnswers:
    """prompt answer <eot>, where only the answer and its <eot> are to be predicted."""

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int):
        check_eot(tokenizer)
        self.tokenizer, self.max_len, self.seed = tokenizer, max_len, seed
        self.train = self.encode(train)
        self.valid = self.encode(valid)
        self.n = len(self.train)
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
        return self.collate([self.train[i] for i in shuffled(indices, self.n, self.seed)])

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
