"""WordPiece, the tokenizer of BERT: words and signs, then the longest pieces of them that are in a vocabulary.

The original is tokenization.py of github.com/google-research/bert (Devlin et al. 2019, §3.1), which goes through a
text character by character. Here patterns find the words of a block of text, and a word's ids are worked out once
and remembered: the same ids, in less time. Read `patterns` and `Words` first; the rest is offsets, saving, opening.
"""

import functools
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mini.errors import UserError
from mini.storage import read_json
from mini.text.tokenizer_base import Tokenizer, blocks, character_classes

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD = 100  # characters; a longer word is unknown (100 at BERT's release and in transformers, 200 later)
CACHED_WORDS = 2**17  # some 30 MB
# Each of these characters is a word. The alphabets of Japanese and Korean are not among them.
CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f"


@functools.cache
def patterns() -> tuple[re.Pattern, re.Pattern]:
    """What is dropped from a text (control characters but tab and line ends), and what is then a word or a sign.

    Signs are Unicode's punctuation and all of ASCII that is neither letter nor digit: "$" and "~" too.
    """
    classes = character_classes()
    signs = r"!-/:-@\[-`{-~" + CJK + "".join(classes[category] for category in classes if category[0] == "P")
    dropped = re.compile(rf"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd{classes['Cf']}]+")
    # The first of the three finds nothing that the last would not, but faster.
    return dropped, re.compile(rf"[A-Za-z0-9]++(?=[ -~\n])|[^\s{signs}]++|[{signs}]")


class Words(dict[str, tuple[int, ...]]):
    """{word: its ids}, worked out when first asked for. Emptied when full, so that memory does not grow."""

    def __init__(self, vocab: dict[str, int], unknown: int, lowercase: bool):
        self.vocab, self.unknown, self.lowercase = vocab, unknown, lowercase
        self.longest = max(map(len, vocab), default=0)

    def __missing__(self, word: str) -> tuple[int, ...]:
        letters = "".join(word[k] for k in self.kept(word))
        ids = self.pieces(letters) if len(letters) <= MAX_WORD else (self.unknown,)
        if len(word) <= MAX_WORD:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def kept(self, word: str) -> list[int]:
        """Which of its characters are kept: all, but in lower case no accents (Mn: marks that take no space)."""
        return [k for k, c in enumerate(word) if not (self.lowercase and unicodedata.category(c) == "Mn")]

    def pieces(self, word: str) -> tuple[int, ...]:
        """Again and again the longest piece that the vocabulary has; [UNK] if at some place it has none."""
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(min(len(word), start + self.longest), start, -1):
                if (i := self.vocab.get(prefix + word[start:end])) is not None:
                    ids.append(i)
                    start = end
                    break
            else:
                return (self.unknown,)
        return tuple(ids)


class WordPieceTokenizer(Tokenizer):
    """BERT's tokenizer.

    vocab      token of each id; "##x" is an x that goes on with a word. Special tokens stand in it like others.
    lowercase  whether letters are made small and lose their accents ("uncased")
    special    {name: id}; of themselves those five that BERT needs
    """

    kind, vocab_file, lossless = "wordpiece", "vocab.txt", False

    def __init__(self, vocab: list[str], lowercase: bool = True, special: dict[str, int] | None = None):
        ids = {token: i for i, token in enumerate(vocab)}
        special = special or {name: ids[name] for name in SPECIAL}
        super().__init__(((token.removeprefix("##").encode(), i) for token, i in ids.items()), special)
        self.vocab, self.lowercase = vocab, lowercase
        text = {token: i for token, i in ids.items() if i not in special.values()}
        self.ids = Words(text, special["[UNK]"], lowercase)

    def with_special(self, names: Sequence[str]) -> "WordPieceTokenizer":
        """The same tokenizer with those special tokens that it lacks: one that is in the vocabulary keeps its id."""
        vocab = [*self.vocab, *(name for name in dict.fromkeys(names) if name not in self.vocab)]
        return WordPieceTokenizer(vocab, self.lowercase, self.special | {name: vocab.index(name) for name in names})

    def normalized(self, text: str) -> str:
        """The text in which words are found, with their accents still; a word loses them in `Words`."""
        text = patterns()[0].sub("", text)
        return unicodedata.normalize("NFD", text.lower()) if self.lowercase else text

    def encode_array(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            text = text.decode(errors="ignore")  # as the original does
        arrays = []
        for block in blocks(text, space=" \n"):
            words = patterns()[1].findall(self.normalized(block))
            ids = itertools.chain.from_iterable(map(self.ids.__getitem__, words))
            arrays.append(np.fromiter(ids, np.uint32))
        return np.concatenate(arrays)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """As for other tokenizers. An accent belongs to the letter before it, and a word to its [UNK]."""
        ids, spans = [], []
        normalized, places = self.normalized(text), self.places(text)
        for found in patterns()[1].finditer(normalized):
            word = self.ids[found[0]]
            kept = [found.start() + k for k in self.ids.kept(found[0])]
            lengths = [len(self.table[i].decode()) for i in word]
            starts = [kept[n] for n in itertools.accumulate(lengths[:-1], initial=0)] if word else []
            for start, end in itertools.pairwise([*starts, found.end()]):
                spans.append((min(places[start:end]), max(places[start:end]) + 1))
            ids += word
        return np.array(ids, np.uint32), np.array(spans, np.int64).reshape(-1, 2)

    def places(self, text: str) -> list[int]:
        """For each character of `normalized(text)` the one of `text` that it is made of."""
        dropped = {k for found in patterns()[0].finditer(text) for k in range(*found.span())}
        places = [k for k in range(len(text)) if k not in dropped]
        if not self.lowercase or text.isascii():
            return places
        # NFD takes a character apart, and sorts the accents behind a letter by class (UAX #15, D109).
        parts = [(unicodedata.combining(c), k) for k in places for c in unicodedata.normalize("NFD", text[k].lower())]
        letters = itertools.accumulate(accent == 0 for accent, _ in parts)
        return [k for _, _, k in sorted((n, *part) for n, part in zip(letters, parts, strict=True))]

    @functools.cached_property
    def word_edges(self) -> np.ndarray:
        plain = np.ones(self.vocab_size, bool)
        plain[list(self.special.values())] = False
        return np.stack([plain, [token.startswith("##") for token in self.vocab]])

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Words with spaces between them. White space, accents and capitals do not come back."""
        for n, i in enumerate(ids):
            text = self.token_bytes(i).decode()
            yield text if n == 0 or self.word_edges[1, i] else f" {text}"

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.decode_stream(ids)).encode()

    def vocab_text(self) -> str:
        return "".join(f"{token}\n" for token in self.vocab)

    def description(self) -> dict:
        checksum = hashlib.sha256(self.vocab_text().encode()).hexdigest()
        return super().description() | {"lowercase": self.lowercase, "vocab_sha256": checksum}


# ---------------------------------------------------------------- opening
def load_wordpiece(path: Path) -> WordPieceTokenizer:
    """A published vocabulary: vocab.txt, a line per token, or tokenizer.json, where newer folders have it too.

    Whether it is for lower case says tokenizer_config.json beside it, or else tokenizer.json, or else: it is.
    Raises UserError for a file that is not that, or asks for a step that the original does not have.
    """
    beside = [path.with_name(name) for name in ("tokenizer.json", "tokenizer_config.json")]
    fast, config = (read_json(file) if file.is_file() else {} for file in beside)
    settings = (fast.get("normalizer") or fast) | config
    lowercase = settings.get("do_lower_case", settings.get("lowercase", True))
    known = dict.fromkeys(("do_lower_case", "lowercase"), (True, False)) | {"strip_accents": (None, lowercase)}
    known |= dict.fromkeys(("clean_text", "handle_chinese_chars", "tokenize_chinese_chars"), (True,))
    for name, values in (known | {"type": ("BertNormalizer",)}).items():
        if settings.get(name, values[0]) not in values:
            raise UserError(f"{path}: its settings have {name} {settings[name]!r}; mini only knows BERT's own steps")
    if path.suffix == ".txt":
        return WordPieceTokenizer(load_vocab(path), lowercase)
    try:
        ids = fast["model"]["vocab"]
        vocab = sorted(ids, key=ids.get)
        if [ids[token] for token in vocab] != list(range(len(vocab))):
            raise ValueError(f"ids are not 0..{len(vocab) - 1}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not WordPiece's {{token: id}} ({error})") from None
    return WordPieceTokenizer(checked_vocab(vocab, path), lowercase)


def load_vocab(path: Path) -> list[str]:
    """Reads a vocab.txt: line n is token n - 1. Raises UserError that names the wrong line."""
    should = "it should be a WordPiece vocabulary, a token per line"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {should}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; {should}") from None
    return checked_vocab([line.strip(" \t\r") for line in text.removesuffix("\n").split("\n")], path)


def checked_vocab(vocab: list[str], path: Path) -> list[str]:
    """The same. Raises UserError where a token is there twice, or one that BERT needs is not."""
    lines: dict[str, int] = {}
    for line, token in enumerate(vocab, 1):
        if lines.setdefault(token, line) != line:
            raise UserError(f"{path}:{line}: {token!r} is there already, in line {lines[token]}; a token has one line")
    for name in SPECIAL:
        if name not in lines:
            raise UserError(f"{path}: no {name}; the vocabulary of a BERT has {', '.join(SPECIAL)}")
    return vocab
