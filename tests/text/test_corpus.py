"""Reading, splitting and cutting text; the default corpus; known corpora, from a server of our own."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mini.errors import UserError
from mini.text import corpus, fetch, python_docs
from mini.text.corpus import DataConfig, cut_pieces
from mini.text.tokenizer import BPETokenizer, train_bpe

ROOT = Path(__file__).parents[2]
TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler ..\n\n  in the mind\té漢字 😀\r\n"


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def open_corpus(data, valid=None, **options):
    return corpus.open_corpus(DataConfig(data, valid=valid, **options))


def fingerprint(data, valid=None, **options):
    return corpus.fingerprint(DataConfig(data, valid=valid, **options))


def text_of(split) -> bytes:
    return b"".join(piece for _, piece in split.pieces())


def documents_of(split) -> list[str]:
    documents: list[bytes] = []
    for starts_document, piece in split.pieces():
        if starts_document:
            documents.append(b"")
        documents[-1] += piece
    return [document.decode() for document in documents]


def refused(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_corpus(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_file_is_one_document_cut_at_a_character(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(corpus, "PIECE", 70)
    content = ("é漢😀" * 1000).encode()
    path = write(tmp_path / ("a.gz" if packed else "a"), gzip.compress(content) if packed else content)
    for fraction in (0.1, 0.1003, 0.1006, 0.101, 0.9999):
        train, valid = open_corpus(path, valid_fraction=fraction)
        assert text_of(train) + text_of(valid) == content
        assert text_of(train).decode() + text_of(valid).decode() == content.decode()
        cut = int(len(content) * (1 - fraction))
        assert cut <= train.n_bytes == len(text_of(train)) < cut + 4
        assert valid.n_bytes == len(text_of(valid)) > 0
        for split in (train, valid):
            starts = [starts for starts, _ in split.pieces()]
            assert starts == [True] + [False] * (len(starts) - 1)


def test_separator_ends_documents_and_is_dropped(tmp_path, monkeypatch):
    stories = [f"Story {i}.\n" + "la " * i for i in range(50)]
    path = write(tmp_path / "a.txt", "<|end|>".join(stories) + "<|end|>\n<|end|>")
    for block in (1, 5, 2**20):  # bytes read at a time: separators also lie across the edges
        monkeypatch.setattr(corpus, "BLOCK", block)
        train, valid = open_corpus(path, separator="<|end|>")
        assert documents_of(train) + documents_of(valid) == stories
        share = valid.n_bytes / (train.n_bytes + valid.n_bytes)
        assert 0.08 < share < 0.12
    assert len(documents_of(open_corpus(path)[0])) == 1


def test_split_by_document_leaves_something_on_both_sides(tmp_path):
    for sizes in ([1, 1000], [1000, 1], [5, 5, 5]):
        path = write(tmp_path / "a.txt", "|".join("x" * n for n in sizes))
        for fraction in (0.001, 0.999):
            train, valid = open_corpus(path, separator="|", valid_fraction=fraction)
            assert train.n_bytes > 0 and valid.n_bytes > 0
            assert [len(d) for d in documents_of(train) + documents_of(valid)] == sizes


def test_folder_is_read_in_order_of_names_without_hidden_files(tmp_path):
    write(tmp_path / "d" / "b" / "2.txt", "second")
    lines = b'\xef\xbb\xbf{"text": "zero"}\n\n{"text": "first\\u00e9", "id": 3}'
    write(tmp_path / "d" / "a.jsonl.gz", gzip.compress(lines))
    write(tmp_path / "d" / ".hidden", b"\xff")
    write(tmp_path / "d" / ".git" / "x.txt", b"\xff")
    write(tmp_path / "d" / "c.txt.gz", gzip.compress(b"third"))
    write(tmp_path / "d" / "empty.txt", b"")
    train, valid = open_corpus(str(tmp_path / "d"))
    assert documents_of(train) + documents_of(valid) == ["zero", "firsté", "second", "third"]
    assert documents_of(valid) == ["third"]


def test_explicit_validation(tmp_path):
    a = write(tmp_path / "a.txt", "train " * 10)
    b = write(tmp_path / "b.jsonl", '{"text": "x"}\n{"text": "y"}')
    train, valid = open_corpus(a, b)
    assert text_of(train) == b"train " * 10 and documents_of(valid) == ["x", "y"]


def test_what_is_not_utf8_is_named_by_its_byte(tmp_path, monkeypatch):
    content = "é".encode() * 600 + b"\xff" + b"abc"
    plain = write(tmp_path / "a.txt", content)
    packed = write(tmp_path / "a.txt.gz", gzip.compress(content))
    for block in (7, 2**20):
        monkeypatch.setattr(corpus, "BLOCK", block)
        for path in (plain, packed):
            message = refused(path)
            assert message.startswith(path)
            assert "byte 1200 (0xff)" in message and "--errors replace" in message
        cut_off = refused(write(tmp_path / "b.txt", "ab漢".encode()[:-1]))
        assert "byte 2 (0xe6)" in cut_off
        train, valid = open_corpus(plain, errors="replace")
        assert (text_of(train) + text_of(valid)).decode() == "é" * 600 + "\ufffdabc"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"txt": "a"}', "not of the form"),
        (b'{"text": 3}', "not of the form"),
        (b'["text"]', "not of the form"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud83d"}', "not UTF-8"),
        (b"[" * 100_000, "not"),
    ],
)
def test_wrong_jsonl_is_named_by_its_line(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b"\n")
    message = refused(path)
    assert message.startswith(f"{path}:3: ") and reason in message
    if reason == "not UTF-8":
        open_corpus(path, errors="replace")


def test_missing_empty_damaged(tmp_path):
    assert "python-docs" in refused(str(tmp_path / "nothing")) and "enwik8" in refused("enwik9")
    assert "no text" in refused(write(tmp_path / "empty.txt", ""))
    assert "no text" in refused(write(tmp_path / "blank.txt", " \n\n\t"))
    assert "no text" in refused(write(tmp_path / "empty.jsonl", '{"text": ""}\n'))
    (tmp_path / "folder").mkdir()
    assert "no text" in refused(str(tmp_path / "folder"))
    assert "too few" in refused(write(tmp_path / "one.txt", "x"))
    assert "not a .gz file" in refused(write(tmp_path / "a.gz", "plain text"))
    whole = gzip.compress(os.urandom(10_000).hex().encode())
    assert "cut off" in refused(write(tmp_path / "b.gz", whole[:5000]))
    good = write(tmp_path / "good.txt", "some text")
    assert "--valid_fraction" in refused(good, valid_fraction=0.0)
    assert "--errors" in refused(good, errors="ignore")
    assert "no such file" in refused(good, str(tmp_path / "nothing"))


# --- Pieces -------------------------------------------------------------------------------------------------


def test_pieces_of_a_document_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    content = TEXT * 30 + "中文。" * 60 + "\n" + TEXT * 5
    path = write(tmp_path / "a.txt", content)
    tokenizer = train_bpe([content], 320, progress=False)
    whole = open_corpus(path, path)[0]
    expected = tokenizer.encode_array(content)
    for size in (100, 333, 2000):
        monkeypatch.setattr(corpus, "PIECE", size)
        pieces = list(whole.pieces())
        assert len(pieces) >= len(content) // size
        assert [starts for starts, _ in pieces] == [True] + [False] * (len(pieces) - 1)
        assert max(len(piece.decode()) for _, piece in pieces) <= size
        assert b"".join(piece for _, piece in pieces) == content.encode()
        ids = np.concatenate([tokenizer.encode_array(piece) for _, piece in pieces])
        np.testing.assert_array_equal(ids, expected)


def test_pieces_suit_patterns_that_join_a_full_stop_and_a_line_break(monkeypatch):
    pattern = r"\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"  # this much of cl100k's
    ranks = {bytes([b]): b for b in range(256)} | {b".\n": 256}
    tokenizer = BPETokenizer(ranks, {"<|endoftext|>": 257}, pattern)
    content = "Two words.\nAnd two.\n" * 50
    monkeypatch.setattr(corpus, "PIECE", 64)
    pieces = [tokenizer.encode_array(piece) for _, piece in cut_pieces([(True, content)])]
    assert len(pieces) > 10
    np.testing.assert_array_equal(np.concatenate(pieces), tokenizer.encode_array(content))


def test_text_without_white_space_is_cut_at_characters(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 64)
    content = "漢字" * 500
    pieces = [piece.decode() for _, piece in cut_pieces([(True, content[:700]), (False, content[700:])])]
    assert "".join(pieces) == content and max(map(len, pieces)) == 64


def test_samples_are_spread_and_within_the_limit(tmp_path, monkeypatch):
    lines = [f"{i:06d} word é\n" for i in range(20_000)]
    one = write(tmp_path / "one.txt", "".join(lines))
    many = write(tmp_path / "many.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in lines))
    for path in (one, many):
        for piece in (2**19, 1000):
            monkeypatch.setattr(corpus, "PIECE", piece)
            split = open_corpus(path)[0]
            assert "".join(split.texts()).encode() == text_of(split)
            assert "".join(split.texts(10**9)).encode() == text_of(split)
            for limit in (5000, 50_000):
                sampled = list(split.texts(limit))
                assert sampled == list(split.texts(limit))
                assert 0.5 * limit < sum(len(text.encode()) for text in sampled) <= limit
    sampled = "".join(open_corpus(many)[0].texts(50_000))
    numbers = [int(word) for word in sampled.split() if word.isdigit()]
    quarters = np.histogram(numbers, bins=4, range=(0, 18_000))[0]
    assert quarters.min() > 0.8 * quarters.max()


# --- The default corpus -------------------------------------------------------------------------------------


def test_default_corpus_is_the_same_in_every_process_and_held_out_text_is_unseen():
    code = (
        "import hashlib; from mini.text import python_docs; texts = python_docs.documents();"
        "print(hashlib.sha256(repr(texts).encode()).hexdigest(), python_docs.fingerprint())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    other = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    train, valid = open_corpus("python-docs")
    train_documents, valid_documents = documents_of(train), documents_of(valid)
    here = hashlib.sha256(repr(train_documents + valid_documents).encode()).hexdigest()
    assert other.communicate()[0].decode().split() == [here, python_docs.fingerprint()]

    total = train.n_bytes + valid.n_bytes
    assert total > 1_000_000 and 0.08 < valid.n_bytes / total < 0.12
    assert len(train_documents) > 200 and len(valid_documents) > 10
    [json_module] = [text for text in train_documents + valid_documents if text.startswith("json\n")]
    assert "json.dumps(obj, *, skipkeys=False, " in json_module
    seen = set().union(*map(python_docs.long_paragraphs, train_documents))
    assert not seen & set().union(*map(python_docs.long_paragraphs, valid_documents))


def test_documentation_is_read_from_sources_of_all_kinds(tmp_path):
    long = "This paragraph is long enough that nobody would write the same one a second time."
    module = f'''
"""Module text."""
raise SystemExit("this must not run")
try:
    class Thing(Base, metaclass=Meta):
        """A thing.

        {long}
        """
        async def run(self, n=3, *, speed: float = 0.5):
            """Runs."""
        def silent(self): return "\\d"
except ImportError:
    pass
def copy():
    """{long}"""
'''
    write(tmp_path / "pkg" / "__init__.py", module)
    write(tmp_path / "pkg" / "broken.py", 'def f(:\n"""No"""')
    write(tmp_path / "pkg" / "test" / "test_x.py", '"""A test"""')
    write(tmp_path / "site-packages" / "x.py", '"""Not the library"""')
    topic = f"Longer\n***\n\n{long}!\n\n{long}?\n\n{long * 3}\n"
    section = f"Mostly a copy\n===\n\n{long}!\n\n{long}?\n\n{long}."
    for topics in (
        f"# -*- coding: utf-8 -*-\n# By\ntopics = {{'a': {section!r},\n 'b': {topic!r}}}\n",  # Python 3.11
        f"\ntopics = {{\n    'a': r'''{section}''',\n    'b': r'''{topic}''',\n}}\n",  # Python 3.14
    ):
        write(tmp_path / "pydoc_data" / "topics.py", topics)
        texts = python_docs.documents(tmp_path)
        assert sorted(texts) == [
            topic,
            f"pkg\n\nModule text.\n\nclass pkg.Thing(Base)\n\nA thing.\n\n{long}\n\n"
            "pkg.Thing.run(self, n=3, *, speed: float=0.5)\n\nRuns.\n",
        ]
    (tmp_path / "pydoc_data" / "topics.py").unlink()
    assert len(python_docs.documents(tmp_path)) == 1
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="without sources"):
        python_docs.documents(tmp_path / "none")


# --- What a corpus is known by ------------------------------------------------------------------------------


def test_fingerprint_follows_what_decides_the_text(tmp_path, known):
    a, b = write(tmp_path / "d" / "a.txt", "aaa"), write(tmp_path / "b.txt", "bbb")
    prints = [
        fingerprint(a),
        fingerprint(b),
        fingerprint(a, b),
        fingerprint(a, separator="x"),
        fingerprint(a, valid_fraction=0.2),
        fingerprint(a, errors="replace"),
        fingerprint("python-docs"),
        *map(fingerprint, fetch.KNOWN),
    ]
    assert len(set(prints)) == len(prints)
    folder = fingerprint(str(tmp_path / "d"))
    assert fingerprint(a) == prints[0] and fingerprint(str(tmp_path / "d")) == folder
    write(tmp_path / "d" / "c.txt", "c")
    assert fingerprint(str(tmp_path / "d")) != folder
    changed = os.stat(a).st_mtime_ns
    write(Path(a), "AAA")
    os.utime(a, ns=(changed, changed + 1))
    assert fingerprint(a) != prints[0]
    write(Path(a), "AAAA")
    os.utime(a, ns=(changed, changed))
    assert fingerprint(a) != prints[0]
    with pytest.raises(UserError, match="no such file"):
        fingerprint(str(tmp_path / "nothing"))


# --- Known corpora ------------------------------------------------------------------------------------------

FAKE = "".join(f"  <page>\npage {i} 漢\n" for i in range(1000)).encode()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, breaking off after `breaks[i]` bytes of the i-th answer; knows Range if `ranges`."""

    content, breaks, ranges, asked = b"", [], True, []
    length, moved, reset, reason = None, None, False, None  # what it says instead, and whether it ends with a reset

    def do_GET(self):
        if self.moved or self.reason:
            self.send_response(302 if self.moved else 500, self.reason)
            self.send_header("Location", self.moved or "")
            self.end_headers()
            return
        if self.content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        type(self).asked.append(wanted)
        if begin >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", self.length or str(len(self.content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        n = self.breaks.pop(0) if self.breaks else len(self.content)
        self.wfile.write(self.content[begin : begin + n])
        if self.reset and n < len(self.content):
            time.sleep(0.2)  # until what was sent has come
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def known(tmp_path, monkeypatch, address):
    """The known corpus "fake" and an empty cache folder."""
    digest = hashlib.sha256(FAKE).hexdigest()
    entry = fetch.KnownCorpus(f"{address}/f.txt", len(FAKE), f"sha256:{digest}", 9000, 10_000, "  <page>")
    monkeypatch.setitem(fetch.KNOWN, "fake", entry)
    monkeypatch.setenv("MINI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    Server.content, Server.breaks, Server.ranges, Server.asked = FAKE, [], True, []
    Server.length, Server.moved, Server.reset, Server.reason = None, None, False, None
    return tmp_path / "cache"


def test_the_table_of_known_corpora():
    assert set(fetch.KNOWN) == {"enwik8", "text8", "tinyshakespeare"}
    for entry in fetch.KNOWN.values():
        algorithm, digest = entry.checksum.split(":")
        assert len(digest) == {"sha256": 64, "md5": 32}[algorithm]
        assert 0 < entry.train_end < entry.valid_end <= entry.size


@pytest.mark.parametrize("content", ["plain", "gz", "zip"])
def test_fetched_once_and_split_as_usual(known, tmp_path, content):
    if content == "gz":
        Server.content = gzip.compress(FAKE)
    if content == "zip":
        with zipfile.ZipFile(tmp_path / "f.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("readme", "no")
            archive.writestr("f", FAKE)
        Server.content = (tmp_path / "f.zip").read_bytes()
    train, valid = open_corpus("fake")
    assert [text_of(train), text_of(valid)] == [FAKE[:9000], FAKE[9000:10_000]]
    pages = documents_of(train)
    assert all(page.startswith("  <page>\npage ") and page.endswith("漢\n") for page in pages[:-1])
    assert len(pages) == FAKE[:9000].count(b"\n  ") + 1
    open_corpus("fake")
    assert Server.asked == [None] and os.listdir(known) == ["fake.txt"]

    write(tmp_path / "other.txt", "other text")
    train, valid = open_corpus("other.txt", "fake")
    assert [text_of(train), text_of(valid)] == [b"other text", FAKE[9000:10_000]]
    train, valid = open_corpus("fake", "other.txt")
    assert [text_of(train), text_of(valid)] == [FAKE[:9000], b"other text"]
    write(tmp_path / "fake", "a file of this name comes first")
    train, valid = open_corpus("fake")
    assert text_of(train) + text_of(valid) == b"a file of this name comes first"
    assert 2 <= valid.n_bytes <= 5


def test_wrong_download_is_refused_and_removed(known):
    cases = [(FAKE[:-1] + b"?", "sha256"), (FAKE[:-1], "bytes instead of"), (b"PK\x03\x04xx", "zip")]
    for content, reason in cases:
        Server.content = content
        message = refused("fake")
        assert reason in message and "removed" in message
        assert os.listdir(known) == []
    Server.content = FAKE
    open_corpus("fake")


def test_servers_that_say_odd_things(known):
    Server.length = "abc"  # then only the checksum tells
    open_corpus("fake")
    (known / "fake.txt").unlink()
    Server.length, Server.content = None, FAKE * 400
    assert "larger than it should be" in refused("fake") and os.listdir(known) == []
    Server.content, Server.reason = FAKE, "a\x1b[2Jb"
    message = refused("fake")
    assert "500" in message and "\x1b" not in message
    Server.reason = None
    for nonsense in ("http://", "file:///etc/passwd", "gopher://x/", "http://[/", "http://127.0.0.1:99999/"):
        Server.moved = nonsense
        refused("fake")
    Server.moved = None
    open_corpus("fake")


def test_an_archive_that_says_it_is_small_is_not_unpacked_for_ever(known, tmp_path):
    Server.content = gzip.compress(b"0" * 50_000_000)
    assert "bytes instead of" in refused("fake") and os.listdir(known) == []


def test_archives_that_cannot_be_read_are_thrown_away(known):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("fake", FAKE)
    whole = packed.getvalue()
    for at in range(30, 130, 7):
        Server.content = whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]
        with contextlib.suppress(UserError):  # a name or a time may be another
            open_corpus("fake")
        assert not (known / "fake.part").exists()
        (known / "fake.txt").unlink(missing_ok=True)


def test_a_cache_that_may_only_be_read(known, monkeypatch):
    known.mkdir()
    (known / "fake.txt").write_bytes(FAKE)
    monkeypatch.setattr(fetch, "locked", None)
    open_corpus("fake")


def test_what_has_come_before_a_reset_is_kept(known):
    Server.breaks, Server.reset = [3000], True
    open_corpus("fake")
    assert Server.asked == [None, "bytes=3000-"]


def test_broken_download_goes_on_where_it_broke(known):
    Server.breaks = [5000, 1000]
    open_corpus("fake")
    assert Server.asked == [None, "bytes=5000-", "bytes=6000-"]
    (known / "fake.txt").unlink()

    Server.asked, Server.breaks = [], [7000, 0]  # breaks, and then not a byte more: we give up
    message = refused("fake")
    assert f"the connection broke after 7,000 of {len(FAKE):,} bytes" in message and "try again" in message
    assert os.listdir(known) == ["fake.part"]
    open_corpus("fake")
    assert Server.asked == [None, "bytes=7000-", "bytes=7000-"] and os.listdir(known) == ["fake.txt"]


def test_server_without_range_starts_over(known):
    Server.ranges, Server.breaks = False, [5000]
    open_corpus("fake")
    assert Server.asked == [None, "bytes=5000-"]
    assert (known / "fake.txt").read_bytes() == FAKE


@pytest.mark.parametrize("part", [FAKE, FAKE + b"too long"])
def test_a_part_that_is_whole_or_too_long(known, part):
    write(known / "fake.part", part)
    open_corpus("fake")
    assert Server.asked == [f"bytes={len(part)}-"] + [None] * (part != FAKE)


def test_no_network_says_what_to_do_and_takes_a_file_by_hand(known, monkeypatch):
    address = "http://127.0.0.1:9/f.zip"  # nobody listens there
    entry = fetch.KNOWN["fake"]
    monkeypatch.setitem(fetch.KNOWN, "fake", fetch.KnownCorpus(address, entry.size, entry.checksum, 9000, 10_000))
    message = refused("fake")
    for part in (address, "refused", known / "fake.zip", known / "fake.txt", f"{len(FAKE):,}", "--data"):
        assert str(part) in message
    for name, content in (("fake.gz", gzip.compress(FAKE)), ("fake", FAKE), ("fake.txt", FAKE)):
        write(known / name, content)
        assert text_of(open_corpus("fake")[0]) == FAKE[:9000]
        (known / "fake.txt").unlink()
        (known / name).unlink(missing_ok=True)
    for name in ("fake.zip", "fake.txt"):
        path = write(known / name, b"something else")
        assert path in refused("fake") and Path(path).exists()  # not ours to delete
        Path(path).unlink()


def test_what_else_stands_in_the_way_of_fetching(known, monkeypatch):
    Server.content = None
    assert "the server answered 404" in refused("fake")
    write(known.parent / "file", "")
    monkeypatch.setenv("MINI_CACHE", str(known.parent / "file" / "cache"))
    assert "MINI_CACHE" in refused("fake")
