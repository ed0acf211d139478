"""Corpora that are known by a name: fetched once, checked, and kept."""

import errno
import gzip
import hashlib
import http.client
import lzma
import os
import ssl
import struct
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from mini.errors import UserError
from mini.storage import atomic_file, locked

ATTEMPTS = 20  # times a transfer that broke off is taken up again, as long as each brings more of it
TIMEOUT = 30  # seconds without a byte
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, ssl.SSLError, TimeoutError,
                  ValueError)  # fmt: skip  # ValueError: sent on to what is no address
BAD_ARCHIVE = (OSError, ValueError, EOFError, IndexError, RuntimeError, struct.error, zlib.error, lzma.LZMAError,
               zipfile.BadZipFile)  # fmt: skip


@dataclass(frozen=True)
class KnownCorpus:
    """A corpus with a usual split, so that results can be compared. All figures are of the unpacked file."""

    url: str
    size: int  # bytes
    checksum: str  # algorithm:digest
    train_end: int  # the bytes before are for training,
    valid_end: int  # those between for validation; what comes after is a test set that nothing here touches
    document_start: str | None = None  # a line that begins so begins a document


KNOWN = {
    # The first 10^8 bytes of the English Wikipedia's dump of 3 March 2006 with all its markup (Mahoney) ...
    "enwik8": KnownCorpus(
        url="http://mattmahoney.net/dc/enwik8.zip", size=100_000_000, train_end=90_000_000, valid_end=95_000_000,
        checksum="sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8", document_start="  <page>",
    ),
    # ... and 10^8 bytes of that dump with nothing left but the letters a to z and single spaces.
    "text8": KnownCorpus(
        url="http://mattmahoney.net/dc/text8.zip", size=100_000_000, train_end=90_000_000, valid_end=95_000_000,
        checksum="md5:3bea1919949baf155f99411df5fada7e",
    ),
    "tinyshakespeare": KnownCorpus(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        size=1_115_394, train_end=1_003_854, valid_end=1_115_394,
        checksum="sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}  # fmt: skip


def cache_folder() -> Path:
    """Where things are kept that can be had or made again: $MINI_CACHE, or ~/.cache/mini."""
    return Path(os.environ.get("MINI_CACHE") or "~/.cache/mini").expanduser()


def fetch_known(name: str) -> Path:
    """The unpacked file of a known corpus, from the cache folder or else from its address.

    Without a network, put it into the cache folder by hand: as NAME.txt or NAME, or packed, as NAME.zip or
    NAME.gz. Raises UserError where it cannot be had, or is something else.
    """
    folder = cache_folder()
    try:
        if (folder / f"{name}.txt").is_file():  # perhaps where nothing may be written
            return fetch_into(folder, name)
        with locked(folder / name, wait=True):  # two processes share one download
            return fetch_into(folder, name)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; MINI_CACHE can name another folder") from None


def fetch_into(folder: Path, name: str) -> Path:
    known, target, part = KNOWN[name], folder / f"{name}.txt", folder / f"{name}.part"
    for given in [target, *(folder / f"{name}{ending}" for ending in (".zip", ".gz", ".txt.gz", ""))]:
        if given.is_file():
            wrong = difference(given, known) if given == target else unpack(given, target, known)
            if wrong:
                raise UserError(f"{given}: not {name} ({wrong}); remove the file to have it fetched anew")
            return target
    if failure := download(known.url, part, known.size):
        packed = folder / (name + Path(known.url).suffix)
        places = target if packed == target else f"{packed}, or unpacked at {target}"
        by_hand = f"put that file ({known.size:,} bytes when unpacked) at {places}, or give a path as --data"
        raise UserError(f"{name}: cannot fetch {known.url} ({failure}); try again to go on, or {by_hand}")
    wrong = unpack(part, target, known)
    part.unlink()
    if wrong:
        raise UserError(f"{name}: what came from {known.url} is damaged or not it ({wrong}); it was removed")
    return target


def download(url: str, part: Path, most: int) -> str | None:
    """Downloads to the file `part`, going on from what it holds. Returns why that failed, None if it did not.

    What has come stays for the next call. A server that cannot go on in the middle sends all of it again. most: bytes
    of the unpacked file, than which no packed one is much larger.
    """
    failure = None
    for _ in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"User-Agent": "mini"})
        if have:
            request.add_header("Range", f"bytes={have}-")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                # 206: the rest comes. 200: the server does not know Range, and begins at the start.
                begin = have if answer.status == 206 else 0
                length = answer.headers.get("Content-Length") or ""
                total = begin + int(length) if length.isdecimal() else None
                with open(part, "ab" if begin else "wb") as file, tqdm(
                    total=total, initial=begin, desc=part.stem, unit="B", unit_scale=True, disable=None
                ) as bar:  # fmt: skip
                    while chunk := answer.read1(2**16):  # whatever has come, before the connection breaks
                        file.write(chunk)
                        bar.update(len(chunk))
                        if file.tell() > 1.1 * most + 2**20:
                            part.unlink()
                            return "it is larger than it should be"
            arrived = part.stat().st_size
            if total is None or arrived == total:  # a connection that broke looks like a file's end
                return None
            failure = f"the connection broke after {arrived:,} of {total:,} bytes"
        except urllib.error.HTTPError as error:
            if error.code != 416:
                return f"the server answered {error.code} {error.reason!r}"
            if error.headers.get("Content-Range") == f"bytes */{have}":  # nothing is missing
                return None
            part.unlink()  # it is longer than the file it should be a part of
            continue
        except NETWORK_ERRORS as error:
            failure = str(getattr(error, "reason", "") or error).encode("unicode_escape").decode()
        if not part.exists() or part.stat().st_size <= have:
            break
    return failure


def unpack(packed: Path, target: Path, known: KnownCorpus) -> str | None:
    """Unpacks a .zip, a .gz or a plain file to `target`, or returns what is wrong with it."""
    try:
        with open_unpacked(packed) as file, atomic_file(target) as temporary:
            with open(temporary, "wb") as copy:
                while copy.tell() <= known.size and (chunk := file.read(2**20)):
                    copy.write(chunk)
            if wrong := difference(temporary, known):
                raise ValueError(wrong)  # leaves atomic_file before it gives the file its name
    except BAD_ARCHIVE as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # a full disk, say; EINVAL: a seek to nowhere
            raise
        return str(error) or type(error).__name__
    return None


def open_unpacked(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        archive = zipfile.ZipFile(path)
        return archive.open(max(archive.infolist(), key=lambda member: member.file_size))
    return gzip.open(path) if start[:2] == b"\x1f\x8b" else open(path, "rb")


def difference(path: Path, known: KnownCorpus) -> str | None:
    """How a file differs from the known one, or None."""
    size, (algorithm, expected) = path.stat().st_size, known.checksum.split(":")
    if size != known.size:
        return f"{size:,} bytes instead of {known.size:,}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    return None if digest == expected else f"{algorithm} {digest} instead of {expected}"
