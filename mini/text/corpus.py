"""Where text comes from: files, folders, corpora with a name; and which of it is held out for validation.

A corpus is read as a stream of documents in pieces of about half a megabyte, as often as wanted, so a
document of many gigabytes takes no more memory than a small one. tokens.py turns the pieces into numbers.
"""

import array
import codecs
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

from mini.flags import Checked, UserError, nearest, option
from mini.text import python_docs
from mini.text.fetch import KNOWN, KnownCorpus, fetch_known

READING = 1  # raise it when the same files begin to be read as other text: cached tokens are then made anew
DEFAULT = "python-docs"
BLOCK = 2**20  # bytes read from a file at a time
PIECE = 2**19  # characters of the longest piece of a document

Fragment = tuple[bool, str]  # does a document start here?, some of its text, of any length
Reader = Callable[[], Iterator[Fragment]]  # reads a whole corpus from its start, each time it is called


@dataclass
class DataConfig(Checked):
    """Where text comes from and how it becomes tokens."""

    data: str = option("python-docs", "text, .jsonl, .gz of either, a folder, a token folder, a known corpus")
    train: str | None = option(None, "training file of the tasks that fine-tune")
    valid: str | None = option(None, "validation file; else the end of --data, or a tenth of --train, is held out")
    test: str | None = option(None, "file on which the final weights of fine-tuning are judged, never chosen: test_..")
    valid_fraction: float = option(0.1, "share of --data held out for validation", low=1e-6, high=0.999999)
    separator: str | None = option(None, "what ends a document in a text file, e.g. \\n\\n; without it a file is one")
    errors: str = option("strict", "bytes that are not UTF-8: refuse, or replace", ("strict", "replace"))
    tokenizer: str = option("bpe", "bpe (train one), bytes, gpt2, a .tiktoken file, a WordPiece vocab.txt, or a run")


@dataclass(frozen=True)
class TextSplit:
    """The bytes `begin` to `end` of a corpus in UTF-8; both lie between two characters."""

    read: Reader
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin

    def pieces(self) -> Iterator[tuple[bool, bytes]]:
        """Yields (starts_document, text in UTF-8) in order, in pieces of at most PIECE characters.

        A long document is cut where a tokenizer that splits at white space, as GPT-2's does, cuts it anyway:
        encoding the pieces one by one gives the tokens of the whole.
        """
        position = 0
        for starts_document, piece in cut_pieces(self.read()):
            part = piece[max(self.begin - position, 0) : max(self.end - position, 0)]
            if part:
                yield starts_document or position <= self.begin, part
            position += len(piece)
            if position >= self.end:
                return

    def texts(self, limit: int | None = None) -> Iterator[str]:
        """Yields the text; with `limit`, at most so many bytes of it, in samples spread evenly over it."""
        if limit is None or limit >= self.n_bytes:
            yield from (piece.decode() for _, piece in self.pieces())
            return
        sample = min(2**16, max(limit // 64, 1))  # bytes from a long piece: so at 64 places or more
        seen = taken = 0
        for _, piece in self.pieces():
            seen += len(piece)
            due = seen * limit // self.n_bytes - taken
            if due < min(len(piece), sample):
                continue
            text = piece[:due].decode(errors="ignore")  # the slice may end inside a character
            if due < len(piece):
                text = text[: last_safe_cut(text)]
            taken += len(text.encode())
            yield text


def open_corpus(config: DataConfig) -> tuple[TextSplit, TextSplit]:
    """Opens a corpus as (train, validation). Reads files once from end to end, to check and to measure them.

    config.data, config.valid: as find_files takes them; of a .jsonl file each line {"text": ...} is one document.
    Without valid, known corpora are split as everybody splits them; else the last documents with about
    `valid_fraction` of the bytes are held out, or so much of a single one.
    Raises UserError, with file and place, where there is no text or not in the form that was promised.
    """
    read, known = open_reader(config.data, config)
    if known:
        cut, end = known.train_end, known.valid_end
    else:
        end, starts = measure(read, config.data)
        cut = end if config.valid else choose_cut(read, config.data, end, starts, config.valid_fraction)
    train, valid = TextSplit(read, 0, cut), TextSplit(read, cut, end)
    if config.valid:
        read, known = open_reader(config.valid, config)
        begin, end = (known.train_end, known.valid_end) if known else (0, measure(read, config.valid)[0])
        valid = TextSplit(read, begin, end)
    return train, valid


def fingerprint(config: DataConfig) -> str:
    """A SHA-256 of what decides the text that `open_corpus` gives. Fast: a file counts by place, size and time."""
    sources = [identify(config.data), identify(config.valid) if config.valid else None]
    described = [READING, sources, config.valid_fraction, config.separator or None, config.errors]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def identify(data: str | list[str]) -> object:
    if files := find_files(data):
        return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return python_docs.fingerprint() if data == DEFAULT else astuple(KNOWN[data])


# ---------------------------------------------------------------- splitting
def measure(read: Reader, data: str) -> tuple[int, array.array]:
    """How many bytes a corpus has, and the byte at which each of its documents starts."""
    n_bytes, starts = 0, array.array("Q")
    for starts_document, piece in cut_pieces(read()):
        if starts_document:
            starts.append(n_bytes)
        n_bytes += len(piece)
    if not n_bytes:
        raise UserError(f"{data}: there is no text in it")
    return n_bytes, starts


def choose_cut(read: Reader, data: str, n_bytes: int, starts: array.array, valid_fraction: float) -> int:
    """The byte where validation begins: where a document does or, with only one, a character."""
    target = max(int(n_bytes * (1 - valid_fraction)), 1)
    if len(starts) > 1:
        return min(starts[1:], key=lambda start: abs(start - target))
    position = 0
    for _, piece in cut_pieces(read()):
        at = max(target - position, 0)
        while at < len(piece) and piece[at] & 0b1100_0000 == 0b1000_0000:  # inside a character
            at += 1
        if at < len(piece):
            return position + at
        position += len(piece)
    raise UserError(f"{data}: {n_bytes} bytes are too few to hold some out; give more text, or --valid")


# ---------------------------------------------------------------- from files to documents
def find_files(data: str | list[str]) -> list[Path]:
    """The files at a path, or at several; none if `data` is the name of a corpus, and no path. Else raises UserError.

    A folder is all files below it in the order of their names, but for hidden ones.
    """
    names, files = [DEFAULT, *KNOWN], []
    if data in names and not Path(data).exists():
        return []
    for path in map(Path, [data] if isinstance(data, str) else data):
        if not path.exists():
            known = f"a corpus that is known by name ({', '.join(names)}){nearest(str(path), names)}"
            raise UserError(f"{path}: no such file or folder, nor {known}")
        if path.is_dir() and any((path / name).is_file() for name in ("config.json", "meta.json")):
            raise UserError(f"{path}: a run or tokens, damaged perhaps, but no folder of texts")
        inside = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        found = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
        if not found:
            raise UserError(f"{path}: there is no text in it")
        files += found
    return files


def open_reader(data: str | list[str], config: DataConfig) -> tuple[Reader, KnownCorpus | None]:
    """A reader of `data`, and what is known of it by its name."""
    if files := find_files(data):
        # A shell hands over \n as it is typed.
        separator = (config.separator or "").replace("\\n", "\n").replace("\\t", "\t")
        mark = (separator, 0, len(separator)) if separator else None
        return (lambda: read_files(files, mark, config.errors)), None
    if data == DEFAULT:
        documents = python_docs.documents()
        return (lambda: ((True, text) for text in documents)), None
    files, start = [fetch_known(data)], KNOWN[data].document_start
    mark = (f"\n{start}", 1, 1) if start else None  # the line break still belongs to the document before
    return (lambda: read_files(files, mark, config.errors)), KNOWN[data]


def read_files(files: list[Path], mark: tuple[str, int, int] | None, errors: str) -> Iterator[Fragment]:
    for path in files:
        name = path.name.lower()
        try:
            with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
                if name.removesuffix(".gz").endswith(".jsonl"):
                    yield from read_jsonl(file, path, errors)
                elif mark:
                    yield from split_documents(decode(file, path, errors), *mark)
                else:
                    for i, text in enumerate(decode(file, path, errors)):
                        yield i == 0, text
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cut off, damaged, or not a .gz file ({error})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def decode(file: BinaryIO, path: Path, errors: str) -> Iterator[str]:
    position, rest = 0, b""  # `rest` stands at byte `position`: a character that ends in the next block
    while True:
        block = file.read(BLOCK)
        rest += block
        try:
            text, used = codecs.utf_8_decode(rest, errors, not block)
        except UnicodeDecodeError as error:
            at = f"byte {position + error.start} (0x{rest[error.start]:02x})"
            raise UserError(f"{path}: not UTF-8 at {at}; convert it, or train with --errors replace") from None
        yield text
        if not block:
            return
        position, rest = position + used, rest[used:]


def read_jsonl(file: BinaryIO, path: Path, errors: str) -> Iterator[Fragment]:
    for number, line in enumerate(file, 1):
        line, place = line.removeprefix(codecs.BOM_UTF8).strip(), f"{path}:{number}"
        if not line:
            continue
        try:
            text = json.loads(line.decode(errors=errors))["text"]
            # JSON can spell half a character, "\ud83d"; UTF-8 cannot.
            text = text.encode(errors=errors).decode()
        except UnicodeError as error:
            raise UserError(
                f"{place}: not UTF-8 ({error.reason}); convert it, or train with --errors replace"
            ) from None
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
        except ValueError:
            raise UserError(f"{place}: a number of more digits than can be read") from None
        except (KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{place}: not of the form {{"text": "..."}}') from None
        yield True, text


def split_documents(texts: Iterable[str], mark: str, end: int, begin: int) -> Iterator[Fragment]:
    """Where `mark` is, a document ends, `end` characters into it, and the next begins, `begin` into it."""
    starts_document, held = True, ""
    for text in texts:
        held += text
        position = 0
        while (found := held.find(mark, position)) >= 0:
            yield starts_document, held[position : found + end]
            starts_document, position = True, found + begin
        safe = max(position, len(held) - len(mark) + 1)  # what is behind may be the first half of a mark
        if safe > position:
            yield starts_document, held[position:safe]
            starts_document = False
        held = held[safe:]
    yield starts_document, held


# ---------------------------------------------------------------- from documents to pieces
def cut_pieces(fragments: Iterable[Fragment]) -> Iterator[tuple[bool, bytes]]:
    """Joins and cuts fragments to (starts_document, UTF-8). A document of mere white space is left out."""
    starts_document, held = True, ""  # text of the present document that has not been yielded yet
    for starts_another, text in itertools.chain(fragments, [(True, "")]):  # the last one ends as if another began
        if starts_another:
            if held and not (starts_document and held.isspace()):
                yield starts_document, held.encode()
            starts_document, held = True, ""
        held += text
        begin = 0
        while len(held) - begin > PIECE:
            end = begin + last_safe_cut(held[begin : begin + PIECE])
            yield starts_document, held[begin:end].encode()
            starts_document, begin = False, end
        held = held[begin:]


# Tokenizers that split at white space have no token from a visible character into the white space behind it.
# After a letter or digit this holds for all of them; to a full stop some join the line breaks that follow it.
WORD_THEN_LINE = re.compile(r"(?s:.*)[^\W_](?=\n)")
WORD_THEN_SPACE = re.compile(r"(?s:.*)[^\W_](?=[ \n])")
VISIBLE_THEN_SPACE = re.compile(r"(?s:.*)\S(?=[ \n])")


def last_safe_cut(text: str) -> int:
    """The last place where a cut does not change a text's tokens, or its end where there is none."""
    tail = max(0, len(text) - 2**16)  # a good place near the end is better than the best one far from it
    for pattern, begin in ((WORD_THEN_LINE, tail), (WORD_THEN_SPACE, tail), (VISIBLE_THEN_SPACE, 0)):
        if found := pattern.match(text, begin):
            return found.end()
    return len(text)
