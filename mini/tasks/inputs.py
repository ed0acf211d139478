"""Texts as a model takes them: marked, cut to its length, padded."""

import numpy as np
import torch
from torch import Tensor

from mini.errors import UserError
from mini.text.tokenizer import Tokenizer


def text_ids(tokenizer: Tokenizer, max_len: int, *texts: list[int]) -> tuple[list[int], list[int]]:
    """[CLS] text [SEP], or [CLS] text [SEP] text_b [SEP], and the segment of each: 0, or 1 from text_b on.

    They are cut to max_len from the end of the longer text. Without [CLS] and [SEP], <|endoftext|> is in their places.
    """
    first, last = (tokenizer.eot, tokenizer.eot) if tokenizer.cls is None else (tokenizer.cls, tokenizer.sep)
    parts = [text[:max_len] for text in texts]
    while sum(map(len, parts)) > text_room(max_len, len(parts)):
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


def pad_texts(rows: list[tuple[list[int], list[int]]], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """What text_ids gives, as tokens and segments (B, T), padded at the right, and lengths (B,)."""
    filling = next(i for i in (tokenizer.pad, tokenizer.eot, 0) if i is not None)
    return {
        "tokens": pad([ids for ids, _ in rows], filling),
        "segments": pad([segments for _, segments in rows], 0),
        "lengths": torch.tensor([len(ids) for ids, _ in rows]),
    }


def text_room(max_len: int, n_texts: int) -> int:
    """The tokens of text that stay beside what marks n_texts texts."""
    return max_len - n_texts - 1


def cut_note(where: str, lengths: list[int], n_texts: int, max_len: int) -> list[str]:
    """A line about texts (or pairs) of these lengths in tokens that max_len cuts; none if it cuts none."""
    room = text_room(max_len, n_texts)
    if not (cut := [length for length in lengths if length > room]):
        return []
    longest = f"the longest has {max(cut):,} tokens"
    return [f"{where}: {len(cut):,} of {len(lengths):,} texts are cut to {room} tokens ({longest})"]
