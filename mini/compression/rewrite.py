"""Labelled texts, written anew: words replaced by what a masked language model would say in their places.

TinyBERT's augmentation (Jiao et al. 2020, §3.2, algorithm 1): of each text `copies` more, in which each word goes with
probability `rate`, its successor drawn from the `top` likeliest at its place. Here every seventh word is masked at a
time, about as in pretraining, instead of one; and words of several tokens, for which TinyBERT asks GloVe, stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mini.flags import Checked, UserError, option
from mini.model.transformer import Model
from mini.storage import write_text
from mini.tasks.inputs import pad, text_ids
from mini.tasks.order import mix
from mini.text.rows import as_file, read_rows, text_columns
from mini.text.tokenizer import Tokenizer
from mini.training.devices import autocast, pick_dtype, progress_bar

TURNS = 7  # masked copies of a text, in each of which every seventh word is masked
BATCH = 16  # texts at a time


@dataclass
class RewriteConfig(Checked):
    """How many copies of a text, and how much of them is new."""

    copies: int = option(4, "of each text", low=1)
    rate: float = option(0.4, "share of the words that are replaced", low=0, high=1)
    top: int = option(15, "likeliest words from which one is drawn", low=1)
    seed: int = option(1, "of the draws", low=0, high=2**63 - 1)


def rewrite(source: Path, out: Path, model: Model, tokenizer: Tokenizer, options: RewriteConfig) -> int:
    """Writes a file like source, each row followed by its copies with the same label; returns the number of rows.

    model: a Bert with a head for masked tokens. Only the first max_len tokens of a text change.
    """
    if not word_tokens(tokenizer).any():
        raise UserError("no token of this tokenizer is a word: nothing can be replaced")
    found = read_rows(source, ["text", "label"], ("text_b",))
    names = text_columns(found)
    texts = [row[name] for _, row in found for name in names]
    copies = written_anew(model.eval(), tokenizer, texts, options)
    rows = []
    for _, row in found:
        variants = zip(*(next(copies) for _ in names), strict=True)
        rows += [row, *(row | dict(zip(names, variant, strict=True)) for variant in variants)]
    write_text(out, as_file(rows, out.suffix))
    return len(rows)


def written_anew(model: Model, tokenizer: Tokenizer, texts: list[str], options: RewriteConfig) -> Iterator[list[str]]:
    """For each text its copies."""
    words = word_tokens(tokenizer)
    with progress_bar(total=len(texts), desc="writing texts anew", unit="text", delay=2, leave=False) as bar:
        for first in range(0, len(texts), BATCH):
            chunk = texts[first : first + BATCH]
            ids, spans = zip(*map(tokenizer.encode_with_offsets, chunk), strict=True)
            rows = [text_ids(tokenizer, model.config.max_len, row.tolist())[0] for row in ids]
            for i, likely in enumerate(candidates(model, tokenizer, rows, words, options.top)):
                likely = {tuple(spans[i][place - 1]): tokens for place, tokens in likely.items()}  # [CLS] is before
                keys = (mix(options.seed, first + i, copy) for copy in range(options.copies))
                yield [replaced(chunk[i], tokenizer, likely, options.rate, key) for key in keys]
                bar.update()


def word_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) True for tokens that are a word, or the beginning of one, as they stand in a text."""
    special = set(tokenizer.special.values())
    text = ["" if i in special else token.decode(errors="replace") for i, token in enumerate(tokenizer.table)]
    if tokenizer.lossless:  # a word holds the space before it
        return np.array([t[:1] == " " and t[1:].isalpha() for t in text])
    return np.array([t.isalpha() for t in text]) & ~tokenizer.word_edges[1]


@torch.inference_mode()
def candidates(
    model: Model, tokenizer: Tokenizer, rows: list[list[int]], words: np.ndarray, top: int
) -> list[dict[int, list[int]]]:
    """For each text {place of a word of one token: the likeliest words there}."""
    device = next(model.parameters()).device
    places = []
    for row in rows:
        ids = np.array(row)
        goes_on = np.append(tokenizer.continues_word(ids)[1:], False)  # into the next token
        places.append(np.flatnonzero(words[ids] & ~goes_on).tolist())
    found: list[dict[int, list[int]]] = [dict.fromkeys(row) for row in places]  # in this order
    others = torch.from_numpy(~words).to(device)  # (V,)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = pad(rows, tokenizer.pad).to(device)  # (B, T)
    for turn in range(TURNS):
        mine = [row[turn::TURNS] for row in places]
        if not any(mine):
            continue
        masked, positions = tokens.clone(), pad([p or [0] for p in mine], 0).to(device)  # (B, T), (B, M)
        for b, chosen in enumerate(mine):
            masked[b, chosen] = tokenizer.mask
        with autocast(device, pick_dtype("auto", device)):
            logits = model.predict(masked, lengths, positions)[0].float()[..., : len(words)]  # (B, M, V)
        best = logits.masked_fill(others, -torch.inf).topk(min(top, int(words.sum()))).indices.tolist()
        for b, chosen in enumerate(mine):
            found[b] |= {place: best[b][m] for m, place in enumerate(chosen)}
    return found


def replaced(text: str, tokenizer: Tokenizer, likely: dict[tuple[int, int], list[int]], rate: float, key: int) -> str:
    """The text with some of its words exchanged; likely: {[start, end) in the text: tokens}. Only key draws."""
    rng = np.random.Generator(np.random.Philox(key=key))
    parts, done = [], 0
    for (start, end), tokens in likely.items():
        if rng.random() < rate:
            parts += [text[done:start], tokenizer.decode([tokens[rng.integers(len(tokens))]])]
            done = end
    return "".join([*parts, text[done:]])
