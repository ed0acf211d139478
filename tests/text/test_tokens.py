"""Token folders: exact tokens, documents and sentences; whole or not there."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mini.errors import UserError
from mini.text import corpus, tokens
from mini.text.corpus import DataConfig, open_corpus
from mini.text.tokenizer import train_bpe
from mini.text.tokenizer_base import ByteTokenizer
from mini.text.tokens import is_token_folder, open_tokens, sentence_starts, write_tokens

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "A cat sat. It slept!  Then\n\nit woke up é漢😀.\n",
    "x",
    'First line\n\nSecond (really.) Third? "Yes." No.',
    "漢字。漢字。 End.",
    "word " * 300,
    *(f"Document {i}. It has {i} words. " + "la " * i for i in range(80)),
]


class TinyTokenizer:
    """Bytes with ids from `first` on, and no end of text."""

    kind, lossless, eot, fingerprint = "tiny", True, None, "f" * 64

    def __init__(self, first: int = 0):
        self.first, self.vocab_size = first, first + 256
        self.byte_lengths = np.repeat(np.array([0, 1]), [first, 256])

    def encode_array(self, text):
        return np.frombuffer(text, np.uint8).astype(np.uint32) + self.first

    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


class TripletTokenizer(TinyTokenizer):
    """A token for every three bytes, whatever they are: it does not respect where sentences start."""

    byte_lengths, vocab_size = np.array([0, 1, 2, 3]), 4

    def __init__(self):
        pass

    def encode_array(self, text):
        full, rest = divmod(len(text), 3)
        return np.array([3] * full + [rest] * (rest > 0), np.uint32)


class WordTokenizer(TinyTokenizer):
    """A token per word, by its length; white space is dropped, as WordPiece does."""

    byte_lengths, vocab_size, eot, lossless = np.arange(100), 100, 0, False

    def __init__(self):
        pass

    def encode_array(self, text):
        return np.array([len(word) for word in bytes(text).split()], np.uint32)


def bpe():
    return train_bpe(DOCUMENTS, 300, progress=False)


@pytest.fixture
def splits(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    train, valid = open_corpus(DataConfig(str(path)))
    return {"train": train, "valid": valid}


def one_document(tmp_path, text):
    (tmp_path / "one.txt").write_bytes(text.encode())
    train, valid = open_corpus(DataConfig(str(tmp_path / "one.txt"), valid=str(tmp_path / "one.txt")))
    return {"train": train, "valid": valid}


# --- What is in the files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bpe, ByteTokenizer, TinyTokenizer])
@pytest.mark.parametrize("sizes", [(2**19, 2**19), (200, 50)])  # characters of a piece, bytes of a batch
def test_tokens_are_the_text_document_by_document(tmp_path, splits, monkeypatch, make, sizes):
    monkeypatch.setattr(corpus, "PIECE", sizes[0])
    monkeypatch.setattr(tokens, "BATCH", sizes[1])
    tokenizer = make()
    decode = tokenizer.decode_bytes if tokenizer.eot else lambda ids: bytes(ids)
    folder = write_tokens(splits, tokenizer, tmp_path / "out", progress=False, workers=3)

    texts = []
    for name, file in (("train", folder.train), ("valid", folder.valid)):
        assert file.tokens.dtype == np.uint16 and file.documents.dtype == file.sentences.dtype == np.uint64
        for begin, end in zip(file.documents, [*file.documents[1:], len(file.tokens)], strict=True):
            ids = file.tokens[int(begin) : int(end)].tolist()
            if tokenizer.eot is not None:
                assert ids.pop(0) == tokenizer.eot and tokenizer.eot not in ids
            texts.append(decode(ids).decode())
        assert np.isin(file.documents, file.sentences).all()
        assert (np.diff(file.sentences.astype(np.int64)) > 0).all()
        assert file.n_bytes == splits[name].n_bytes == tokenizer.byte_lengths[file.tokens].sum()
        assert file.sha256 == hashlib.sha256((tmp_path / "out" / f"{name}.tokens").read_bytes()).hexdigest()
    assert texts == DOCUMENTS

    assert folder.meta.vocab_size == tokenizer.vocab_size
    assert folder.meta.splits.train.n_documents == len(folder.train.documents)
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("make", [bpe, ByteTokenizer, TinyTokenizer])
def test_sentences_start_at_the_white_space_before_them(tmp_path, splits, make):
    tokenizer = make()
    file = write_tokens(splits, tokenizer, tmp_path / "out", progress=False).train
    ends = np.append(file.sentences[1:], len(file.tokens)).astype(np.int64)
    found = []
    for begin, end in zip(file.sentences.astype(np.int64), ends, strict=True):
        ids = [i for i in file.tokens[begin:end].tolist() if i != tokenizer.eot]
        found.append((tokenizer.decode_bytes(ids) if tokenizer.eot else bytes(ids)).decode())
    assert found[:13] == [
        "A cat sat.", " It slept!", "  Then", "\n\nit woke up é漢😀.\n",
        "x",
        "First line", "\n\nSecond (really.)", " Third?", ' "Yes."', " No.",
        "漢字。", "漢字。", " End.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "One.| Two!|\tThree?!|\n\nfour.| (Five.)| “Six.”| Seven...| 8.| é",
        "Heading|\n\nitem|  \n \r\n- item",
        "Mr. Smith met Dr. No, e.g. Tuesday, vs. J. R. Ewing. small.| Or not.5 either.\n",
        "\n\n Leading and trailing.  \n\n",
        "U.S. Navy.|\nIt ends.",
        "漢字。|漢字！",
    ],
)
def test_where_sentences_end(text):
    parts = text.encode().split(b"|")  # a bar where a sentence ends
    expected = np.cumsum([len(part) for part in parts])[:-1]
    whole = b"".join(parts)
    np.testing.assert_array_equal(sentence_starts(b"", whole), expected)
    for cut in range(1, len(whole)):  # and wherever the text is cut before white space
        if whole[cut : cut + 1].isspace() and not whole[cut - 1 : cut].isspace():
            first, second = sentence_starts(b"", whole[:cut]), sentence_starts(whole[:cut], whole[cut:])
            np.testing.assert_array_equal(np.append(first, cut + second), expected)


def test_cuts_and_threads_change_nothing(tmp_path, monkeypatch):
    text = "".join(f"Here is sentence {i}.  And\n\nhere (so to say.)\nis {i} more. " for i in range(300))
    splits, tokenizer, written = one_document(tmp_path, text), bpe(), []
    for piece, batch, workers in [(2**19, 2**19, 1), (40, 1, 1), (57, 300, 4), (40, 700, 2)]:
        monkeypatch.setattr(corpus, "PIECE", piece)
        monkeypatch.setattr(tokens, "BATCH", batch)
        write_tokens(splits, tokenizer, tmp_path / "out", progress=False, workers=workers)
        written.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert len(open_tokens(tmp_path / "out").train.sentences) == 300 * 3
    assert all(files == written[0] for files in written)


def test_sentences_of_odd_text_take_no_time():
    start = time.process_time()
    for text in (b"." * 300_000, b"\n" * 300_000, b".)" * 150_000, b". " * 150_000, b"a." + b" " * 300_000):
        sentence_starts(b"", text)
    assert time.process_time() - start < 60  # a fraction of a second; quadratic would be hours


def test_a_sentence_inside_a_token_starts_at_that_token(tmp_path):
    splits = one_document(tmp_path, "A! Bc ef.  Gh.\n\ni")  # starts: bytes 2, 9, 14; the first is in token 0
    file = write_tokens(splits, TripletTokenizer(), tmp_path / "out", progress=False).train
    assert file.sentences.tolist() == [0, 3, 4] and file.documents.tolist() == [0]


def test_a_tokenizer_that_drops_white_space(tmp_path):
    text = "One two. Three!   Four five six.\n\nseven"
    splits = one_document(tmp_path, text)
    file = write_tokens(splits, WordTokenizer(), tmp_path / "out", progress=False).train
    assert file.tokens.tolist() == [0, 3, 4, 6, 4, 4, 4, 5]
    assert file.sentences.tolist() == [0, 3, 4, 7] and file.n_bytes == len(text)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4"), (10**6, "<u4")])
def test_large_vocabularies_take_four_bytes(tmp_path, vocab_size, dtype):
    tokenizer = TinyTokenizer(vocab_size - 256)
    file = write_tokens(one_document(tmp_path, "text ÿ"), tokenizer, tmp_path / "out", progress=False).valid
    assert file.tokens.dtype == dtype
    assert bytes((file.tokens - tokenizer.first).tolist()).decode() == "text ÿ"


# --- Whole or not there -------------------------------------------------------------------------------------


def test_failure_half_way_leaves_nothing_or_what_was_there(tmp_path, splits, monkeypatch):
    class Failing(TinyTokenizer):
        def encode_array(self, text):
            if b"Document 60." in bytes(text):
                raise KeyboardInterrupt
            return super().encode_array(text)

    monkeypatch.setattr(tokens, "BATCH", 100)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(splits, Failing(), tmp_path / "sub" / "out", progress=False)
    assert os.listdir(tmp_path / "sub") == []
    before = write_tokens(splits, TinyTokenizer(), tmp_path / "sub" / "out", progress=False).meta
    with pytest.raises(KeyboardInterrupt):
        write_tokens(splits, Failing(), tmp_path / "sub" / "out", progress=False)
    assert os.listdir(tmp_path / "sub") == ["out"] and open_tokens(tmp_path / "sub" / "out").meta == before
    after = write_tokens(splits, ByteTokenizer(), tmp_path / "sub" / "out", progress=False).meta
    assert after.vocab_size == 257


def test_killed_half_way_leaves_nothing_that_looks_whole(tmp_path):
    (tmp_path / "text.txt").write_text("Some words. " * 1000)
    code = """if True:
        import os, signal, sys
        from mini.text import corpus, tokens
        from mini.text.tokenizer import ByteTokenizer
        class Killed(ByteTokenizer):
            calls = 0
            def encode_array(self, text):
                self.calls += 1
                if self.calls == 40:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().encode_array(text)
        corpus.PIECE = tokens.BATCH = 100
        train, valid = corpus.open_corpus(corpus.DataConfig("text.txt"))
        tokens.write_tokens({"train": train, "valid": valid}, Killed(), "out", workers=1)
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert result.returncode == -signal.SIGKILL
    left = sorted(os.listdir(tmp_path))
    assert len(left) == 2 and left[0].startswith(".out.") and left[1] == "text.txt"  # it had begun
    assert not any(is_token_folder(tmp_path / name) for name in left)
    train, valid = open_corpus(DataConfig(str(tmp_path / "text.txt")))
    write_tokens({"train": train, "valid": valid}, ByteTokenizer(), tmp_path / "out", progress=False)
    assert is_token_folder(tmp_path / "out")


def test_only_a_token_folder_is_replaced(tmp_path, splits):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "empty").mkdir()
    for name in ("mine", "mine/thesis.tex"):
        with pytest.raises(UserError, match="not a token folder"):
            write_tokens(splits, TinyTokenizer(), tmp_path / name, progress=False)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    write_tokens(splits, TinyTokenizer(), tmp_path / "empty", progress=False)


def test_damaged_folders_are_refused(tmp_path, splits):
    out = tmp_path / "out"
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="not a token folder"):
            open_tokens(path)
    write_tokens(splits, TinyTokenizer(), out, progress=False)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(whole) == {"meta.json", "tokenizer.json"} | {
        f"{split}.{kind}" for split in ("train", "valid") for kind in ("tokens", "documents", "sentences")
    }
    for name in whole:
        if name.startswith(("train", "valid")):
            (out / name).write_bytes(whole[name][:-1])
            with pytest.raises(UserError, match=f"{name}: .* bytes instead of"):
                open_tokens(out)
            (out / name).write_bytes(whole[name])
    (out / "valid.tokens").unlink()
    with pytest.raises(UserError, match="0 bytes instead of"):
        open_tokens(out)
    meta = json.loads(whole["meta.json"])
    for wrong in ({**meta, "format": "other"}, {**meta, "dtype": "float64"}, {**meta, "splits": {}}, [1]):
        (out / "meta.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"meta\.json"):
            open_tokens(out)
    (out / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta\.json"):
        open_tokens(out)
