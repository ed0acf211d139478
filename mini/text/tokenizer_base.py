"""What all tokenizers share, and the simplest of them: plain bytes."""

import codecs
import functools
import hashlib
import itertools
import json
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mini.errors import UserError
from mini.storage import write_json, write_text

END_OF_TEXT = "<|endoftext|>"
# Unicode's White_Space, which is tiktoken's \s. Python's \s has four control characters (x1c-x1f) more.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
BLOCK = 100_000  # characters
MAX_GAP = 2**16  # ids that may stay unused: more mean a damaged file
WORD_BYTES = {b for b in range(256) if b >= 0x80 or chr(b).isalnum()}  # an accent or a character of any script too


# ---------------------------------------------------------------- text
@functools.cache
def character_classes() -> dict[str, str]:
    """For each category of Unicode ("Lu", "Nd", ..), its characters as ranges to stand in a [..] of `re`."""
    classes: dict[str, str] = defaultdict(str)
    for category, run in itertools.groupby(map(chr, range(sys.maxunicode + 1)), unicodedata.category):
        first, *rest = run
        classes[category] += f"{re.escape(first)}-{re.escape(rest[-1] if rest else first)}"
    return dict(classes)


def blocks(text: str, size: int = BLOCK, space: str = SPACE) -> list[str]:
    """Cuts a long text where a cut changes no piece: before a space that something else than space follows.

    A block is `size` characters and the rest of the word there, so a text of many MB needs little memory.
    It also spares tiktoken a million spaces before a word, where it fails ("Max stack size exceeded").
    """
    if len(text) <= size:
        return [text]
    return re.findall(rf"(?s).{{1,{size}}}.*?(?=[{space}][^{space}]|\Z)", text)


def to_bytes(text: str | bytes) -> bytes:
    """UTF-8. Half a surrogate pair, which a str can hold and UTF-8 cannot, becomes U+FFFD as in tiktoken."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# ---------------------------------------------------------------- tokenizers
class Tokenizer:
    """What all tokenizers share: the table of what each id stands for, decoding, saving.

    kind          "bytes", "bpe" or "wordpiece"
    vocab_file    the file beside tokenizer.json with vocab_text(), "" for a kind that needs none
    lossless      whether a text's tokens add up to the text; WordPiece drops white space, accents, ..
    vocab_size    ids are 0 .. vocab_size - 1
    special       {name: id} of the tokens that stand for no text
    eot           id of <|endoftext|>, or None; the same for cls, sep, mask, pad: [CLS], [SEP], [MASK], [PAD]
    byte_lengths  (vocab_size,) int64, bytes of text each token stands for (for bits per byte); 0 if special

    Each kind has encode_array(text): its ids, (T,) uint32. Special tokens' names in a text are plain text, and bytes
    need not be UTF-8; and remade(special), the same with other special tokens.
    """

    kind: str
    lossless = True
    vocab_file = ""

    def __init__(self, tokens: Iterable[tuple[bytes, int]], special: dict[str, int]):
        tokens = list(tokens)
        if not all(type(i) is int and 0 <= i < len(tokens) + MAX_GAP for i in special.values()):
            raise ValueError(f"special tokens have ids from 0 on, not much beyond the others: {str(special)[:80]}")
        self.special = dict(sorted(special.items(), key=lambda item: item[1]))
        self.eot = special.get(END_OF_TEXT)
        self.cls, self.sep, self.mask, self.pad = map(special.get, ("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
        self.vocab_size = max([*(i for _, i in tokens), *special.values()]) + 1
        self.table = [b""] * self.vocab_size  # an id that nothing has stays empty
        for token, i in [*tokens, *((name.encode(), i) for name, i in special.items())]:
            self.table[i] = token
        self.byte_lengths = np.array([len(token) for token in self.table], np.int64)
        self.byte_lengths[list(special.values())] = 0

    def with_special(self, names: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with those special tokens that it lacks, under the next free ids, in this order."""
        missing = [name for name in dict.fromkeys(names) if name not in self.special]
        return self.remade(self.special | {name: self.vocab_size + k for k, name in enumerate(missing)})

    def encode(self, text: str | bytes) -> list[int]:
        """What encode_array gives, as a list."""
        return self.encode_array(text).tolist()

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A text's ids, (T,) uint32, and the [start, end) characters of it each comes from, (T, 2) int64.

        A token that ends inside a character covers it, and so does the next.
        """
        ids = self.encode_array(text)
        ends = np.cumsum(self.byte_lengths[ids])
        # In UTF-8 a character's bytes but the first are 10xxxxxx. A whole surrogate pair in a str becomes one.
        character = np.cumsum(np.frombuffer(to_bytes(text), np.uint8) & 0xC0 != 0x80) - 1  # of each byte
        places = np.array([m.start() for m in re.finditer("(?s)[\ud800-\udbff][\udc00-\udfff]|.", text)] + [len(text)])
        first, last = character[ends - self.byte_lengths[ids]], character[ends - 1]
        return ids, np.stack([places[first], places[last + 1]], axis=1)

    @functools.cached_property
    def word_edges(self) -> np.ndarray:
        """(2, vocab_size) bool: may the token's word go on behind it; may the token go on with a word?"""
        special = set(self.special.values())
        table = [b"" if i in special else token for i, token in enumerate(self.table)]
        return np.array([[bool(t) and t[edge] in WORD_BYTES for t in table] for edge in (-1, 0)])

    def continues_word(self, ids: np.ndarray) -> np.ndarray:
        """(.., T) ids -> (.., T) bool: True where a token goes on with the word of the one before it."""
        behind, before = self.word_edges
        result = np.zeros(ids.shape, bool)
        result[..., 1:] = behind[ids[..., :-1]] & before[ids[..., 1:]]
        return result

    def token_bytes(self, i: int) -> bytes:
        """What one token stands for; a special token's name. Raises UserError for an id that is none."""
        if not 0 <= i < self.vocab_size:
            raise UserError(f"token {i}: this tokenizer has 0..{self.vocab_size - 1}; use the one it is from")
        return self.table[i]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """decode_bytes(encode(b)) == b for any bytes b, if lossless."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text; U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """`decode` piece by piece as tokens come. A token can end inside a character, a piece never does."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.token_bytes(i))
        yield decoder.decode(b"", final=True)

    def description(self) -> dict:
        """All that defines this tokenizer, as tokenizer.json holds it."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "special": self.special}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the description: equal if any text gets the same ids."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the vocab_file, if any, then tokenizer.json with its checksum. Same tokenizer, same bytes."""
        if self.vocab_file:
            write_text(Path(folder) / self.vocab_file, self.vocab_text())
        write_json(Path(folder) / "tokenizer.json", self.description())


class ByteTokenizer(Tokenizer):
    """Every byte is a token, <|endoftext|> is 256: nothing to train, but long sequences."""

    kind = "bytes"

    def __init__(self, special: dict[str, int] | None = None):
        super().__init__([(bytes([b]), b) for b in range(256)], special or {END_OF_TEXT: 256})

    def remade(self, special: dict[str, int]) -> "ByteTokenizer":
        return ByteTokenizer(special)

    def encode_array(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(to_bytes(text), np.uint8).astype(np.uint32)
