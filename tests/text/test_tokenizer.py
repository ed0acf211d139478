import base64
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from mini.errors import UserError
from mini.text import tokenizer as module
from mini.text.tokenizer import BPETokenizer, gpt2_splitter, load_ranks, load_tokenizer, make_tokenizer, train_bpe
from mini.text.tokenizer_base import ByteTokenizer, blocks

TEXT = "the cat and the hat: that is what they had. I'll say it's 1984 or 42% of naïve 日本 text.\n\n" * 3
MIXED = "I'll 12ab  don't\n\n y_²é!? 日本 \u3000z\x1c\x85 <|endoftext|> 😀 e\u0301\t\tend  "
BYTES = {bytes([b]): b for b in range(256)}
# GPT-2 numbers the single bytes: first the printable ones, then the others.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
GPT2_BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]


def words_of(text):
    return Counter(re.findall(" ?[a-z]+", text))  # enough for texts of lower-case words and single spaces


def naive_bpe(words, vocab_size):
    """BPE as in the paper, counting everything anew for each merge: the tokens in order."""
    words = [([bytes([b]) for b in word.encode()], n) for word, n in words.items()]
    tokens = list(BYTES)
    while len(tokens) < vocab_size - 1:
        counts = Counter()
        for word, n in words:
            for pair in itertools.pairwise(word):
                counts[pair] += n
        if not counts:
            break
        ids = {token: i for i, token in enumerate(tokens)}
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        tokens.append(best[0] + best[1])
        for word, _ in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return tokens


def train_all(text):
    """Trained until every piece is one token."""
    with pytest.raises(UserError) as error:
        train_bpe([text], 10**6, progress=False)
    most = int(re.search(r"yields only (\d+);", str(error.value)).group(1))
    with pytest.raises(UserError, match=f"yields only {most};"):
        train_bpe([text], most + 1, progress=False)
    return train_bpe([text], most, progress=False)


def write_ranks(path, ranks):
    path.write_text("".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()))
    return path


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([TEXT], 300, progress=False)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


# ---- training


def test_merges_computed_by_hand():
    # Pieces: "low" twice, " low" twice, " lower" once, "aaa" three times. The most frequent pairs are aa 6;
    # then lo 5 and ow 5, of which lo has the smaller ids; lo+w 5; " "+low 3 and aa+a 3, of which " " is the
    # smaller id; and of the pairs that occur once, e+r before " low"+e.
    texts = ["low low", "low low lower"] + ["aaa"] * 3
    trained = train_bpe(texts, 263, progress=False)
    merges = [trained.token_bytes(i) for i in range(256, 262)]
    assert merges == [b"aa", b"lo", b"low", b" low", b"aaa", b"er"]
    assert (trained.vocab_size, trained.eot) == (263, 262)


@pytest.mark.parametrize("letters", ["a", "ab", "abc", "abcdefgh"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_naive_trainer(letters, seed):
    rng = random.Random(seed)
    text = " ".join("".join(rng.choices(letters, k=rng.randint(1, 15))) for _ in range(60))
    tokens = naive_bpe(words_of(text), 340)
    assert len(tokens) > 260 and len(tokens) == len(set(tokens))
    trained = train_bpe([text], len(tokens) + 1, progress=False)
    assert list(trained.ranks) == tokens


def test_order_of_the_texts_does_not_matter():
    lines = TEXT.splitlines(keepends=True)
    one, other = (train_bpe(texts, 300, progress=False) for texts in (lines, reversed(lines)))
    assert one.ranks == other.ranks


def test_same_vocabulary_in_another_process(bpe):
    code = "import sys; from mini.text.tokenizer import *; print(train_bpe([sys.argv[1]], 300).fingerprint)"
    done = subprocess.run(
        [sys.executable, "-c", code, TEXT],
        cwd=Path(module.__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == bpe.fingerprint


def test_a_vocabulary_no_text_can_give_is_refused():
    for size in (0, 256):
        with pytest.raises(UserError, match=f"--vocab_size {size}: .*257"):
            train_bpe([TEXT], size, progress=False)
    assert train_bpe([], 257, progress=False).encode("a") == [97]
    # aaaa: aa, then aaaa; nothing else is left to merge.
    assert train_all("aaaa").vocab_size == 256 + 2 + 1


# ---- splitting


def test_pieces_are_those_of_tiktoken():
    pieces = ["I", "'ll", " 12", "ab", " ", " don", "'t", "\n\n", " y", "_", "²", "é", "!?", " 日本", " ",
              "\u3000", "z", "\x1c", "\x85", " <|", "endoftext", "|>", " 😀", " e", "\u0301", "\t", "\t",
              "end", "  "]  # fmt: skip
    assert gpt2_splitter().findall(MIXED) == pieces
    # Trained to the end on these pieces, tiktoken finds each to be one token only if it splits the same way.
    trained = train_all(MIXED)
    assert [trained.token_bytes(i).decode() for i in trained.encode(MIXED)] == pieces


def test_every_character_is_in_its_class():
    kinds = {"letter": [], "number": [], "space": [], "sign": []}
    for c in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(c)
        if category[0] in "LN":
            kinds["letter" if category[0] == "L" else "number"].append(c)
        elif category in ("Zs", "Zl", "Zp") or c in "\t\n\v\f\r\x85":  # Unicode's White_Space
            kinds["space"].append(c)
        else:
            kinds["sign"].append(c)
    for characters in map("".join, kinds.values()):
        assert gpt2_splitter().findall(characters) == [characters]


def test_cutting_into_blocks_changes_no_piece(bpe):
    rng = random.Random(0)
    for size in (1, 2, 7, 50):
        for _ in range(300):
            text = "".join(rng.choices("ab1_' \n\t\u3000\x1cé", k=rng.randint(0, 120)))
            cut = blocks(text, size)
            assert "".join(cut) == text
            whole = gpt2_splitter().findall(text)
            assert [piece for block in cut for piece in gpt2_splitter().findall(block)] == whole
            assert [i for block in cut for i in bpe.encode(block)] == bpe.encode(text)
    assert len(blocks("word " * 100, 50)) > 5


@pytest.mark.parametrize("run", ["a", " ", "\n "])
def test_a_million_times_the_same(bpe, run):
    text = run * (1_200_000 // len(run)) + "x"
    started = time.process_time()
    assert bpe.decode(bpe.encode_array(text)) == text
    assert len(gpt2_splitter().findall(text)) <= 3
    assert time.process_time() - started < 60  # a fraction of a second; quadratic would be hours


# ---- encoding and decoding


def test_round_trips(tokenizer):
    rng = random.Random(1)
    for text in ["", "a", TEXT, MIXED, "".join(chr(rng.randrange(32, 0xD800)) for _ in range(2000))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text.encode())
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        array = tokenizer.encode_array(text)
        assert array.dtype == np.uint32 and array.tolist() == ids
        assert "".join(tokenizer.decode_stream(ids)) == text
    for length in [1, 2, 3, 10, 5000]:
        for _ in range(20):
            data = rng.randbytes(length)
            ids = tokenizer.encode(data)
            assert tokenizer.decode_bytes(ids) == data
            assert tokenizer.byte_lengths[ids].sum() == length
            assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_stray_bytes_leave_the_text_around_them_alone(bpe):
    around = bpe.encode("the cat"), bpe.encode(" the hat")
    assert bpe.encode(b"the cat\xff\xfe the hat") == [*around[0], 255, 254, *around[1]]


def test_offsets_are_the_characters_a_token_comes_from(tokenizer):
    rng = random.Random(2)
    odd = "".join(chr(rng.randrange(*rng.choice([(128,), (0xD800,), (2**16, 2**20)]))) for _ in TEXT)
    for text in ["", "a", TEXT, MIXED, odd]:
        ids, spans = tokenizer.encode_with_offsets(text)
        assert ids.tolist() == tokenizer.encode(text)
        assert spans.shape == (len(ids), 2) and spans.dtype == np.int64
        byte = 0
        for token, (start, end) in zip(map(tokenizer.token_bytes, ids), spans, strict=True):
            # Fewer characters would not hold the token's bytes, and at both ends there is one of them.
            before, inside = len(text[:start].encode()), text[start:end].encode()
            assert before <= byte < before + len(text[start].encode())
            byte += len(token)
            assert before + len(inside) - len(text[end - 1].encode()) < byte <= before + len(inside)
        assert byte == len(text.encode())


def test_offsets_of_a_known_text(bpe):
    ids, spans = bpe.encode_with_offsets("é the")
    assert [bpe.token_bytes(i) for i in ids] == [b"\xc3", b"\xa9", b" the"]
    assert spans.tolist() == [[0, 1], [0, 1], [1, 5]]
    # A pair of surrogates in a str is two of its characters and one of the text; half a pair becomes U+FFFD.
    ids, spans = ByteTokenizer().encode_with_offsets("\ud83d\ude00\ud83da")
    assert spans.tolist() == [[0, 2]] * 4 + [[2, 3]] * 3 + [[3, 4]]


def test_which_tokens_continue_a_word(tokenizer):
    assert continuing(ByteTokenizer(), "ab-c é1 ") == [0, 1, 0, 0, 0, 0, 1, 1, 0]
    bpe = BPETokenizer(BYTES | {b" ab": 256, b"cd": 257, b"e ": 258}, {"<|endoftext|>": 259})
    ids = np.array([[256, 257, 97], [257, 256, 257], [258, 97, 195], [97, 259, 97]])  # .. <|endoftext|> between
    expected = [[False, True, True], [False, False, True], [False, False, True], [False] * 3]
    assert bpe.continues_word(ids).tolist() == expected
    assert tokenizer.continues_word(np.array([], np.uint32)).tolist() == []
    assert tokenizer.continues_word(np.array([97, tokenizer.eot, 97])).tolist() == [False] * 3
    named = tokenizer.with_special(["word"])
    assert named.continues_word(np.array([97, named.special["word"], 97])).tolist() == [False] * 3
    unused = BPETokenizer(BYTES, {"<|endoftext|>": 300})  # 256..299 are nothing
    assert unused.continues_word(np.array([97, 280, 97])).tolist() == [False] * 3


def continuing(tokenizer, text):
    return tokenizer.continues_word(tokenizer.encode_array(text)).astype(int).tolist()


NAMES = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def test_special_tokens_are_added_once(tokenizer, tmp_path):
    size = tokenizer.vocab_size
    assert (tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.pad) == (None,) * 4
    more = tokenizer.with_special([*NAMES, "<|endoftext|>", "[CLS]"])
    assert type(more) is type(tokenizer) and more.vocab_size == size + 4 and more.eot == tokenizer.eot
    assert (more.pad, more.cls, more.sep, more.mask) == (size, size + 1, size + 2, size + 3)
    assert more.fingerprint != tokenizer.fingerprint and tokenizer.vocab_size == size
    assert more.with_special(NAMES).fingerprint == more.fingerprint
    assert tokenizer.with_special([]).fingerprint == tokenizer.fingerprint

    text = f"{MIXED}[CLS] [MASK]"
    assert more.encode(text) == tokenizer.encode(text)  # their names in a text are text
    assert more.decode([97, more.mask, 98]) == "a[MASK]b" and more.byte_lengths[size:].tolist() == [0] * 4
    assert more.continues_word(np.array([97, more.mask, 98, 98])).tolist() == [False, False, False, True]

    more.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == more.fingerprint and again.special == more.special and again.mask == size + 3
    assert again.encode(text) == more.encode(text)


def test_half_a_surrogate_pair(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b")) == "a😀b"


def test_special_tokens_are_named_but_never_read(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids and len(ids) > 3
    assert tokenizer.decode([97, tokenizer.eot, 98]) == "a<|endoftext|>b"
    assert tokenizer.special == {"<|endoftext|>": tokenizer.eot}
    assert tokenizer.byte_lengths[tokenizer.eot] == 0
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)


def test_no_half_characters_in_the_stream():
    assert list(ByteTokenizer().decode_stream("é!".encode())) == ["", "é", "!", ""]


@pytest.mark.parametrize("wrong", [-1, 257, 10**6])
def test_an_id_of_another_tokenizer_is_refused(wrong):
    with pytest.raises(UserError, match=rf"token {wrong}: this tokenizer has 0\.\.256"):
        ByteTokenizer().decode([97, wrong])


def test_threads_share_a_tokenizer(bpe):
    texts = [TEXT[i:] * 20 for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(bpe.encode_array, texts))
    for text, ids in zip(texts, together, strict=True):
        assert np.array_equal(ids, bpe.encode_array(text))


# ---- files


def test_gpt2_ids(tmp_path):
    # The single bytes in GPT-2's order and four of its merges; where ids are missing nothing is encoded.
    ranks = {bytes([b]): i for i, b in enumerate(GPT2_BYTES)}
    ranks |= {b" t": 256, b"he": 258, b" world": 995, b"Hello": 15496}
    path = write_ranks(tmp_path / "small.tiktoken", ranks)
    gpt2 = make_tokenizer(str(path), lambda: pytest.fail("nothing to train"), 0)
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert gpt2.encode(" the") == [256, 258]
    assert (gpt2.eot, gpt2.vocab_size, gpt2.kind) == (15497, 15498, "bpe")
    assert gpt2.byte_lengths[[15496, 11, 995, 0, 1000, 15497]].tolist() == [5, 1, 6, 1, 0, 0]

    # The same as published: each byte as a printable character, a space as Ġ.
    show = {b: chr(b) if b in PRINTABLE else chr(256 + i - len(PRINTABLE)) for i, b in enumerate(GPT2_BYTES)}
    vocabulary = {"".join(show[b] for b in token): i for token, i in ranks.items()} | {"<|endoftext|>": 15497}
    assert vocabulary["Ġworld"] == 995
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')  # another program's
    published = make_tokenizer(str(folder), lambda: pytest.fail("nothing to train"), 0)
    assert published.fingerprint == gpt2.fingerprint
    assert published.encode("Hello, world!") == [15496, 11, 995, 0] and published.eot == 15497
    (folder / "vocab.json").unlink()  # newer folders have the vocabulary in tokenizer.json alone
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": vocabulary}}))
    assert load_tokenizer(folder).fingerprint == gpt2.fingerprint


def test_save_and_load(tmp_path, tokenizer):
    for folder in ("one", "two"):
        tokenizer.save(tmp_path / folder)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == (["tokenizer.json"] + ["tokenizer.tiktoken"] * (tokenizer.kind == "bpe"))
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for again in (load_tokenizer(tmp_path / "one"), make_tokenizer(str(tmp_path / "two"), list, 0)):
        assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint
        assert again.encode(MIXED) == tokenizer.encode(MIXED) and again.special == tokenizer.special
        again.save(tmp_path / "three")
        for name in files:
            assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_fingerprint_tells_tokenizers_apart(bpe):
    end = {"<|endoftext|>": 256}
    swapped = BYTES | {b"a": 98, b"b": 97}
    different = [
        ByteTokenizer(),
        bpe,
        BPETokenizer(BYTES, end),
        BPETokenizer(swapped, end),
        BPETokenizer(BYTES, {"<|endoftext|>": 257}),
        BPETokenizer(BYTES, end, pattern=r"\S+|\s+"),
    ]
    assert len({t.fingerprint for t in different}) == len(different)
    assert BPETokenizer(dict(reversed(BYTES.items())), end).fingerprint == different[2].fingerprint


def test_make_trains_only_when_asked():
    assert make_tokenizer("bpe", lambda: [TEXT], 280).fingerprint == train_bpe([TEXT], 280).fingerprint
    assert make_tokenizer("bytes", lambda: pytest.fail("nothing to train"), 0).vocab_size == 257


def test_gpt2_from_tiktoken(monkeypatch):
    ranks = {bytes([b]): i for i, b in enumerate(GPT2_BYTES)} | {b" t": 256, b"he": 257}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(module.tiktoken, "get_encoding", lambda name: {"gpt2": encoding}[name])
    gpt2 = make_tokenizer("gpt2", list, 0)
    assert gpt2.ranks == ranks and gpt2.eot == 258 and gpt2.pattern == module.GPT2_PATTERN

    def no_network(name):
        raise ConnectionError("a long text\nabout sockets")

    monkeypatch.setattr(module.tiktoken, "get_encoding", no_network)
    refused(r"pass a \.tiktoken ranks file with --tokenizer FILE instead", make_tokenizer, "gpt2", list, 0)


# ---- errors


def refused(pattern, function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert re.search(pattern, str(error.value)), error.value
    assert "\n" not in str(error.value)


def test_unknown_tokenizers(tmp_path):
    everything = "bpe, bytes, gpt2, a .tiktoken file, a WordPiece vocab.txt, .*folder.*BERT"
    refused(f"--tokenizer gpt5: .*{everything}", make_tokenizer, "gpt5", list, 0)
    refused("ranks.tiktoken: No such file", make_tokenizer, str(tmp_path / "ranks.tiktoken"), list, 0)
    refused(f"{tmp_path}: no tokenizer", load_tokenizer, tmp_path)
    refused(f"{tmp_path / 'none'}: no tokenizer", load_tokenizer, tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text('{"kind": "morse"}')
    refused("tokenizer.json: unknown kind of tokenizer 'morse'; known are", load_tokenizer, tmp_path)
    for wrong in ({}, {"special": None}, {"special": {"a": "b"}}, {"special": {"a": 256}, "vocab_size": 7}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "bytes"} | wrong))
        refused("tokenizer.json: damaged", load_tokenizer, tmp_path)


def test_broken_ranks_name_the_line(tmp_path):
    good = write_ranks(tmp_path / "good.tiktoken", BYTES | {b"ab": 256}).read_text()
    path = tmp_path / "bad.tiktoken"
    for line, message in [
        ("YWI= many", "257: 'YWI= many' should be"),
        ("YWI=", "257: 'YWI=' should be"),
        ("Y*I= 256", "257: .* should be"),
        ("YWI= -1", "257: token b'ab' has rank -1"),
        ("YWI= 99999999999", "257: token b'ab' has rank 99999999999"),
        ("YWI= 97", "257: token b'ab' or its rank 97 is there for the second time"),
        ("YQ== 256", "257: token b'a' or its rank 256 is there for the second time"),
    ]:
        path.write_text(good.replace("YWI= 256", line))
        refused(f"{path}:{message}", load_ranks, path)
    path.write_text(good.replace("YQ== 97\n", ""))
    refused(f"{path}: no token for the byte 0x61", load_ranks, path)
    assert load_ranks(tmp_path / "good.tiktoken")[b"ab"] == 256


def test_broken_folders(tmp_path, bpe):
    bpe.save(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    ranks = (tmp_path / "tokenizer.tiktoken").read_text()

    (tmp_path / "tokenizer.tiktoken").write_text(ranks.replace(" 97\n", " x\n").replace(" 98\n", " 97\n"))
    refused("tokenizer.tiktoken:98: .* should be", load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.tiktoken").write_text(ranks.replace(" 298\n", " 1298\n"))
    refused("tokenizer.json: does not fit the tokenizer.tiktoken", load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.tiktoken").unlink()
    refused("tokenizer.tiktoken: No such file", load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.tiktoken").write_text(ranks)
    for name, value in [("pattern", "("), ("pattern", 3), ("special", None), ("special", {"a": "b"})]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(description | {name: value}))
        refused("tokenizer.json: damaged", load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    refused("tokenizer.json: not a readable JSON file", load_tokenizer, tmp_path)


@pytest.mark.parametrize("vocabulary", ['{"a": 0}', '{"日": 0}', "[1]", '{"a": 0, "b": 0}', '{"a": "0"}'])
def test_broken_published_vocabulary(tmp_path, vocabulary):
    (tmp_path / "vocab.json").write_text(vocabulary)
    refused(f"{tmp_path / 'vocab.json'}: ", load_tokenizer, tmp_path)
