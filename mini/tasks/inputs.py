"""Texts as a model takes them: marked, cut to its length, padded."""

import numpy as np
import torch
from torch import Tensor

from mini.errors import UserError
from mini.text.tokenizer import Tokenizer
from mini.text.tokens import TokenFile


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


def pad(rows: list[list[int]], filling: int, most: int = 0) -> Tensor:
    """Rows of different lengths -> (B, T), filled up at the right.

    most: T is one of few lengths, up to so many: libraries keep code and memory for each (docs/log.md).
    """
    width = max(map(len, rows))
    if width < most:  # to five bits: a sixteenth more at the most
        step = 1 << max(0, width.bit_length() - 5)
        width = min(most, -(-width // step) * step)
    out = np.full((len(rows), width), filling, dtype=np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(out)


def pad_texts(rows: list[tuple[list[int], list[int]]], tokenizer: Tokenizer, most: int) -> dict[str, Tensor]:
    """What text_ids gives, as tokens and segments (B, T), padded as pad() does it, and lengths (B,)."""
    filling = next(i for i in (tokenizer.pad, tokenizer.eot, 0) if i is not None)
    return {
        "tokens": pad([ids for ids, _ in rows], filling, most),
        "segments": pad([segments for _, segments in rows], 0, most),
        "lengths": torch.tensor([len(ids) for ids, _ in rows]),
    }


def check_documents(text: TokenFile) -> None:
    """Raises UserError for a text that has no borders of documents to mask."""
    if len(text.documents) < 2:
        raise UserError("--document_mask: the text is one document; give more files, or a --separator of documents")


def document_numbers(starts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Of which document, by where each starts in a text, the tokens at places are; as places."""
    return np.searchsorted(starts, places.astype(np.uint64), "right")  # of one type: else numpy copies starts


def text_room(max_len: int, n_texts: int) -> int:
    """The tokens of text that stay beside what marks n_texts texts."""
    return max_len - n_texts - 1


def cuts(lengths: list[int], rooms: list[int]) -> dict[str, int]:
    """What texts of these lengths in tokens lose where each has so much room."""
    lost = [max(0, length - room) for length, room in zip(lengths, rooms, strict=True)]
    return {"texts": len(lengths), "cut": sum(map(bool, lost)), "tokens": sum(lengths), "lost": sum(lost)}


def cut_note(where: str, what: str, cut: dict[str, int]) -> list[str]:
    """A line about what is cut, such as "texts are cut to 510 tokens"; none if nothing is."""
    if not cut["cut"]:
        return []
    share = f"{cut['lost']:,} of all {cut['tokens']:,} tokens are not read ({cut['lost'] / cut['tokens']:.1%})"
    return [f"{where}: {cut['cut']:,} of {cut['texts']:,} {what}; {share}"]


def text_cuts(where: str, lengths: list[int], n_texts: int, max_len: int) -> tuple[dict[str, int], list[str]]:
    """What max_len takes from texts, or pairs (n_texts 2), of these lengths; and the line about it."""
    room = text_room(max_len, n_texts)
    cut = cuts(lengths, [room] * len(lengths))
    return cut, cut_note(where, f"texts are cut to {room} tokens", cut)
