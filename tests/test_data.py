"""Data as a function of the step."""

import json

import numpy as np
import pytest
import torch

from mini.config import DataConfig, UserError
from mini.data import IGNORE, LabelledTexts, LMWindows, PromptAnswers, permute, prepare_tokens, read_rows, shuffled
from mini.tokenizer import ByteTokenizer
from mini.tokens import TokenFile

TOKENIZER = ByteTokenizer()
EOT = TOKENIZER.eot


def token_file(n: int) -> TokenFile:
    none = np.zeros(1, dtype=np.uint64)
    return TokenFile((np.arange(n) % 251).astype(np.uint16), none, none, n, "")


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(n):
    places = np.arange(n)
    images = [permute(places, n, key) for key in (1, 2)]
    for image in images:
        assert sorted(image) == list(range(n))
    if n >= 16:
        assert not np.array_equal(*images)
        assert not np.array_equal(images[0], places)


def test_permute_spreads():
    """Neighbours end up far apart: no window is followed by the next one more often than by chance."""
    image = permute(np.arange(100_000), 100_000, 5)
    assert np.corrcoef(np.arange(100_000), image)[0, 1] == pytest.approx(0, abs=0.02)
    assert (np.diff(image) == 1).sum() < 10


def test_permute_of_a_huge_corpus_needs_no_memory():
    image = permute(np.arange(5), 10**12, 3)
    assert len(set(image)) == 5 and image.max() < 10**12


def test_each_epoch_visits_every_example_once_in_a_fresh_order():
    n = 37
    drawn = shuffled(np.arange(3 * n), n, seed=1).reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in drawn)
    assert len({tuple(epoch) for epoch in drawn}) == 3
    assert np.array_equal(drawn[1], shuffled(np.arange(n, 2 * n), n, seed=1))  # no need to ask for the first epoch
    assert not np.array_equal(drawn[0], shuffled(np.arange(n), n, seed=2))


def test_windows_tile_the_text():
    data = LMWindows(token_file(1003), token_file(50), TOKENIZER, max_len=10, seed=0)
    assert data.n == 100
    batch = data.batch(np.arange(100))
    assert batch.counts == {"loss": 1000} and batch.n_tokens == 1000
    assert torch.equal(batch.inputs["targets"][:, :-1], batch.inputs["tokens"][:, 1:])
    text = np.sort(batch.inputs["tokens"].numpy(), axis=None)
    assert np.array_equal(text, np.sort(np.arange(1000) % 251))


def test_a_batch_does_not_depend_on_who_draws_it():
    data = LMWindows(token_file(1003), token_file(50), TOKENIZER, max_len=10, seed=0)
    whole = data.batch(np.arange(40, 48)).inputs["tokens"]
    parts = [data.batch(np.arange(start, start + 2)).inputs["tokens"] for start in range(40, 48, 2)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("n", [2, 11, 50, 53])
def test_validation_predicts_every_token_once(n):
    data = LMWindows(token_file(100), token_file(n), TOKENIZER, max_len=10, seed=0)
    targets = []
    for batch in data.validation(batch_size=2):
        kept = batch.inputs["targets"] != IGNORE
        assert batch.counts["loss"] == int(kept.sum()) == batch.counts["bytes"]
        assert torch.equal(batch.inputs["targets"][kept], batch.inputs["tokens"][kept] + 1)
        targets += batch.inputs["targets"][kept].tolist()
    assert targets == list(range(1, n))


def test_validation_limit():
    data = LMWindows(token_file(100), token_file(90), TOKENIZER, max_len=10, seed=0)
    assert sum(batch.counts["loss"] for batch in data.validation(2, limit=35)) == 35


def test_text_shorter_than_a_window():
    with pytest.raises(UserError, match="10 tokens, but a window takes 11"):
        LMWindows(token_file(10), token_file(50), TOKENIZER, max_len=10, seed=0)


# ---------------------------------------------------------------- corpus -> tokens
def test_tokens_are_cached_and_made_again_when_the_text_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "a.txt"
    text.write_text("one two three. " * 50)
    config = DataConfig(data=str(text), tokenizer="bytes")
    first, tokenizer = prepare_tokens(config, 300, None)
    again, _ = prepare_tokens(config, 300, None)
    assert first.path == again.path and first.train.sha256 == again.train.sha256
    assert tokenizer.decode(first.train.tokens[1:].tolist()) + tokenizer.decode(first.valid.tokens[1:].tolist()) == (
        text.read_text()
    )
    text.write_text("other words. " * 50)
    assert prepare_tokens(config, 300, None)[0].train.sha256 != first.train.sha256


# ---------------------------------------------------------------- labelled text
def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


TSV = 'text\tlabel\na "quoted text\tgood\nbad one\tbad\nso so\tgood\n'


def test_tsv_csv_and_jsonl_agree(tmp_path):
    tsv = write(tmp_path / "a.tsv", TSV)
    csv = write(tmp_path / "a.csv", 'label,text\ngood,"a ""quoted text"\nbad,bad one\ngood,so so\n')
    jsonl = write(
        tmp_path / "a.jsonl",
        '{"text": "a \\"quoted text", "label": "good"}\n\n{"label": "bad", "text": "bad one"}\n'
        '{"text": "so so", "label": "good", "more": 1}\n',
    )
    rows = [[row for _, row in read_rows(path, ["text", "label"])] for path in (tsv, csv, jsonl)]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 3
    assert read_rows(tsv, ["text"])[1][0].endswith("a.tsv:3")


def test_labelled_batches(tmp_path):
    path = write(tmp_path / "a.tsv", TSV)
    data = LabelledTexts(path, path, TOKENIZER, max_len=12, seed=0)
    assert data.labels == ["bad", "good"] and data.n == 3
    (batch,) = data.validation(batch_size=8)
    assert batch.inputs["lengths"].tolist() == [7, 9, 12]
    assert batch.inputs["labels"].tolist() == [1, 0, 1]
    assert batch.inputs["tokens"][1, :9].tolist() == [EOT, *b"bad one", EOT]
    assert batch.inputs["tokens"][2].tolist() == [EOT, *b'a "quoted ', EOT]  # cut to max_len
    seen = sorted(tuple(row) for row in data.batch(np.arange(3)).inputs["tokens"].tolist())
    assert len(set(seen)) == 3


def test_pairs_of_texts_lose_the_end_of_the_longer(tmp_path):
    rows = '{"text": "abcdefgh", "text_b": "xy", "label": "1"}\n{"text": "c", "text_b": "d", "label": "0"}\n'
    path = write(tmp_path / "a.jsonl", rows)
    data = LabelledTexts(path, path, TOKENIZER, max_len=10, seed=0)
    assert data.valid[0][0] == [EOT, *b"abcde", EOT, *b"xy", EOT]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.tsv", "text\tlable\na\tb\n", "a.tsv:1: the header has no column 'label'"),
        ("a.tsv", "text\tlabel\na\tb\nc\n", "a.tsv:3: no 'label'"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "c"}\n', "a.jsonl:2: no 'label'"),
        ("a.jsonl", '{"text": "a"\n', "a.jsonl:1: not JSON"),
        ("a.jsonl", '["a", "b"]\n', "a.jsonl:1: expected an object"),
        ("a.tsv", "text\tlabel\n", "no rows"),
        ("a.tsv", "", "the header has no column"),
        ("a.tsv", "text\tlabel\na\tx\nb\tx\n", "only one label"),
        ("a.txt", "text\tlabel\na\tb\n", "expected .tsv or .csv"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(UserError) as error:
        LabelledTexts(path, path, TOKENIZER, max_len=10, seed=0)
    assert message in str(error.value)


def test_unknown_label_in_validation(tmp_path):
    train = write(tmp_path / "train.tsv", TSV)
    valid = write(tmp_path / "valid.tsv", "text\tlabel\na\tgood\nb\tgoood\n")
    with pytest.raises(UserError, match=r"valid\.tsv:3: label 'goood'.*did you mean good"):
        LabelledTexts(train, valid, TOKENIZER, max_len=10, seed=0)


def test_only_the_answer_is_predicted(tmp_path):
    rows = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "long prompt", "answer": "yes"}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    data = PromptAnswers(path, path, TOKENIZER, max_len=10, seed=0)
    (batch,) = data.validation(8)
    assert batch.inputs["tokens"].tolist() == [[*b"2+2=4", *[EOT] * 5], [*b" prompt", *b"yes"]]
    assert batch.inputs["targets"].tolist() == [
        [IGNORE] * 3 + [ord("4"), EOT] + [IGNORE] * 5,
        [IGNORE] * 6 + [*b"yes", EOT],
    ]
    assert batch.counts == {"loss": 6, "bytes": 4}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "", "answer": "a"}, "a.jsonl:1: the prompt is empty"),
        ({"prompt": "a", "answer": ""}, "a.jsonl:1: the answer is empty"),
        ({"prompt": "a", "answer": "much too long for it"}, "--max_len is 10"),
    ],
)
def test_bad_pairs_are_named(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    with pytest.raises(UserError) as error:
        PromptAnswers(path, path, TOKENIZER, max_len=10, seed=0)
    assert message in str(error.value)
