"""Text <-> token ids: byte-level BPE (our trainer, tiktoken's encoder), and opening a tokenizer of any kind.

BPE (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units") starts from single
symbols and again and again turns the most frequent pair of neighbours into one new symbol. GPT-2 (Radford et
al. 2019, §2.2) starts from the 256 bytes, so every text has a code and nothing is unknown, and first splits
the text into words, numbers, signs and spaces, so no token spans two of them.

Read `train_bpe` first, then `BPETokenizer`; the rest is splitting and opening. What all kinds share is in
tokenizer_base.py, WordPiece in wordpiece.py.
"""

import base64
import contextlib
import functools
import hashlib
import heapq
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from mini.errors import UserError
from mini.storage import read_json
from mini.text.tokenizer_base import (
    END_OF_TEXT,
    MAX_GAP,
    SPACE,
    ByteTokenizer,
    Tokenizer,
    blocks,
    character_classes,
    to_bytes,
)
from mini.text.wordpiece import WordPieceTokenizer, load_vocab, load_wordpiece

# GPT-2's split as tiktoken writes it: the same pieces as from the published code, but faster.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


# ---------------------------------------------------------------- splitting
@functools.cache
def gpt2_splitter() -> re.Pattern:
    r"""GPT2_PATTERN for Python's `re`, which has no \p{L} (letters) and \p{N} (numbers).

    Python's \w is exactly the letters, the numbers and "_", so a list of the numbers gives both. The pieces
    are tiktoken's, except for characters newer than this Python's Unicode tables.
    """
    numbers = "".join(characters for category, characters in character_classes().items() if category[0] == "N")
    pattern = GPT2_PATTERN
    for theirs, ours in [
        (r"[^\s\p{L}\p{N}]", rf"(?:[^\w{SPACE}]|_)"),
        (r"\p{L}", rf"(?:[a-zA-Z]++|[^\W_{numbers}]++)"),  # [a-zA-Z] adds nothing but speed
        (r"\p{N}", f"[{numbers}]"),
        (r"\s", f"[{SPACE}]"),
        (r"\S", f"[^{SPACE}]"),
    ]:
        pattern = pattern.replace(theirs, ours)
    return re.compile(pattern)


# ---------------------------------------------------------------- training
def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = True, added: int = 0) -> "BPETokenizer":
    """Learns a byte-level BPE vocabulary from text (Sennrich et al. 2016, Algorithm 1).

    vocab_size counts everything: the 256 bytes (ids 0..255), the merges in the order they are learned, and
    <|endoftext|> (the last id). Of equally frequent pairs the one with the smaller ids is merged, so the same
    text gives the same vocabulary, in whatever order it comes. Memory grows with the number of different
    words, not with the text. Raises UserError if vocab_size is below 257 or more than the text can yield; added
    tokens, which come on top of vocab_size, are counted in its message.
    """
    if vocab_size < 257:
        least = f"must be at least {257 + added} (256 bytes, {END_OF_TEXT} ..)"
        raise UserError(f"--vocab_size {vocab_size + added}: {least}")
    hidden = None if progress else True  # None: tqdm shows itself on a terminal only
    # No merge crosses a piece, so one that occurs a thousand times is looked at once and counts thousandfold.
    pieces: Counter[str] = Counter()
    with tqdm(desc="counting words", unit=" chars", unit_scale=True, delay=1, disable=hidden) as bar:
        for text in texts:
            for block in blocks(text):
                pieces.update(gpt2_splitter().findall(block))
                bar.update(len(block))
    # All pieces lie one after another in flat arrays, at first a byte per place. `before` and `after` link
    # the places of a piece, -1 at its ends: a merge keeps the left place, unlinks the right, moves nothing.
    symbol, times, before, after = array("i"), array("q"), array("q"), array("q")
    for piece, n in pieces.items():
        start, data = len(symbol), to_bytes(piece)
        symbol.extend(data)
        times.extend([n] * len(data))
        before.extend([-1, *range(start, start + len(data) - 1)])
        after.extend([*range(start + 1, start + len(data)), -1])
    # How often each pair of neighbours occurs, and at which (left) places. No place is ever taken out of
    # `where`: one that has lost the pair is recognised when its turn comes.
    count: dict[tuple[int, int], int] = defaultdict(int)
    where: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, j in enumerate(after):
        if j >= 0:
            pair = symbol[i], symbol[j]
            count[pair] += times[i]
            where[pair].append(i)
    # The heap's top is the most frequent pair. Merges lower the counts of other pairs without telling it: its
    # numbers are upper bounds, and a pair that comes out with too high a one goes back with the true one.
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]

    bar = tqdm(desc="learning merges", total=vocab_size - 257, unit="", delay=1, disable=hidden)
    while heap and len(tokens) < vocab_size - 1:
        n, pair = heapq.heappop(heap)
        if -n != count[pair]:
            if count[pair] > 0:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        # Never do two pairs spell the same bytes (ab+c, a+bc): what becomes one token does so everywhere.
        left, right = pair
        new = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        bar.update()
        grown = set()
        for i in where.pop(pair):  # from left to right, so aaa becomes aa a
            j = after[i]
            if j < 0 or symbol[i] != left or symbol[j] != right:
                continue
            h, k = before[i], after[j]  # h i j k becomes h i k
            symbol[i], symbol[j], after[i] = new, -1, k
            if h >= 0:
                count[symbol[h], left] -= times[i]
                count[symbol[h], new] += times[i]
                where[symbol[h], new].append(h)
                grown.add((symbol[h], new))
            if k >= 0:
                before[k] = i
                count[right, symbol[k]] -= times[i]
                count[new, symbol[k]] += times[i]
                where[new, symbol[k]].append(i)
                grown.add((new, symbol[k]))
        for pair in grown:
            if count[pair] > 0:  # in aaaa, aa+a comes and goes within one merge
                heapq.heappush(heap, (-count[pair], pair))
    bar.close()
    most = len(tokens) + 1
    if most < vocab_size:
        size, most = vocab_size + added, most + added
        raise UserError(f"--vocab_size {size}: this text yields only {most}; ask for that, or add text")
    return BPETokenizer({token: i for i, token in enumerate(tokens)}, {END_OF_TEXT: len(tokens)})


# ---------------------------------------------------------------- tokenizers
class BPETokenizer(Tokenizer):
    """Byte-level BPE as in GPT-2, encoded by tiktoken.

    ranks    {bytes: id}, all 256 single bytes among them; the lower its id, the earlier a token is merged
    pattern  how text is split before merging, in the dialect of Rust's fancy-regex. Long texts are cut between
             pieces of GPT-2's (see `blocks`), so another pattern should not join what that one parts.
    """

    kind, vocab_file = "bpe", "tokenizer.tiktoken"

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], pattern: str = GPT2_PATTERN):
        super().__init__(ranks.items(), special)
        self.ranks, self.pattern = ranks, pattern
        self.byte_ids = np.array([ranks[bytes([b])] for b in range(256)], np.uint32)
        parts = dict(pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        try:
            with contextlib.nullcontext() if pattern == GPT2_PATTERN else quiet():
                self.encoding = tiktoken.Encoding("mini", **parts)
                self.encoding.encode("a b")
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ValueError(f"the pattern {pattern[:40]!r} is none that tiktoken splits texts by") from None

    def remade(self, special: dict[str, int]) -> "BPETokenizer":
        return BPETokenizer(self.ranks, special, self.pattern)

    def encode_array(self, text: str | bytes) -> np.ndarray:
        data = to_bytes(text)
        try:
            stretches = [data.decode()]
        except UnicodeDecodeError:  # Python can decode a stray byte b as U+DC00 + b; there we split
            stretches = re.split("([\udc80-\udcff]+)", data.decode(errors="surrogateescape"))
        arrays = []
        for k, stretch in enumerate(stretches):
            if k % 2 == 0:  # text; while tiktoken is at it, other threads can run
                arrays += [self.encoding.encode_to_numpy(b, disallowed_special=()) for b in blocks(stretch)]
            else:  # what the split found: a token per byte
                stray = np.frombuffer(stretch.encode(errors="surrogateescape"), np.uint8)
                arrays.append(self.byte_ids[stray])
        return np.concatenate(arrays)

    def vocab_text(self) -> str:
        """The .tiktoken format: for each token, by rank, a line of its base64, a space, its rank."""
        lines = sorted((rank, base64.b64encode(token).decode()) for token, rank in self.ranks.items())
        return "".join(f"{token} {rank}\n" for rank, token in lines)

    def description(self) -> dict:
        checksum = hashlib.sha256(self.vocab_text().encode()).hexdigest()
        return super().description() | {"pattern": self.pattern, "ranks_sha256": checksum}


# ---------------------------------------------------------------- opening
def make_tokenizer(spec: str, texts: Callable, vocab_size: int, special: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that --tokenizer names, with these special tokens too.

    texts(), an iterable, and `vocab_size`, in which they are counted, are used only to train one ("bpe").
    """
    if spec == "bpe":
        made = train_bpe(texts(), vocab_size - len(special), added=len(special))
    elif spec == "bytes":
        made = ByteTokenizer()
    elif spec == "gpt2":
        made = download_gpt2()
    elif Path(spec).is_dir():
        made = load_tokenizer(spec)
    elif spec.endswith(".tiktoken"):
        ranks = load_ranks(spec)
        made = BPETokenizer(ranks, {END_OF_TEXT: max(ranks.values()) + 1})
    elif spec.endswith(".txt"):
        made = load_wordpiece(Path(spec))
    else:
        raise UserError(
            f"--tokenizer {spec}: no such tokenizer; possible are bpe, bytes, gpt2, a .tiktoken file, a WordPiece "
            "vocab.txt, the folder of a run, a folder with published weights of GPT-2 (vocab.json) or BERT (vocab.txt)"
        )
    return made.with_special(special)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in the folder of a run or of published GPT-2 or BERT weights. Raises UserError without one."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    saved = read_json(path) if path.is_file() else {}
    if "kind" in saved:  # if not, it is another program's: published folders often hold a file of this name
        return load_saved(path, saved)
    if (folder / "vocab.json").is_file():
        return load_published_gpt2(folder / "vocab.json", read_json(folder / "vocab.json"))
    if (folder / "vocab.txt").is_file():
        return load_wordpiece(folder / "vocab.txt")
    model = saved.get("model")
    if isinstance(model, dict) and "vocab" in model:  # "type" came later than the other
        if model.get("type") == "WordPiece" or "max_input_chars_per_word" in model:
            return load_wordpiece(path)
        return load_published_gpt2(path, model["vocab"])
    raise UserError(f"{folder}: no tokenizer: neither tokenizer.json, nor GPT-2's vocab.json, nor BERT's vocab.txt")


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


def load_saved(path: Path, saved: dict) -> Tokenizer:
    """What `Tokenizer.save` wrote; `saved` is the content of tokenizer.json."""
    try:
        if saved["kind"] == "bytes":
            tokenizer = ByteTokenizer(saved["special"])
        elif saved["kind"] == "bpe":
            ranks = load_ranks(path.with_name(BPETokenizer.vocab_file))
            tokenizer = BPETokenizer(ranks, saved["special"], saved["pattern"])
        elif saved["kind"] == "wordpiece":
            vocab = load_vocab(path.with_name(WordPieceTokenizer.vocab_file))
            tokenizer = WordPieceTokenizer(vocab, saved["lowercase"], saved["special"])
        else:
            known = "known are 'bytes', 'bpe' and 'wordpiece'"
            raise UserError(f"{path}: unknown kind of tokenizer {saved['kind']!r}; {known}")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); copy the run again") from None
    if tokenizer.description() != saved:
        unlike = f"does not fit the {tokenizer.vocab_file} beside it; copy both from one run"
        raise UserError(f"{path}: {unlike if tokenizer.vocab_file else 'damaged'}")
    return tokenizer


def load_ranks(path: str | Path) -> dict[bytes, int]:
    """Reads a .tiktoken file, {bytes: rank}. Raises UserError that names the wrong line."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it should be a .tiktoken ranks file") from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            entries.append((f"{path}:{number}", base64.b64decode(token, validate=True), int(rank)))
        except ValueError:
            shown = line[:40].decode(errors="replace")
            raise UserError(f"{path}:{number}: {shown!r} should be 'base64-of-token rank'") from None
    return checked_ranks(entries, path)


def load_published_gpt2(path: Path, vocab: dict[str, int]) -> BPETokenizer:
    """The vocabulary published with GPT-2, {token: id}. Its ids are ranks: they follow the order of its merges."""
    # A printable byte stands for itself, the others are U+0100, U+0101, ..: bytes_to_unicode in OpenAI's encoder.py.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    try:
        entries = [(str(path), bytes(byte[c] for c in token), i) for token, i in vocab.items()]
    except (KeyError, AttributeError) as error:
        raise UserError(f"{path}: not GPT-2's {{token: id}} ({type(error).__name__}: {error})") from None
    ranks = checked_ranks(entries, path)
    eot = ranks.pop(END_OF_TEXT.encode(), None)
    return BPETokenizer(ranks, {} if eot is None else {END_OF_TEXT: eot})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what another language says on standard error, as Rust does of a panic before we can."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def checked_ranks(entries: list[tuple[str, bytes, int]], path: str | Path) -> dict[bytes, int]:
    """{token: rank} from (place, token, rank). Raises UserError unless they give every text one code."""
    ranks, taken = {}, set()
    for place, token, rank in entries:
        if type(rank) is not int or not 0 <= rank < len(entries) + MAX_GAP:
            raise UserError(f"{place}: token {token!r} has rank {str(rank)[:40]}; of {len(entries):,} that is too high")
        if token in ranks or rank in taken:
            raise UserError(f"{place}: token {token!r} or its rank {rank} is there for the second time")
        ranks[token] = rank
        taken.add(rank)
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise UserError(f"{path}: no token for the byte 0x{missing[0]:02x}; a byte-level vocabulary has all 256")
    return ranks


def download_gpt2() -> BPETokenizer:
    """GPT-2's own, from tiktoken's cache or the network. Raises UserError if neither has it."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
        instead = "pass a .tiktoken ranks file with --tokenizer FILE instead"
        raise UserError(f"--tokenizer gpt2: cannot be downloaded ({type(error).__name__}); {instead}") from None
    eot = encoding.eot_token
    return BPETokenizer({encoding.decode_single_token_bytes(i): i for i in range(eot)}, {END_OF_TEXT: eot})
