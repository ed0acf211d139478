"""Text as numbers, in a folder that is mapped into memory, not read: what training draws its batches from.

    train.tokens     the token ids one after another: uint16, or uint32 where the vocabulary is over 65,536
    train.documents  where in train.tokens each document starts: uint64
    train.sentences  where each sentence starts: uint64; the start of a document is always one
    valid.*          the same for validation
    meta.json        counts and checksums. The tokenizer's own files stand beside it.

All numbers are little-endian. A tokenizer's end-of-text token, if it has one, stands *before* each document,
as its first: so that every byte of text, the first too, is predicted from something.
"""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mini.flags import UserError, from_dict
from mini.storage import atomic_folder, locked, read_json, sha256, write_json, write_text
from mini.text.corpus import DataConfig, TextSplit, fingerprint, open_corpus
from mini.text.fetch import cache_folder
from mini.text.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

FORMAT = "mini tokens 2"
SPLITS, KINDS = ("train", "valid"), ("tokens", "documents", "sentences")
BPE_BYTES = 10_000_000  # of text, evenly spread over the corpus, are what a BPE is trained on
BATCH = 2**19  # bytes of text, of one document or many, that a thread encodes at a time
# Some text, encoded: its tokens, the places in them where documents and where sentences start, its bytes.
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray, int]
CONTEXT = 64  # bytes before a piece of text that are looked at to see whether a sentence ends there


@dataclass(frozen=True)
class TokenFile:
    """One split. Its arrays lie in files and take memory only where they are looked at."""

    tokens: np.ndarray  # (n_tokens,) uint16 or uint32
    documents: np.ndarray  # (n_documents,) uint64, the place in `tokens` where each document starts
    sentences: np.ndarray  # (n_sentences,) uint64, the same for sentences
    n_bytes: int  # of the text
    sha256: str  # of `tokens`


@dataclass
class Counts:
    """What meta.json says of a split."""

    n_tokens: int
    n_documents: int
    n_sentences: int
    n_bytes: int


@dataclass
class Splits:
    train: Counts
    valid: Counts


@dataclass
class Meta:
    """meta.json."""

    format: str
    dtype: str
    vocab_size: int
    splits: Splits
    source: str  # names the text, and the tokenizer
    sha256: dict[str, str]  # of every file


@dataclass(frozen=True)
class TokenFolder:
    path: Path
    train: TokenFile
    valid: TokenFile
    meta: Meta


def is_token_folder(path: str | Path) -> bool:
    return (Path(path) / "meta.json").is_file() and any((Path(path) / f"{name}.tokens").is_file() for name in SPLITS)


def open_tokens(path: str | Path) -> TokenFolder:
    """Opens a folder that `write_tokens` made. Raises UserError where it is none, or is not whole."""
    path = Path(path)
    if not is_token_folder(path):
        raise UserError(f"{path}: not a token folder; `python -m mini tokens FILE --out {path}` makes one")
    where = path / "meta.json"
    values = read_json(where)
    if values.get("format") != FORMAT or values.get("dtype") not in ("uint16", "uint32"):
        raise UserError(f"{where}: not of the format {FORMAT!r}; make the token folder anew")
    meta = from_dict(Meta, values, f"{where}: damaged, make the token folder anew")
    train, valid = (open_split(path / name, meta) for name in SPLITS)
    folder = TokenFolder(path, train, valid, meta)
    verify(folder)
    return folder


def verify(folder: TokenFolder) -> None:
    """Raises UserError where a file is not what was written; looks at all of them once, and when one was touched."""
    path, sums = folder.path, folder.meta.sha256
    if missing := {"tokenizer.json", *(f"{s}.{kind}" for s in SPLITS for kind in KINDS)} - sums.keys():
        raise UserError(f"{path / 'meta.json'}: no checksum of {min(missing)}: delete {path}, and make it anew")
    files = [path / "meta.json", *(path / name for name in sums)]
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    key = hashlib.sha256(str([str(path.resolve()), seen]).encode()).hexdigest()
    remembered = cache_folder() / "verified" / key[:32]
    if remembered.exists():
        return
    checked = os.environ.get("MINI_UNCHECKED") != "1"
    bar = tqdm(sums.items(), desc=f"checking {path.name}", delay=2, leave=False, unit="file")
    for name, checksum in bar if checked else ():
        if Path(name).name != name or not (path / name).is_file() or sha256(path / name) != checksum:
            raise UserError(f"{path / name}: damaged, or of another folder: delete {path}, and make it anew")
    for split in (folder.train, folder.valid):
        if len(split.tokens) and int(split.tokens.max()) >= folder.meta.vocab_size:
            raise UserError(f"{path}: tokens beyond its vocabulary of {folder.meta.vocab_size:,}; make it anew")
        for places in (split.documents, split.sentences):
            if len(places) and (int(places[-1]) >= len(split.tokens) or (places[1:] < places[:-1]).any()):
                raise UserError(f"{path}: documents or sentences that begin beyond its text; make it anew")
    with contextlib.suppress(OSError):  # then it is looked at again
        if checked:
            write_text(remembered, "")


def open_split(path: Path, meta: Meta) -> TokenFile:
    counts = getattr(meta.splits, path.name)
    tokens = map_file(path.with_suffix(".tokens"), meta.dtype, counts.n_tokens)
    documents = map_file(path.with_suffix(".documents"), "uint64", counts.n_documents)
    sentences = map_file(path.with_suffix(".sentences"), "uint64", counts.n_sentences)
    return TokenFile(tokens, documents, sentences, counts.n_bytes, meta.sha256.get(f"{path.name}.tokens", ""))


def map_file(path: Path, dtype: str, n: int) -> np.ndarray:
    dtype = np.dtype(dtype).newbyteorder("<")
    expected = n * dtype.itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise UserError(f"{path}: {size:,} bytes instead of {expected:,}; make the token folder anew")
    return np.memmap(path, dtype, "r") if n else np.empty(0, dtype)  # an empty file cannot be mapped


# ---------------------------------------------------------------- from --data
def prepare_tokens(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None, given: set[str] = frozenset(),
                   special: Sequence[str] = ()) -> tuple[TokenFolder, Tokenizer]:  # fmt: skip
    """The corpus of --data as tokens: opened if it is a token folder, taken from the cache, or made now.

    tokenizer: that of the run to start from, if any. given: flags of the command line, of which a token folder
    refuses those that come too late for it. special: tokens that the model needs beside text.
    """
    if is_token_folder(config.data):
        if late := given & {"tokenizer", "vocab_size", "valid", "valid_fraction", "separator", "errors"}:
            raise UserError(f"--{min(late)}: {config.data} is made of tokens already; make it anew with that flag")
        made_with = load_tokenizer(config.data).with_special(special)
        if tokenizer and tokenizer.fingerprint != made_with.fingerprint:
            raise UserError(f"{config.data} was made with another tokenizer than the run of --init has")
        return open_tokens(config.data), made_with
    tokenizer = tokenizer or ready_tokenizer(config, special)
    path = cache_folder() / FORMAT.replace(" ", "-") / source_name(config, vocab_size, tokenizer, special)
    with contextlib.suppress(UserError):  # not there, or damaged
        return open_tokens(path), load_tokenizer(path)
    with locked(path, wait=True):  # two runs that need the same text for the first time
        with contextlib.suppress(UserError):
            return open_tokens(path), load_tokenizer(path)
        shutil.rmtree(path, ignore_errors=True)
        return write_token_folder(config, vocab_size, tokenizer, path, special=special), load_tokenizer(path)


def ready_tokenizer(config: DataConfig, special: Sequence[str] = ()) -> Tokenizer | None:
    """The tokenizer of --tokenizer, None if it is yet to be trained."""
    return None if config.tokenizer == "bpe" else make_tokenizer(config.tokenizer, list, 0, special)


def source_name(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None, special: Sequence[str] = ()) -> str:
    """A name for all that decides a token folder: its text, and a tokenizer or, without one, that to be trained."""
    trained = f"bpe{vocab_size}" + f"-{len(special)}" * bool(special)
    name = f"{tokenizer.kind}-{tokenizer.fingerprint[:12]}" if tokenizer else trained
    return f"{fingerprint(config)[:24]}-{name}"


def write_token_folder(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None, out: Path, workers: int = 0,
                       special: Sequence[str] = ()) -> TokenFolder:  # fmt: skip
    """Reads the corpus of --data and writes it as a token folder; trains a tokenizer if none is given."""
    source = source_name(config, vocab_size, tokenizer, special)
    train, valid = open_corpus(config)
    if not tokenizer:
        tokenizer = make_tokenizer("bpe", lambda: train.texts(limit=BPE_BYTES), vocab_size, special)
    return write_tokens({"train": train, "valid": valid}, tokenizer, out, workers=workers, source=source)


# ---------------------------------------------------------------- writing
def write_tokens(splits: dict[str, TextSplit], tokenizer: Tokenizer, out: str | Path, progress: bool = True,
                 workers: int = 0, source: str = "") -> TokenFolder:  # fmt: skip
    """Encodes {"train": ..., "valid": ...} into the folder `out`, which is there once it is whole; opens it.

    So many `workers` (threads; 0: one per core) encode while the results are written in order; memory
    does not grow with the text. Raises UserError where `out` is anything but empty or a token folder.
    """
    out = Path(out).resolve()
    if out.exists() and not is_token_folder(out) and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not a token folder; choose another name")
    workers = workers or os.cpu_count() or 1
    meta = dict(format=FORMAT, dtype="uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    meta |= dict(vocab_size=tokenizer.vocab_size, source=source, splits={})
    total = splits["train"].n_bytes + splits["valid"].n_bytes
    hidden = None if progress else True  # None: tqdm shows itself on a terminal only
    bar = tqdm(desc="encoding", total=total, unit="B", unit_scale=True, disable=hidden)
    with atomic_folder(out) as folder, bar, ThreadPoolExecutor(workers) as pool:
        tokenizer.save(folder)
        for name in ("train", "valid"):
            batches = encode_batches(splits[name], tokenizer, pool, ahead=2 * workers)
            meta["splits"][name] = asdict(write_split(folder / name, meta["dtype"], batches, bar))
        meta["sha256"] = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        write_json(folder / "meta.json", meta)
    return open_tokens(out)


def write_split(path: Path, dtype: str, batches: Iterator[Encoded], bar: tqdm) -> Counts:
    """Writes the files of one split: those that begin with this path."""
    counts, dtype = Counts(0, 0, 0, 0), np.dtype(dtype).newbyteorder("<")
    with (
        open(path.with_suffix(".tokens"), "wb") as tokens_file,
        open(path.with_suffix(".documents"), "wb") as documents_file,
        open(path.with_suffix(".sentences"), "wb") as sentences_file,
    ):
        for tokens, documents, sentences, n_bytes in batches:
            tokens_file.write(tokens.astype(dtype))
            documents_file.write((counts.n_tokens + documents).astype("<u8"))
            sentences_file.write((counts.n_tokens + sentences).astype("<u8"))
            counts.n_tokens += len(tokens)
            counts.n_documents += len(documents)
            counts.n_sentences += len(sentences)
            counts.n_bytes += n_bytes
            bar.update(n_bytes)
    return counts


def encode_batches(split: TextSplit, tokenizer: Tokenizer, pool: ThreadPoolExecutor, ahead: int) -> Iterator[Encoded]:
    """Yields a split's text, encoded, in order. At most `ahead` batches are on their way."""
    running: deque = deque()
    pieces, size, context = [], 0, b""
    for starts_document, piece in split.pieces():
        context = b"" if starts_document else context
        pieces.append((starts_document, context, piece))
        size += len(piece)
        context = (context + piece[-CONTEXT:])[-CONTEXT:]
        if size >= BATCH:
            running.append(pool.submit(encode_batch, pieces, tokenizer))
            pieces, size = [], 0
        if len(running) >= ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
    if pieces:
        yield encode_batch(pieces, tokenizer)


def encode_batch(pieces: list[tuple[bool, bytes, bytes]], tokenizer: Tokenizer) -> Encoded:
    """Encodes pieces of text, each given as (starts_document, the text just before it, the text)."""
    tokens, documents, sentences = [np.empty(0, np.uint32)], [], [np.empty(0, np.int64)]
    n_tokens = 0
    for starts_document, context, piece in pieces:
        ids, places = encode_piece(piece, sentence_starts(context, piece), tokenizer)
        if not len(ids):  # WordPiece has no tokens for some characters that cannot be seen
            continue
        if starts_document:
            documents.append(n_tokens)
            sentences.append([n_tokens])
            if tokenizer.eot is not None:
                tokens.append([tokenizer.eot])
                n_tokens += 1
        tokens.append(ids)
        sentences.append(n_tokens + places)
        n_tokens += len(ids)
    starts = np.unique(np.concatenate(sentences))  # one token may hold the starts of two
    n_bytes = sum(len(piece) for _, _, piece in pieces)
    return np.concatenate(tokens), np.array(documents, np.int64), starts, n_bytes


def encode_piece(piece: bytes, starts: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens, and for each byte in `starts` which of them begins there, or else holds it."""
    if tokenizer.lossless:
        ids = tokenizer.encode_array(piece)
        ends = np.cumsum(tokenizer.byte_lengths[ids])  # (T,) the byte before which each token ends
        return ids, np.searchsorted(ends, starts, side="right")
    # A tokenizer that drops white space or accents: its tokens do not add up to the text. So by sentences.
    edges = [0, *starts.tolist(), len(piece)]
    parts = [tokenizer.encode_array(piece[a:b]) for a, b in itertools.pairwise(edges)]
    ids, places = np.concatenate(parts), np.cumsum([len(part) for part in parts])[:-1]
    return ids, places[places < len(ids)]  # what is left behind the last token, a no-break space say, is no sentence


# ---------------------------------------------------------------- sentences
# A sentence ends with its full stop and what closes behind it, unless that was an abbreviation or a small letter
# follows. (UTF-8: e2 80 99, e2 80 9d are curved quotes, e3 80 82 is the CJK full stop.) Patterns give nothing back
# (`++`), and match where no sentence follows too, without a group: so a million full stops take no more time than text.
FULL_STOP = re.compile(
    rb"""
    [.!?] (?<! \b[A-Z]\. ) (?<! \b(?:Mr|Ms|Dr|St|vs|cf)\. ) (?<! \b(?:Mrs|e\.g|i\.e)\. )
    (?: [.!?"')\]] | \xe2\x80[\x99\x9d] )*+
    (?= ( \s++ [^a-z] )? )
    | \xe3\x80\x82 (?= ( \s*+ . )? )
    """,
    re.VERBOSE,
)
EMPTY_LINE = re.compile(rb"\n[^\S\n]*+\n\s*+")  # ends a heading, an item, a line of code


def sentence_starts(context: bytes, piece: bytes) -> np.ndarray:
    """Returns the bytes of `piece` where a sentence starts, ascending; `context` is the text before it.

    A sentence starts with the white space before it, where tokens start too. The first one of a document has
    nothing before it, and is not among them.
    """
    text = context + piece
    starts = [found.end() for found in FULL_STOP.finditer(text) if found.lastindex]
    for found in EMPTY_LINE.finditer(text):
        start = found.start()
        while start > 0 and text[start - 1] in b" \t\r":
            start -= 1
        if start > 0 and found.end() < len(text):
            starts.append(start)
    places = np.unique(np.array(starts, np.int64)) - len(context)
    return places[(places >= 0) & (places < len(piece))]
