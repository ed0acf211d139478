"""Labelled texts, and prompts with answers."""

import json

import numpy as np
import pytest

from mini.config import ClassifyConfig, UserError
from mini.data import IGNORE
from mini.labelled import LabelledTexts, PromptAnswers, read_rows
from mini.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOT = TOKENIZER.eot


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
    data = LabelledTexts(path, path, TOKENIZER, max_len=12, seed=0, batch_size=3, options=ClassifyConfig())
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
    data = LabelledTexts(path, path, TOKENIZER, max_len=10, seed=0, batch_size=3, options=ClassifyConfig())
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
        LabelledTexts(path, path, TOKENIZER, max_len=10, seed=0, batch_size=3, options=ClassifyConfig())
    assert message in str(error.value)


def test_unknown_label_in_validation(tmp_path):
    train = write(tmp_path / "train.tsv", TSV)
    valid = write(tmp_path / "valid.tsv", "text\tlabel\na\tgood\nb\tgoood\n")
    with pytest.raises(UserError, match=r"valid\.tsv:3: label 'goood'.*did you mean good"):
        LabelledTexts(train, valid, TOKENIZER, max_len=10, seed=0, batch_size=3, options=ClassifyConfig())


def test_only_the_answer_is_predicted(tmp_path):
    rows = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "long prompt", "answer": "yes"}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    data = PromptAnswers(path, path, TOKENIZER, max_len=10, seed=0, batch_size=3)
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
        PromptAnswers(path, path, TOKENIZER, max_len=10, seed=0, batch_size=3)
    assert message in str(error.value)
