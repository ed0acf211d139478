"""Masked language modelling with the next sentence: BERT's pretraining (Devlin et al. 2019, §3.1)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini.flags import Checked, UserError, option
from mini.model.config import ModelConfig
from mini.model.scores import token_loss
from mini.model.transformer import Model
from mini.tasks.base import IGNORE, Batch, Task
from mini.tasks.inputs import check_documents, document_numbers
from mini.tasks.order import mix, shuffled, uniform
from mini.text.tokenizer import Tokenizer
from mini.text.tokens import TokenFile

VALIDATION_RATE = 0.15  # of masked tokens, whatever the training's: so that runs of different rates can be compared


@dataclass
class MLMConfig(Checked):
    """BERT's pretraining: masked tokens and the next sentence."""

    nsp: bool = option(True, "pairs of segments, and whether the second follows; false: one segment (RoBERTa)")
    mask_rate: float = option(0.15, "share of tokens to predict in training (validation: 0.15)", low=0.001, high=0.9)
    whole_word: bool = option(False, "mask words as a whole; one that would exceed mask_rate is left out")
    short_rate: float = option(0.1, "share of the examples that are cut to a random shorter length", low=0, high=1)
    document_mask: bool = option(False, "examples run on into the next documents, which see nothing of each other")


class MaskedLanguageModelling(Task):
    """Fill masked tokens of [CLS] A [SEP] B [SEP], and tell whether B follows A or is random (Devlin et al., A.1).

    A and B are whole sentences, as many as fill max_len; then the longer one is cut. In half of the examples B follows
    A, else it comes from another document. Without nsp there is only A, as long as fits (Liu et al. 2019, "RoBERTa",
    §4.2), and with document_mask it runs on into the next documents. The text's windows of max_len tokens tell where
    examples begin; every epoch moves them and masks anew.
    A loss that has not left the "unigram plateau", that of guessing by frequency, has learnt nothing from context.
    """

    Config, kinds, command, judged = MLMConfig, ("bert",), "fill", "mlm"
    pretrains, fixed_shape, in_parts = True, True, True

    unit = "windows"

    def __init__(self, train: TokenFile | None, valid: TokenFile, tokenizer: Tokenizer, max_len: int, seed: int,
                 batch_size: int = 1, options: MLMConfig | None = None):  # fmt: skip
        self.options = options = options or MLMConfig()
        train = train or valid
        self.train, self.valid = Sentences(train, tokenizer), Sentences(valid, tokenizer)
        self.tokenizer, self.max_len, self.seed, self.notes = tokenizer, max_len, seed, []
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
                    "more files, say what ends a document with --separator (an empty line: '\\n\\n'), or --nsp false"
                )
        if options.document_mask:
            if options.nsp:
                raise UserError("--document_mask packs documents into one example: that needs --nsp false")
            check_documents(train)
        self.n, self.n_valid = (max(1, len(text.tokens) // self.room) for text in (self.train, self.valid))
        self.predicted = self.most(options.mask_rate) / max_len
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special.values()))
        self.log_frequency = log_frequencies(train.tokens, tokenizer)

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return config.mlm and not config.n_classes and not config.spans

    @classmethod
    def published_options(cls, config: ModelConfig, folder: str) -> MLMConfig:
        return MLMConfig(nsp=config.nsp)

    @classmethod
    def judging(cls, options: MLMConfig) -> MLMConfig:
        """Masked tokens alone, whatever was learnt beside: a file may be one document."""
        return replace(options, nsp=False, document_mask=False)

    def heads(self) -> dict[str, object]:
        return dict(mlm=True, nsp=self.options.nsp)

    def losses(self, answers: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropies in nats; targets (B, M), IGNORE where a row has fewer; unrelated (B,): 1 if B is random."""
        losses = {"mlm": token_loss(answers["mlm"], inputs["targets"])}
        if "unrelated" in inputs:
            losses["nsp"] = F.cross_entropy(answers["nsp"].float(), inputs["unrelated"], reduction="sum")
        return losses

    def measure(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        answers = model.answers(inputs)
        chosen = inputs["targets"] >= 0
        guesses, targets = answers["mlm"][chosen].argmax(-1), inputs["targets"][chosen]  # (N,) each
        sums = self.losses(answers, inputs) | {
            "mlm_hits": (guesses == targets).sum(),
            "unigram": -self.log_frequency[targets.cpu()].sum(),
            "frequent_hits": (targets == int(self.log_frequency.argmax())).sum(),
        }
        if "unrelated" in inputs:
            unrelated = inputs["unrelated"]
            sums |= {"nsp_hits": (answers["nsp"].argmax(-1) == unrelated).sum(), "unrelated": unrelated.sum()}
        return sums

    def metrics(self, sums: dict) -> dict:
        n = float(sums["count/mlm"])
        mlm, hits, unigram, frequent = (float(sums[k]) / n for k in ("mlm", "mlm_hits", "unigram", "frequent_hits"))
        figures = dict(val_loss=mlm, mlm_loss=mlm, unigram_loss=unigram, mlm_accuracy=hits, unigram_accuracy=frequent)
        if "nsp" in sums:
            n = float(sums["count/nsp"])
            nsp, hits, share = (float(sums[k]) / n for k in ("nsp", "nsp_hits", "unrelated"))
            figures |= dict(val_loss=mlm + nsp, nsp_loss=nsp, nsp_accuracy=hits, nsp_chance=max(share, 1 - share))
        return figures

    def beats_chance(self, figures: dict) -> bool:
        return figures["mlm_loss"] < figures["unigram_loss"]

    def summary(self, result: dict) -> list[str]:
        lines = [
            f"Masked tokens: validation loss {result['mlm_loss']:.4f} nats (by frequency alone "
            f"{result['unigram_loss']:.4f}), accuracy {result['mlm_accuracy']:.4f} (always the most frequent token "
            f"{result['unigram_accuracy']:.4f})"
        ]
        if "nsp_loss" in result:
            lines.append(
                f"Next sentence: validation loss {result['nsp_loss']:.4f} nats (by chance {math.log(2):.4f}), "
                f"accuracy {result['nsp_accuracy']:.4f} (by chance {result['nsp_chance']:.4f})"
            )
        return lines

    def most(self, rate: float) -> int:
        """The masked tokens of an example that is full (M)."""
        return max(1, round(rate * self.room))

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples of these numbers, as make() gives them."""
        windows = shuffled(indices, self.n, self.seed)
        return self.make(self.train, windows, np.asarray(indices), self.seed, self.options.mask_rate)

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        """An example for each window of the validation text (of its first `limit` tokens), always the same ones."""
        n_tokens = min(limit or len(self.valid.tokens), len(self.valid.tokens))
        n = max(1, n_tokens // self.room)
        for begin in range(0, n, batch_size):
            windows = np.arange(begin, min(begin + batch_size, n))
            yield self.make(self.valid, windows, windows, 0, VALIDATION_RATE)

    def make(self, text: "Sentences", windows: np.ndarray, indices: np.ndarray, seed: int, rate: float) -> Batch:
        """tokens (B, T), segments (B, T), lengths (B,), positions and targets (B, M), and with nsp unrelated (B,).

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
            end = len(text.tokens) if options.document_mask else end
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

        allowed = in_a | in_b
        if self.tokenizer.eot is not None:  # a border between documents is no text to guess
            allowed &= tokens != self.tokenizer.eot
        positions, targets = self.mask(tokens, allowed, indices, seed, rate)
        inputs = dict(tokens=tokens, segments=segments, lengths=lengths, positions=positions, targets=targets)
        if options.document_mask:  # [CLS] belongs to the first one, [SEP] to the last
            places = a_begin[:, None] + np.clip(column - 1, 0, a[:, None] - 1)
            inputs["documents"] = document_numbers(text.documents, places)
        counts = {"mlm": int((targets != IGNORE).sum())}
        if options.nsp:
            inputs["unrelated"] = unrelated.astype(np.int64)
            counts["nsp"] = B
        inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return Batch(inputs, counts, int(lengths.sum()))

    def mask(self, tokens: np.ndarray, allowed: np.ndarray, indices: np.ndarray, seed: int, rate: float):
        """Masks in tokens (B, T), where allowed (B, T) is True; returns the positions and what stood there, (B, M).

        The share `rate` of each row's text is to be predicted: 80 % become [MASK], 10 % another token, 10 % stay.
        """
        B, T = tokens.shape
        most = self.most(rate)  # (M)
        count = np.maximum(1, np.rint(rate * allowed.sum(1))).astype(np.int64)  # (B,)
        draw = uniform(mix(seed, 2), indices, T)  # (B, T): the lowest numbers are masked
        if self.options.whole_word:  # all tokens of a word have the number of its first
            goes_on = self.tokenizer.continues_word(tokens) & allowed
            first = np.maximum.accumulate(np.where(goes_on, 0, np.arange(T)), axis=1)
            draw = np.take_along_axis(draw, first, axis=1)
        order = np.argsort(np.where(allowed, draw, 2.0), axis=1, kind="stable")[:, : most + 1]
        chosen = np.arange(most + 1) < count[:, None]
        if self.options.whole_word:  # the word that count would cut is left out, unless it is the only one
            word = np.take_along_axis(first, order, axis=1)
            cut = word == np.take_along_axis(word, count[:, None], axis=1)
            chosen &= ~cut | (word == word[:, :1])
        order, chosen = order[:, :most], chosen[:, :most]  # (B, M)
        there = np.take_along_axis(tokens, order, axis=1)
        targets = np.where(chosen, there, IGNORE)
        kind, which = uniform(mix(seed, 3), indices, 2 * order.shape[1]).reshape(B, 2, -1).transpose(1, 0, 2)
        other = self.ordinary[(which * len(self.ordinary)).astype(np.int64)]
        shown = np.where(kind < 0.8, self.tokenizer.mask, np.where(kind < 0.9, other, targets))
        np.put_along_axis(tokens, order, np.where(chosen, shown, there), axis=1)
        return np.where(chosen, order, order[:, :1]), targets  # filled up with the first place, without a target

    @torch.no_grad()
    def sample(self, model: Model, n: int = 4) -> str:
        """Of the first validation texts, one masked place each: what stood there, and the three likeliest tokens."""
        inputs, lines = next(self.validation(n)).to(next(model.parameters()).device).inputs, []
        probabilities, guesses = model.answer(inputs).float().softmax(-1).topk(3)  # (B, M, 3)
        for row in range(len(guesses)):
            ids, positions, targets = (inputs[name][row] for name in ("tokens", "positions", "targets"))
            chosen = targets >= 0  # (M,)
            at = int((chosen & (ids[positions] == self.tokenizer.mask)).int().argmax())
            ids[positions[chosen]] = targets[chosen]
            place = int(positions[at])
            first, last = max(1, place - 12), min(int(inputs["lengths"][row]), place + 13)
            before, after = (self.readable(part) for part in (ids[first:place], ids[place + 1 : last]))
            likeliest = zip(guesses[row, at].tolist(), probabilities[row, at].tolist(), strict=True)
            named = ", ".join(f"{show_token(self.tokenizer, token)} {p:.2f}" for token, p in likeliest)
            lines.append(f"{before} [MASK] {after}\n    {named}; it was {show_token(self.tokenizer, int(targets[at]))}")
        return "\n".join(lines)

    def readable(self, ids: Tensor) -> str:
        return " ".join(self.tokenizer.decode([i for i in ids.tolist() if i != self.tokenizer.cls]).split())

    def example(self) -> list[str]:
        """The validation text's first words, one of them masked."""
        begin = int(self.valid.begin(np.zeros(1, np.int64), np.zeros(1, np.int64))[0])
        words = self.tokenizer.decode(self.valid.tokens[begin : begin + 60].tolist()).split()[:8]
        return [" ".join([*words[:2], "[MASK]", *words[3:]])]


def log_frequencies(tokens: np.ndarray, tokenizer: Tokenizer) -> Tensor:
    """(V,) the logarithm of each token's share of a text."""
    some = tokens[:: max(1, len(tokens) // 10_000_000)]  # ten millions tell the frequencies
    counts = np.bincount(some, minlength=tokenizer.vocab_size) + 1.0  # none is impossible
    t = tokenizer
    counts[[i for i in (t.pad, t.cls, t.sep, t.mask, t.eot) if i is not None]] = 1e-9  # never masked, but [UNK] is
    return torch.from_numpy(np.log(counts / counts.sum()))


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """A token as a person reads it: without spaces around it, but what cannot be seen in quotation marks."""
    text = tokenizer.decode([token]).strip(" ")
    return text if text and text.isprintable() else repr(text)


class Sentences:
    """Where sentences and documents begin in a token file; all questions are answered for B places at once."""

    def __init__(self, file: TokenFile, tokenizer: Tokenizer):
        self.tokens, self.starts, self.documents = file.tokens, file.sentences, file.documents
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
