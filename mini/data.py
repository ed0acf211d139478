"""From a step to its batch: which examples, as which tensors, all a function of (seed, index).

Example number i of a training run (i = step * batch_size + place in the batch) belongs to epoch i // n and stands
at place i % n of that epoch's order. So the batch of a step is the same however many processes share it, and
resuming needs nothing but the step.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mini import corpus, tokens
from mini.config import DataConfig, MLMConfig, UserError
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


class Grouped:
    """As shuffled(), but the examples of a batch are of similar lengths (n,): next to nothing of it is padding."""

    def __init__(self, lengths: np.ndarray, seed: int, batch_size: int):
        self.lengths, self.seed, self.batch_size = lengths, seed, batch_size
        self.order = functools.lru_cache(2)(self.order)  # an epoch's order is asked for at every step

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Which example each of these example numbers is."""
        epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), len(self.lengths))
        out = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            out[epochs == epoch] = self.order(epoch)[places[epochs == epoch]]
        return out

    def order(self, epoch: int) -> np.ndarray:
        """Stretches of 50 batches of a random order are sorted by length, and the batches shuffled again."""
        n, size = len(self.lengths), self.batch_size
        order = permute(np.arange(n), n, mix(self.seed, epoch))
        for start in range(0, n, 50 * size):
            stretch = order[start : start + 50 * size]  # a view
            stretch[:] = stretch[np.argsort(self.lengths[stretch], kind="stable")]
        first = -epoch * n % size  # examples that complete the last epoch's last batch
        whole = (n - first) // size
        if whole > 0:
            batches = order[first : first + whole * size].reshape(whole, size)  # a view
            batches[:] = batches[permute(np.arange(whole), whole, mix(self.seed, epoch, 1))]
        return order


def uniform(key: int, indices: np.ndarray, width: int) -> np.ndarray:
    """(B, width) numbers in [0, 1), a row for each example number: SplitMix64 with (key, index) as its seed."""
    with np.errstate(over="ignore"):  # wraps around, as it should
        rows = splitmix(indices.astype(np.uint64) + np.uint64(mix(key)))[:, None]  # (B, 1)
        bits = splitmix(rows + np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)) * 2.0**-53


def splitmix(h: np.ndarray) -> np.ndarray:
    """The finaliser of mix() for arrays of uint64."""
    h = (h ^ h >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ h >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return h ^ h >> np.uint64(31)


# ---------------------------------------------------------------- text -> token folder
ENCODER_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # what a BERT needs beside text


def init_tokenizer(init: str, spec: str | None, special: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a run to start from. Published weights may come without one: then spec names it."""
    try:
        own = load_tokenizer(init)
    except UserError:
        if spec in (None, "bpe"):
            raise
        return make_tokenizer(spec, list, 0, special)
    if spec and (spec == "bpe" or make_tokenizer(spec, list, 0, special).fingerprint != own.fingerprint):
        raise UserError(f"--tokenizer {spec}: {init} brings a tokenizer of its own, on which its weights depend")
    return own


def prepare_tokens(
    config: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    given: set[str] = frozenset(),
    special: Sequence[str] = (),
) -> tuple[TokenFolder, Tokenizer]:
    """The corpus of --data as tokens: opened if it is a token folder, taken from the cache, or made now.

    tokenizer: that of the run to start from, if any. given: flags of the command line, of which a token folder
    refuses those that come too late for it. special: tokens that the model needs beside text.
    """
    if tokens.is_token_folder(config.data):
        if late := given & {"tokenizer", "vocab_size", "valid", "valid_fraction", "separator", "errors"}:
            raise UserError(f"--{min(late)}: {config.data} is made of tokens already; make it anew with that flag")
        made_with = load_tokenizer(config.data).with_special(special)
        if tokenizer and tokenizer.fingerprint != made_with.fingerprint:
            raise UserError(f"{config.data} was made with another tokenizer than the run of --init has")
        return tokens.open_tokens(config.data), made_with
    if not tokenizer and config.tokenizer != "bpe":
        tokenizer = make_tokenizer(config.tokenizer, list, vocab_size, special)
    text = corpus.fingerprint(config.data, config.valid, config.valid_fraction, config.separator, config.errors)
    trained = f"bpe{vocab_size}" + f"-{len(special)}" * bool(special)
    name = f"{tokenizer.kind}-{tokenizer.fingerprint[:12]}" if tokenizer else trained
    path = cache_folder() / "tokens" / f"{text[:24]}-{name}"
    if not tokens.is_token_folder(path):
        write_token_folder(config, vocab_size, tokenizer, path, special=special)
    return tokens.open_tokens(path), load_tokenizer(path)


def write_token_folder(
    config: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    out: Path,
    workers: int | None = None,
    special: Sequence[str] = (),
) -> TokenFolder:
    """Reads the corpus of --data and writes it as a token folder; trains or opens the tokenizer if none is given."""
    split = config.valid, config.valid_fraction, config.separator, config.errors
    train, valid = corpus.open_corpus(config.data, *split)
    if not tokenizer:
        tokenizer = make_tokenizer(config.tokenizer, lambda: train.texts(limit=BPE_BYTES), vocab_size, special)
    return tokens.write_tokens({"train": train, "valid": valid}, tokenizer, out, workers=workers)


# ---------------------------------------------------------------- language modelling
class LMWindows:
    """Windows of max_len tokens that tile the corpus, each with the tokens that follow as targets."""

    def __init__(self, train: TokenFile, valid: TokenFile, tokenizer: Tokenizer, max_len: int, seed: int):
        self.train, self.valid, self.max_len, self.seed = train.tokens, valid.tokens, max_len, seed
        self.checksum = f"{train.sha256}-{valid.sha256}"
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


# ---------------------------------------------------------------- masked language modelling
class MaskedSentences:
    """BERT's examples: [CLS] A [SEP] B [SEP] with some tokens masked (Devlin et al. 2019, §3.1 and A.1).

    A and B are whole sentences, as many as fill max_len; then the longer one is cut. In half of the examples B follows
    A, else it comes from another document. Without nsp there is only A, as long as fits (Liu et al. 2019, "RoBERTa",
    §4.2). The text's windows of max_len tokens tell where examples begin; every epoch moves them and masks anew.
    """

    def __init__(self, train: TokenFile, valid: TokenFile, tokenizer: Tokenizer, max_len: int, seed: int,
                 options: MLMConfig):  # fmt: skip
        self.train, self.valid = Sentences(train, tokenizer), Sentences(valid, tokenizer)
        self.tokenizer, self.max_len, self.seed, self.options = tokenizer, max_len, seed, options
        self.checksum = f"{train.sha256}-{valid.sha256}"
        if not len(self.valid.starts):
            raise UserError("the validation text has no tokens: give more text or a larger --valid_fraction")
        self.room = max_len - (3 if options.nsp else 2)  # for text, beside [CLS] and [SEP]
        if self.room < 2:
            raise UserError(f"--max_len {max_len}: too short for {'pairs of segments' if options.nsp else 'text'}")
        for name, text in (("training", self.train), ("validation", self.valid)):
            if options.nsp and text.n_documents < 2:
                raise UserError(
                    f"the {name} text is one document, so there is no other to draw a wrong next sentence from: give "
                    f"several files, say what ends a document with --separator (an empty line: '\\n\\n'), or use "
                    f"--nsp false"
                )
        self.n = max(1, len(self.train.tokens) // self.room)
        self.most = max(1, round(options.mask_rate * self.room))  # masked tokens of an example (M)
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special.values()))

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples of these numbers, as make() gives them."""
        windows = shuffled(indices, self.n, self.seed)
        return self.make(self.train, windows, np.asarray(indices), self.seed)

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        """An example for each window of the validation text (of its first `limit` tokens), always the same ones."""
        n_tokens = min(limit or len(self.valid.tokens), len(self.valid.tokens))
        n = max(1, n_tokens // self.room)
        for start in range(0, n, batch_size):
            windows = np.arange(start, min(start + batch_size, n))
            yield self.make(self.valid, windows, windows, seed=0)

    def make(self, text: "Sentences", windows: np.ndarray, indices: np.ndarray, seed: int) -> Batch:
        """tokens (B, T), segments (B, T), lengths (B,), places and targets (B, M), and with nsp unrelated (B,).

        Everything random about an example comes from (seed, its index).
        """
        B, T, options = len(windows), self.max_len, self.options
        shift, short, length, split, unrelated, other = uniform(mix(seed, 1), indices, 6).T  # each (B,)
        size = np.where(short < options.short_rate, 2 + length * (self.room - 1), self.room).astype(np.int64)
        begin, middle, end = text.stretch(((windows + shift) * self.room).astype(np.int64), size, split)
        if options.nsp:
            unrelated = unrelated < 0.5
            wrong_begin, wrong_end = text.elsewhere(middle, np.minimum(end - middle, size), other, split)
            b_begin, b_end = np.where(unrelated, wrong_begin, middle), np.where(unrelated, wrong_end, end)
            a, b = fit(middle - begin, b_end - b_begin, size)  # (B,) tokens of each segment
            a_begin = middle - a  # A loses its beginning and B its end, so what meets stays together
        else:
            a, b = np.minimum(end - begin, size), np.zeros(B, dtype=np.int64)
            a_begin, b_begin = begin, begin

        column = np.arange(T)
        a_end, b_start = 1 + a[:, None], (2 + a)[:, None]  # columns: [CLS], A, [SEP], B, [SEP], padding
        lengths = 2 + a + (b + 1 if options.nsp else 0)
        in_a = (column >= 1) & (column < a_end)
        in_b = (column >= b_start) & (column < b_start + b[:, None])
        source = np.where(in_a, a_begin[:, None] + column - 1, b_begin[:, None] + column - b_start)
        tokens = text.tokens[np.where(in_a | in_b, source, 0)].astype(np.int64)
        tokens = np.where(in_a | in_b, tokens, self.tokenizer.sep)
        tokens = np.where(column < lengths[:, None], tokens, self.tokenizer.pad)
        tokens[:, 0] = self.tokenizer.cls
        segments = ((column >= b_start) & (column < lengths[:, None])).astype(np.int64)

        places, targets = self.mask(tokens, in_a | in_b, indices, seed)
        inputs = {"tokens": tokens, "segments": segments, "lengths": lengths, "places": places, "targets": targets}
        counts = {"mlm": int((targets != IGNORE).sum())}
        if options.nsp:
            inputs["unrelated"] = unrelated.astype(np.int64)
            counts["nsp"] = B
        inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return Batch(inputs, counts, int(lengths.sum()))

    def mask(self, tokens: np.ndarray, allowed: np.ndarray, indices: np.ndarray, seed: int):
        """Masks in tokens (B, T), where allowed (B, T) is True; returns the places and what stood there, (B, M).

        mask_rate of each row's text is to be predicted: 80 % of it becomes [MASK], 10 % another token, 10 % stays.
        """
        B, T = tokens.shape
        count = np.maximum(1, np.rint(self.options.mask_rate * allowed.sum(1))).astype(np.int64)  # (B,)
        draw = uniform(mix(seed, 2), indices, T)  # (B, T): the lowest numbers are masked
        if self.options.whole_word:  # all tokens of a word have the number of its first
            goes_on = self.tokenizer.continues_word(tokens) & allowed
            first = np.maximum.accumulate(np.where(goes_on, 0, np.arange(T)), axis=1)
            draw = np.take_along_axis(draw, first, axis=1)
        order = np.argsort(np.where(allowed, draw, 2.0), axis=1, kind="stable")[:, : self.most + 1]
        chosen = np.arange(self.most + 1) < count[:, None]
        if self.options.whole_word:  # the word that count would cut is left out, unless it is the only one
            word = np.take_along_axis(first, order, axis=1)
            cut = word == np.take_along_axis(word, count[:, None], axis=1)
            chosen &= ~cut | (word == word[:, :1])
        order, chosen = order[:, : self.most], chosen[:, : self.most]  # (B, M)
        there = np.take_along_axis(tokens, order, axis=1)
        targets = np.where(chosen, there, IGNORE)
        kind, which = uniform(mix(seed, 3), indices, 2 * order.shape[1]).reshape(B, 2, -1).transpose(1, 0, 2)
        other = self.ordinary[(which * len(self.ordinary)).astype(np.int64)]
        shown = np.where(kind < 0.8, self.tokenizer.mask, np.where(kind < 0.9, other, targets))
        np.put_along_axis(tokens, order, np.where(chosen, shown, there), axis=1)
        return np.where(chosen, order, order[:, :1]), targets  # filled up with the first place, without a target


class Sentences:
    """Where sentences and documents begin in a token file; all questions are answered for B places at once."""

    def __init__(self, file: TokenFile, tokenizer: Tokenizer):
        self.tokens, self.starts = file.tokens, file.sentences
        # (n_documents + 1,) the number of each document's first sentence, and of all sentences
        self.first = np.append(np.searchsorted(file.sentences, file.documents), len(file.sentences))
        self.marked = tokenizer.eot is not None  # <|endoftext|> stands before a document
        self.n_documents = int((np.diff(self.first) > 0).sum())  # with text

    def find(self, places: np.ndarray, side: str = "left") -> np.ndarray:
        """The first sentence that begins at places or later; with side "right", later than places."""
        return np.searchsorted(self.starts, places.astype(np.uint64), side)  # of one type: else numpy copies starts

    def edge(self, sentence: np.ndarray) -> np.ndarray:
        """The token at which a sentence begins, or behind the last one, the text's end."""
        inside = np.minimum(sentence, len(self.starts) - 1)
        return np.where(sentence < len(self.starts), self.starts[inside].astype(np.int64), len(self.tokens))

    def document(self, sentence: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.first, sentence, side="right") - 1

    def begin(self, sentence: np.ndarray, document: np.ndarray) -> np.ndarray:
        """The first token of a sentence's text."""
        return self.edge(sentence) + (self.marked & (sentence == self.first[document]))

    def stretch(self, places: np.ndarray, size: np.ndarray, split: np.ndarray) -> tuple:
        """Begin, middle and end (each (B,), in tokens) of whole sentences of one document, at least size tokens.

        They begin with the sentence at places, or inside of it where it is long; split (in [0, 1)) chooses which edge
        between two sentences is the middle, or which token where none is in reach. A document's end may come sooner.
        """
        places = np.minimum(places, len(self.tokens) - 1)
        sentence = self.find(places, "right") - 1
        document = self.document(sentence)
        first, last = self.first[document], self.first[document + 1]
        begin, stop = self.begin(sentence, document), self.edge(last)
        inside = np.maximum(begin, np.minimum(places, stop - size))  # with size tokens left, if there are so many
        begin = np.where(places - begin >= size, inside, begin)
        short = (sentence + 1 == last) & (stop - begin < size)  # the document's last: better begin one sooner
        begin = np.where(short & (sentence > first), self.begin(sentence - 1, document), begin)
        sentence = np.maximum(sentence - short, first)

        beyond = np.minimum(self.find(begin + size), last)  # the first sentence that begins behind size tokens
        end = self.edge(np.maximum(beyond, sentence + 1))
        inner = beyond - sentence - 1  # edges between the sentences
        middle = self.edge(sentence + 1 + (split * inner).astype(np.int64))
        within = begin + 1 + (split * (np.minimum(end - begin, size) - 1)).astype(np.int64)
        return begin, np.where(inner > 0, middle, within), end

    def elsewhere(self, places: np.ndarray, size: np.ndarray, draw: np.ndarray, split: np.ndarray) -> tuple:
        """Begin and end of size tokens of another document than that of places.

        They must not give away that they are from elsewhere: they begin with a sentence if places are where one begins,
        and are fewer than size only where a document is shorter than that.
        """
        at = self.find(places, "right") - 1
        mine = self.document(at)
        first, last = self.first[mine], self.first[mine + 1]
        sentence = (draw * (len(self.starts) - (last - first))).astype(np.int64)
        sentence += np.where(sentence >= first, last - first, 0)  # every sentence of the others is equally likely
        document = self.document(sentence)
        end = self.edge(self.first[document + 1])
        latest = self.find(np.maximum(end - size, 0), "right") - 1  # from here on, size tokens are left
        sentence = np.clip(sentence, self.first[document], np.maximum(latest, self.first[document]))
        begin = self.begin(sentence, document)
        length = np.minimum(self.edge(sentence + 1), end - size) - begin
        begin += np.where(self.edge(at) != places, split * np.maximum(length, 0), 0).astype(np.int64)
        return begin, np.minimum(begin + size, end)


def fit(a: np.ndarray, b: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts lengths (B,) so that a + b <= size, by taking from the longer one."""
    half = size // 2
    short_a, short_b = np.minimum(a, half), np.minimum(b, size - half)
    return np.minimum(a, size - short_b), np.minimum(b, size - short_a)
