"""WordPiece: the ids of BERT's original, the characters they come from, files, and a token folder made with it."""

import itertools
import json
import random
import re
import sys
import time
import unicodedata

import numpy as np
import pytest

from mini.errors import UserError
from mini.text import wordpiece
from mini.text.corpus import DataConfig, open_corpus
from mini.text.tokenizer import load_tokenizer, make_tokenizer
from mini.text.tokenizer_base import END_OF_TEXT, ByteTokenizer
from mini.text.tokens import write_tokens
from mini.text.wordpiece import SPECIAL, WordPieceTokenizer, load_vocab

LETTERS = "abcdehilmnorstuwx"
VOCAB = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", ",", ".", "-", "$", "'", "(", ")", "[", "]"),
    *("un", "##aff", "##able", "want", "##want", "##ed", "runn", "##ing", "hello", "how", "are", "you", "?", "cafe"),
    *("Hello", "communications", "mask", "漢", "字", "α", "##σ", "##ς", "ᄀ", "##ᅡ", "##ᆨ", "\u0301", "É", "##é"),
    *LETTERS, *("##" + c for c in LETTERS),
]  # fmt: skip


def uncased():
    return WordPieceTokenizer(VOCAB)


def cased():
    return WordPieceTokenizer(VOCAB, lowercase=False)


def tokens(tokenizer, text):
    return [tokenizer.vocab[i] for i in tokenizer.encode(text)]


def spans(tokenizer, text):
    ids, places = tokenizer.encode_with_offsets(text)
    assert ids.tolist() == tokenizer.encode(text) and places.dtype == np.int64
    return [(tokenizer.vocab[i], text[a:b]) for i, (a, b) in zip(ids, places, strict=True)]


# --- The original, character by character -------------------------------------------------------------------


def plain_words(text, lowercase):
    """BasicTokenizer.tokenize of google-research/bert, tokenization.py."""
    clean = ""
    for c in text:
        category = unicodedata.category(c)
        if c in "\0\ufffd" or (category in ("Cc", "Cf") and c not in "\t\n\r"):
            continue
        cjk = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
               (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]  # fmt: skip
        if any(first <= ord(c) <= last for first, last in cjk):
            c = f" {c} "
        clean += " " if c in "\t\n\r" or category == "Zs" else c
    words = []
    for word in clean.split():
        if lowercase:
            word = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        for c in word:
            ascii_sign = 33 <= ord(c) <= 126 and not c.isalnum()
            words.append(f" {c} " if ascii_sign or unicodedata.category(c).startswith("P") else c)
        words.append(" ")
    return "".join(words).split()


def plain_encode(text, vocab, lowercase):
    """The whole: WordpieceTokenizer.tokenize of the words, as ids."""
    ids = {token: i for i, token in enumerate(vocab)}
    result = []
    for word in plain_words(text, lowercase):
        pieces, start = [], 0
        while start < len(word) <= 100:
            end = len(word)
            while end > start and ("##" if start else "") + word[start:end] not in ids:
                end -= 1
            if end == start:
                break
            pieces.append(ids[("##" if start else "") + word[start:end]])
            start = end
        result += pieces if start == len(word) else [ids["[UNK]"]]
    return result


POOLS = [
    "abcdeABCDE", "abcde ", " \t\n\r", ".,-$'()[]~^`|", "\0\x0b\x1c\x7f\x85\xad\u200b\u200d\ufeff\ufffd",
    "\xa0\u2003\u2028\u2029\u3000", "漢字豈㐀𠀀", "각가각", "éÉñÅ\u212bİıßſK\u1e9b\u0323", "ΑΣσς",
    "≠\u037e\u0387\u1fef", "\u0300\u0301\u0323\u05b0\u094d", "\u302e\u302f\u1b44\U0001d165\U0001d16d\U00016ff0",
    "\ue000\u0378\U0010ffff\ud83d\ude00", "😀«»、。ー・", "Ωяあア",
]  # fmt: skip


def random_texts(n, pools=POOLS):
    rng = random.Random(3)
    for _ in range(n):
        yield "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 40)))
        yield "".join(chr(rng.randrange(rng.choice([0x250, 0x3000, 0x110000]))) for _ in range(rng.randint(0, 20)))


@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_are_those_of_the_original(lowercase):
    known = {
        c for pool in POOLS for word in plain_words(pool, lowercase) for c in word if not "\ud800" <= c <= "\udfff"
    }
    known = sorted(known - set(VOCAB))
    vocab = [*VOCAB, *known, *("##" + c for c in known if "##" + c not in VOCAB)]
    tokenizer = WordPieceTokenizer(vocab, lowercase)
    n_known = 0
    for text in random_texts(2500):
        expected = plain_encode(text, vocab, lowercase)
        assert tokenizer.encode(text) == expected, ascii(text)
        assert tokenizer.encode_with_offsets(text)[0].tolist() == expected, ascii(text)
        n_known += sum(i != tokenizer.special["[UNK]"] for i in expected)
    assert n_known > 20_000


@pytest.mark.parametrize("lowercase", [True, False])
def test_every_character_is_treated_as_by_the_original(lowercase):
    tokenizer = WordPieceTokenizer(VOCAB, lowercase)
    edges = [0x3400, 0x4DBF, 0x4E00, 0x9FFF, 0xF900, 0xFAFF, 0x20000, 0x2A6DF, 0x2A700, 0x2CEAF, 0x2F800, 0x2FA1F]
    edges = {edge + k for edge in edges for k in (-1, 0, 1)}
    for i, c in enumerate(map(chr, range(sys.maxunicode + 1))):
        if i < 0x3400 or i in edges or unicodedata.category(c) not in ("Lo", "So", "Cn", "Co", "Cs"):
            assert tokenizer.encode(f"a{c}b") == plain_encode(f"a{c}b", VOCAB, lowercase), hex(i)


# --- Cases computed by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("unaffable", ["un", "##aff", "##able"]),
        ("Communications", ["communications"]),
        ("UNwant\u00c9d,running", ["un", "##want", "##ed", ",", "runn", "##ing"]),
        ("unwantedX running", ["un", "##want", "##ed", "##x", "runn", "##ing"]),
        ("unwanted# running", ["un", "##want", "##ed", "[UNK]", "runn", "##ing"]),
        ("unwantedZ running", ["[UNK]", "runn", "##ing"]),  # no ##z: the whole word is unknown
        (" \tHeLLo!how  \n Are yoU?  ", ["hello", "!", "how", "are", "you", "?"]),
        ("ah\u6f22\u5b57x", ["a", "##h", "漢", "字", "x"]),
        ("a\0b\ufffdc\u200bd \x7f\x0be", ["a", "##b", "##c", "##d", "e"]),
        ("caf\u00e9 cafe\u0301 CAF\u00c9", ["cafe"] * 3),
        ("a$b-(c).d", ["a", "$", "b", "-", "(", "c", ")", ".", "d"]),
        ("\u0391\u03a3 \u0391\u03a3\u0391", ["α", "##ς", "[UNK]"]),  # Σ ends a word as ς
        ("각 \u0301 [MASK]", ["ᄀ", "##ᅡ", "##ᆨ", "[", "mask", "]"]),
        ("a" * 100 + " " + "a" * 101 + " " + "\u00e9" * 100, ["a"] + ["##a"] * 99 + ["[UNK]"] + ["e"] + ["##e"] * 99),
    ],
)  # fmt: skip
def test_lower_case(text, expected):
    assert tokens(uncased(), text) == expected
    assert tokens(uncased(), text.encode()) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello hello HELLO", ["Hello", "hello", "[UNK]"]),
        ("\u00c9\u00e9 e\u0301 cafe", ["É", "##é", "[UNK]", "cafe"]),  # accents stay, as they are written
        ("漢\u0301!", ["漢", "\u0301", "!"]),
        ("a\u00adb\tc", ["a", "##b", "c"]),
    ],
)
def test_cased(text, expected):
    assert tokens(cased(), text) == expected


def test_bytes_that_are_not_utf8_are_dropped():
    assert tokens(uncased(), b"un\xffaff\xc3able") == ["un", "##aff", "##able"]


def test_cutting_into_blocks_changes_nothing(monkeypatch):
    text = "".join(random_texts(100)) + "\x85a\u2028b\xa0c\x0bd" * 50
    expected = plain_encode(text, VOCAB, True)
    assert uncased().encode(text) == expected
    real = wordpiece.blocks
    monkeypatch.setattr(wordpiece, "blocks", lambda text, space: real(text, 3, space))
    assert len(wordpiece.blocks(text, " \n")) > 50
    assert uncased().encode(text) == expected


def test_a_text_is_its_lines():
    tokenizer, lines = uncased(), [*random_texts(300), "", "unaffable ", " cafe"]
    assert tokenizer.encode("\n".join(lines)) == [i for line in lines for i in tokenizer.encode(line)]


def test_remembered_words_are_bounded(monkeypatch):
    monkeypatch.setattr(wordpiece, "CACHED_WORDS", 10)
    tokenizer = uncased()
    words = ["".join(word) for word in itertools.product("abcde", repeat=3)] * 2 + ["a" * 1000]
    assert tokenizer.encode(" ".join(words)) == plain_encode(" ".join(words), VOCAB, True)
    assert 0 < len(tokenizer.ids) <= 10 and max(map(len, tokenizer.ids)) == 3


def test_one_long_word_takes_no_time():
    started = time.process_time()
    for word in ("a" * 1_000_000, "\u00e9" * 300_000, "\u0301" * 300_000):
        assert len(uncased().encode(word)) <= 1 and len(uncased().encode_with_offsets(word[:50_000])[1]) <= 1
    assert time.process_time() - started < 60  # a fraction of a second; quadratic would be hours


# --- Where a token comes from -------------------------------------------------------------------------------


def test_offsets():
    assert spans(uncased(), " UnaffABLE,\n漢字x") == [
        ("un", "Un"), ("##aff", "aff"), ("##able", "ABLE"), (",", ","), ("漢", "漢"), ("字", "字"), ("x", "x"),
    ]  # fmt: skip
    assert spans(uncased(), "Caf\u00e9 \0cafe\u0301!") == [("cafe", "Caf\u00e9"), ("cafe", "cafe\u0301"), ("!", "!")]
    # An accent between two tokens belongs to the letter before it; what is dropped inside of one is covered.
    assert spans(uncased(), "u\u0302n\u0303\u00e1\u00adffab\u200dle") == [
        ("un", "u\u0302n\u0303"), ("##aff", "\u00e1\u00adff"), ("##able", "ab\u200dle"),
    ]  # fmt: skip
    assert spans(uncased(), "a zzunzz\u0301. \u0130i") == [
        ("a", "a"), ("[UNK]", "zzunzz\u0301"), (".", "."), ("i", "\u0130"), ("##i", "i"),
    ]  # fmt: skip
    assert spans(uncased(), "각") == [("ᄀ", "각"), ("##ᅡ", "각"), ("##ᆨ", "각")]  # one character, three tokens
    assert spans(cased(), "Hello \u00c9\u00e9") == [("Hello", "Hello"), ("É", "\u00c9"), ("##é", "\u00e9")]
    assert uncased().encode_with_offsets(" \u0301")[1].shape == (0, 2)


def test_offsets_where_nfd_sorts_accents():
    # U+302E (class 224) comes behind U+1B44 (class 9) in NFD, and neither is dropped.
    text = "a\u302e\u1b44b"
    tokenizer = WordPieceTokenizer([*VOCAB, "##\u1b44", "##\u302e"])
    assert spans(tokenizer, text) == [("a", "a"), ("##\u1b44", "\u1b44"), ("##\u302e", "\u302e"), ("##b", "b")]
    tokenizer = WordPieceTokenizer([*VOCAB, "##\u1b44\u302e"])
    assert spans(tokenizer, text) == [("a", "a"), ("##\u1b44\u302e", "\u302e\u1b44"), ("##b", "b")]


@pytest.mark.parametrize("make", [uncased, cased])
def test_the_characters_of_a_word_alone_give_the_word(make):
    tokenizer, n_words = make(), 0
    for text in random_texts(1000, [pool for pool in POOLS if "Σ" not in pool]):  # Σ looks at its neighbours
        ids, places = tokenizer.encode_with_offsets(text)
        starts = np.flatnonzero(~tokenizer.continues_word(ids))
        for a, b in itertools.pairwise([*starts, len(ids)]):
            assert tokenizer.encode(text[places[a, 0] : places[b - 1, 1]]) == ids[a:b].tolist(), ascii(text)
            n_words += 1
    assert n_words > 5000


# --- Tokens -------------------------------------------------------------------------------------------------


def test_what_a_token_is():
    tokenizer = uncased()
    assert tokenizer.special == {"[PAD]": 0, "[UNK]": 2, "[CLS]": 3, "[SEP]": 4, "[MASK]": 5}
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.eot) == (0, 3, 4, 5, None)
    assert tokenizer.vocab_size == len(VOCAB) and not tokenizer.lossless and ByteTokenizer().lossless
    wanted = [VOCAB.index(token) for token in ("[CLS]", "##able", "漢", "\u0301")]
    assert [tokenizer.token_bytes(i).decode() for i in wanted] == ["[CLS]", "able", "漢", "\u0301"]
    assert tokenizer.byte_lengths[wanted].tolist() == [0, 4, 3, 2]
    with pytest.raises(UserError, match="this tokenizer has"):
        tokenizer.decode([len(VOCAB)])


def test_decoding():
    tokenizer = uncased()
    for text, expected in [("Unaffable, h\u00f4w!", "unaffable , how !"), ("", ""), ("漢字 a", "漢 字 a")]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == "".join(tokenizer.decode_stream(ids)) == expected
        assert tokenizer.decode_bytes(ids) == expected.encode()
        assert tokenizer.encode(expected) == ids
    assert list(tokenizer.decode_stream(tokenizer.encode("a unaffable"))) == ["a", " un", "aff", "able"]
    assert tokenizer.decode([tokenizer.cls, *tokenizer.encode("how"), tokenizer.mask]) == "[CLS] how [MASK]"


def test_which_tokens_continue_a_word():
    tokenizer = uncased()
    ids = tokenizer.encode_array("unaffable, unwanted")
    assert tokenizer.continues_word(ids).tolist() == [False, True, True, False, False, True, True]
    able = VOCAB.index("##able")
    rows = np.array(
        [[able, able, able], [tokenizer.mask, able, able]]
    )  # not what follows a special token, nor the first
    assert tokenizer.continues_word(rows).tolist() == [[False, True, True], [False, False, True]]


# --- Files --------------------------------------------------------------------------------------------------


def write_vocab(path, vocab=VOCAB):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8")
    return path


@pytest.mark.parametrize("make", [uncased, cased])
def test_save_and_load(tmp_path, make):
    tokenizer = make()
    tokenizer.save(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["tokenizer.json", "vocab.txt"]
    assert (tmp_path / "one" / "vocab.txt").read_text(encoding="utf-8").splitlines() == VOCAB
    for opened in ("one", "one/vocab.txt"):
        again = make_tokenizer(str(tmp_path / opened), list, 0)
        assert again.kind == "wordpiece" and again.fingerprint == tokenizer.fingerprint
        assert again.lowercase == tokenizer.lowercase and again.special == tokenizer.special
        again.save(tmp_path / "two")
        for name in ("tokenizer.json", "vocab.txt"):
            assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    write_vocab(tmp_path / "one" / "vocab.txt", [*VOCAB[:-2], VOCAB[-1], VOCAB[-2]])
    refused(r"tokenizer.json: does not fit the vocab.txt beside it", load_tokenizer, tmp_path / "one")


def test_fingerprint_tells_tokenizers_apart():
    swapped = [*VOCAB[:-2], VOCAB[-1], VOCAB[-2]]
    different = [uncased(), cased(), WordPieceTokenizer(swapped), uncased().with_special([END_OF_TEXT])]
    assert len({tokenizer.fingerprint for tokenizer in different}) == 4


def test_special_tokens_are_added(tmp_path):
    tokenizer = uncased()
    assert tokenizer.with_special(SPECIAL).fingerprint == tokenizer.fingerprint
    more = tokenizer.with_special(["[MASK]", END_OF_TEXT, "[unused0]", "hello", "hello"])
    assert more.eot == len(VOCAB) and more.vocab_size == len(VOCAB) + 1 and more.mask == 5
    assert more.special["[unused0]"] == 1 and more.special["hello"] == VOCAB.index("hello")  # ids they had
    assert tokens(more, "hello <|endoftext|>")[:5] == ["h", "##e", "##l", "##l", "##o"]  # as text it is text
    assert more.eot not in more.encode(END_OF_TEXT) and more.decode([more.eot]) == END_OF_TEXT
    more.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == more.fingerprint and again.special == more.special and again.eot == more.eot


def test_published_folders(tmp_path):
    path = write_vocab(tmp_path / "bert" / "vocab.txt")
    config = tmp_path / "bert" / "tokenizer_config.json"
    for settings, lowercase in [
        (None, True), ({}, True), ({"do_lower_case": False}, False),
        ({"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}, True),
    ]:  # fmt: skip
        if settings is not None:
            config.write_text(json.dumps(settings))
        for tokenizer in (load_tokenizer(path.parent), make_tokenizer(str(path), list, 0)):
            assert tokenizer.vocab == VOCAB and tokenizer.lowercase is lowercase
    for name, value in [("do_lower_case", "yes"), ("strip_accents", False), ("tokenize_chinese_chars", False)]:
        config.write_text(json.dumps({name: value}))
        refused(f"vocab.txt: its settings have {name} ", load_tokenizer, path.parent)


@pytest.mark.parametrize("kind", [{"type": "WordPiece"}, {"max_input_chars_per_word": 100}])  # newer, older
def test_published_folders_with_tokenizer_json_alone(tmp_path, kind):
    path = tmp_path / "tokenizer.json"

    def write(normalizer, ids):
        path.write_text(json.dumps({"version": "1.0", "normalizer": normalizer, "model": {**kind, "vocab": ids}}))

    ids = {token: i for i, token in reversed(list(enumerate(VOCAB)))}
    for lowercase in (True, False):
        steps = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": lowercase}
        write({"type": "BertNormalizer", **steps}, ids)
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.vocab == VOCAB and tokenizer.lowercase is lowercase
        assert tokenizer.fingerprint == (uncased() if lowercase else cased()).fingerprint
    write({"type": "Sequence", "normalizers": []}, ids)
    refused("tokenizer.json: its settings have type 'Sequence'", load_tokenizer, tmp_path)
    for wrong in (ids | {"hello": 3}, ids | {"hello": "x"}, ids | {"more": len(ids) + 1}, [1]):
        write({"type": "BertNormalizer"}, wrong)
        refused(f"{path}: not WordPiece's", load_tokenizer, tmp_path)
    write({"type": "BertNormalizer"}, {token: i for i, token in enumerate(t for t in VOCAB if t != "[SEP]")})
    refused(rf"{path}: no \[SEP\]", load_tokenizer, tmp_path)


def refused(pattern, function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert re.search(pattern, str(error.value)), error.value
    assert "\n" not in str(error.value)


def test_line_ends_and_odd_lines_of_a_vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    vocab = [*VOCAB, "\u2028", "##\x85", "\u3000"]  # each is one line
    for text in ("\n".join(vocab), "\n".join(vocab) + "\n", "\r\n".join(vocab), "\ufeff" + "\n".join(vocab)):
        path.write_bytes(text.encode())
        assert load_vocab(path) == vocab


def test_bad_vocabularies_name_file_and_line(tmp_path):
    path = tmp_path / "vocab.txt"
    write_vocab(path, [*VOCAB, "un"])
    refused(
        f"{path}:{len(VOCAB) + 1}: 'un' is there already, in line {VOCAB.index('un') + 1}", load_tokenizer, tmp_path
    )
    for name in SPECIAL:
        write_vocab(path, [token for token in VOCAB if token != name])
        refused(rf"{path}: no {re.escape(name)}; ", make_tokenizer, str(path), list, 0)
    path.write_bytes(b"")
    refused(f"{path}: no ", load_tokenizer, tmp_path)
    path.write_bytes("[PAD]\n漢\n".encode() + b"\xff\n")
    refused(f"{path}:3: not UTF-8", load_tokenizer, tmp_path)
    refused("none.txt: No such file.*WordPiece", make_tokenizer, str(tmp_path / "none.txt"), list, 0)


# --- Token folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eot", [False, True])
def test_token_folder_by_sentences(tmp_path, eot):
    documents = ["Caf\u00e9 how. Unaffable!  Are you?\n\nHello", "漢字。漢字。 a b.", "how are you. \u00a0 \x85"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    path = str(tmp_path / "text.jsonl")
    train, valid = open_corpus(DataConfig(path, valid=path))
    tokenizer = uncased().with_special([END_OF_TEXT] if eot else [])
    file = write_tokens({"train": train, "valid": valid}, tokenizer, tmp_path / "out", progress=False).train

    starts = [int(i) for i in file.documents]
    for text, a, b in zip(documents, starts, [*starts[1:], len(file.tokens)], strict=True):
        assert file.tokens[a:b].tolist() == [tokenizer.eot] * eot + tokenizer.encode(text)
    starts = [int(i) for i in file.sentences]
    sentences = [file.tokens[a:b].tolist() for a, b in itertools.pairwise([*starts, len(file.tokens)])]
    assert [tokenizer.decode(ids[eot and ids[0] == tokenizer.eot :]) for ids in sentences] == [
        "cafe how .", "unaffable !", "are you ?", "hello",
        "漢 字 [UNK]", "漢 字 [UNK]", "a b .", "how are you .",
    ]  # fmt: skip
    assert file.n_bytes == sum(len(text.encode()) for text in documents)
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint
