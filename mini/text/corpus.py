"""Where text comes from: files, folders, corpora with a name; and which of it is held out for validation.

A corpus is read as a stream of documents in pieces of about half a megabyte, as often as wanted, so a
document of many gigabytes takes no more memory than a small one. tokens.py turns the pieces into numbers.
"""

import array
import bisect
import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

from mini.errors import UserError, nearest
from mini.text import python_docs
from mini.text.fetch import KNOWN, fetch_known

READING = 1  # raise it when the same files begin to be read as other text: cached tokens are then made anew
DEFAULT = "python-docs"
BLOCK = 2**20  # bytes read from a file at a time
PIECE = 2**19  # characters of the longest piece of a document

Fragment = tuple[bool, str]  # does a document start here?, some of its text, of any length
Reader = Callable[[], Iterator[Fragment]]  # reads a whole corpus from its start, each time it is called


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
        position, first = 0, True
        for starts_document, piece in cut_pieces(self.read()):
            part = piece[max(self.begin - position, 0) : max(self.end - position, 0)]
            position += len(piece)
            if part:
                yield starts_document or first, part
                first = False
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


def open_corpus(
    data: str | list[str],
    valid: str | None = None,
    valid_fraction: float = 0.1,
    separator: str | None = None,
    errors: str = "strict",
) -> tuple[TextSplit, TextSplit]:
    """Opens a corpus as (train, validation). Reads files once from end to end, to check and to measure them.

    data: "python-docs", the name of a known corpus (fetched if need be), a text file, a .jsonl file (each
        line {"text": ...} is one document), either of them as .gz, or a folder of these, where hidden files
        do not count. What exists as a path is taken as a path. A list of paths is read one after another.
    valid: the same, for validation. Without it, known corpora are split as everybody splits them; else the
        last documents with about `valid_fraction` of the bytes are held out, or so much of a single one.
    separator: ends a document within a text file, e.g. "<|endoftext|>". Without it, a file is one document.
    errors: "strict" refuses text that is not UTF-8, "replace" reads U+FFFD in its place.

    Raises UserError, with file and place, where there is no text or not in the form that was promised.
    """
    if errors not in ("strict", "replace"):
        raise UserError(f"--errors {errors}: must be strict or replace")
    if not 0 < valid_fraction < 1:
        raise UserError(f"--valid_fraction {valid_fraction}: must lie between 0 and 1, e.g. 0.1")

    read = open_reader(data, separator, errors)
    if is_known(data):
        train_end, end = KNOWN[data].train_end, KNOWN[data].valid_end
    else:
        end, starts = measure(read, data)
        train_end = end if valid else choose_cut(read, data, end, starts, valid_fraction)
    train = TextSplit(read, 0, train_end)
    if not valid:
        return train, TextSplit(read, train_end, end)

    read = open_reader(valid, separator, errors)
    if is_known(valid):
        return train, TextSplit(read, KNOWN[valid].train_end, KNOWN[valid].valid_end)
    return train, TextSplit(read, 0, measure(read, valid)[0])


def fingerprint(
    data: str | list[str],
    valid: str | None = None,
    valid_fraction: float = 0.1,
    separator: str | None = None,
    errors: str = "strict",
) -> str:
    """Returns a SHA-256 of what decides the text that `open_corpus` gives for these arguments; fast.

    A file counts by place, size and time of change. Together with the tokenizer's fingerprint this names a
    folder of cached tokens. Raises UserError where there is no such corpus.
    """
    sources = [identify(data), identify(valid) if valid else None]
    described = [READING, sources, valid_fraction, separator or None, errors]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def identify(data: str | list[str]) -> object:
    if paths := existing(data):
        files = [(str(file.resolve()), file.stat()) for path in paths for file in list_files(path)]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    if data == DEFAULT:
        return python_docs.fingerprint()
    if data in KNOWN:
        return astuple(KNOWN[data])
    raise no_such(data)


# --- Splitting ----------------------------------------------------------------------------------------------


def measure(read: Reader, data: str) -> tuple[int, array.array]:
    """Returns how many bytes a corpus has, and the byte at which each of its documents starts."""
    n_bytes, starts = 0, array.array("Q")
    for starts_document, piece in cut_pieces(read()):
        if starts_document:
            starts.append(n_bytes)
        n_bytes += len(piece)
    if not n_bytes:
        raise UserError(f"{data}: there is no text in it")
    return n_bytes, starts


def choose_cut(read: Reader, data: str, n_bytes: int, starts: array.array, valid_fraction: float) -> int:
    """Returns the byte where validation begins: where a document does or, with only one, a character."""
    target = max(int(n_bytes * (1 - valid_fraction)), 1)
    if len(starts) > 1:
        after = min(max(bisect.bisect_left(starts, target), 1), len(starts) - 1)
        before = max(after - 1, 1)
        return min(starts[before], starts[after], key=lambda start: abs(start - target))
    position = 0
    for _, piece in cut_pieces(read()):
        at = max(target - position, 0)
        while at < len(piece) and piece[at] & 0b1100_0000 == 0b1000_0000:  # inside a character
            at += 1
        if at < len(piece):
            return position + at
        position += len(piece)
    raise UserError(f"{data}: {n_bytes} bytes are too few to hold some out; give more text, or --valid")


# --- From files to documents --------------------------------------------------------------------------------


def existing(data: str | list[str]) -> list[Path]:
    """The files and folders that `data` names, or none if it is no path. Of several, all must be there."""
    paths = [Path(name) for name in ([data] if isinstance(data, str) else data)]
    missing = [path for path in paths if not path.exists()]
    if missing and len(paths) > 1:
        raise no_such(missing[0])
    return [] if missing else paths


def is_known(data: str | list[str]) -> bool:
    return not existing(data) and data in KNOWN


def no_such(data: str | Path) -> UserError:
    names = [DEFAULT, *KNOWN]
    hint = nearest(str(data), names)
    return UserError(f"{data}: no such file or folder, nor a corpus that is known by name ({', '.join(names)}){hint}")


def open_reader(data: str | list[str], separator: str | None, errors: str) -> Reader:
    if paths := existing(data):
        files = [file for path in paths for file in list_files(path)]
        if separator:  # a shell hands over \n as it is typed
            separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        mark = (separator, 0, len(separator)) if separator else None
        return lambda: read_files(files, mark, errors)
    if data == DEFAULT:
        documents = python_docs.documents()
        return lambda: ((True, text) for text in documents)
    if data in KNOWN:
        files, start = [fetch_known(data)], KNOWN[data].document_start
        mark = (f"\n{start}", 1, 1) if start else None  # the line break still belongs to the document before
        return lambda: read_files(files, mark, errors)
    raise no_such(data)


def list_files(path: Path) -> list[Path]:
    """A file is itself; a folder is all files below it in the order of their names, but for hidden ones."""
    if path.is_file():
        return [path]
    inside = sorted((file.relative_to(path).parts, file) for file in path.rglob("*") if file.is_file())
    files = [file for parts, file in inside if not any(part.startswith(".") for part in parts)]
    if not files:
        raise UserError(f"{path}: there is no text in it")
    return files


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
            raise UserError(f"{path}: not UTF-8 at {at}; convert it, or use --errors replace") from None
        if text:
            yield text
        if not block:
            return
        position, rest = position + used, rest[used:]


def read_jsonl(file: BinaryIO, path: Path, errors: str) -> Iterator[Fragment]:
    for number, line in enumerate(file, 1):
        line = line.removeprefix(codecs.BOM_UTF8).strip()
        if not line:
            continue
        try:
            text = json.loads(line.decode(errors=errors))["text"]
            # JSON can spell half a character, "\ud83d"; UTF-8 cannot.
            text = text.encode(errors=errors).decode()
        except UnicodeError as error:
            raise UserError(
                f"{path}:{number}: not UTF-8 ({error.reason}); convert it, or use --errors replace"
            ) from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        except (KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{path}:{number}: not of the form {{"text": "..."}}') from None
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


# --- From documents to pieces -------------------------------------------------------------------------------


def cut_pieces(fragments: Iterable[Fragment]) -> Iterator[tuple[bool, bytes]]:
    """Joins and cuts fragments to (starts_document, UTF-8). A document of mere white space is left out."""
    starts_document, held = True, ""  # text of the present document that has not been yielded yet
    for starts_another, text in fragments:
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
    if held and not (starts_document and held.isspace()):
        yield starts_document, held.encode()


# Tokenizers that split at white space have no token from a visible character into the white space behind it.
# After a letter or digit this holds for all of them; to a full stop some join the line breaks that follow it.
WORD_THEN_LINE = re.compile(r"(?s:.*)[^\W_](?=\n)")
WORD_THEN_SPACE = re.compile(r"(?s:.*)[^\W_](?=[ \n])")
VISIBLE_THEN_SPACE = re.compile(r"(?s:.*)\S(?=[ \n])")


def last_safe_cut(text: str) -> int:
    """Returns the last place where a cut does not change a text's tokens, or its end where there is none."""
    tail = max(0, len(text) - 2**16)  # a good place near the end is better than the best one far from it
    for pattern, begin in ((WORD_THEN_LINE, tail), (WORD_THEN_SPACE, tail), (VISIBLE_THEN_SPACE, 0)):
        if found := pattern.match(text, begin):
            return found.end()
    return len(text)
