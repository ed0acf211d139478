"""Labelled texts: how they are read, cut, grouped and varied."""

import numpy as np
import pytest
import torch

from mini import Bert
from mini.errors import UserError
from mini.tasks.classify import Classification, ClassifyConfig
from mini.tasks.inputs import masked_ids
from mini.text.rows import read_rows
from mini.text.tokenizer_base import ByteTokenizer

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
    data = Classification(path, path, TOKENIZER, max_len=12, seed=0, batch_size=3, options=ClassifyConfig())
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
    data = Classification(path, path, TOKENIZER, max_len=10, seed=0, batch_size=3, options=ClassifyConfig())
    assert data.valid[0][0] == [EOT, *b"abcde", EOT, *b"xy", EOT]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.tsv", "text\tlable\na\tb\n", "a.tsv:1: the header has no column 'label'"),
        ("a.tsv", "text\tlabel\na\tb\nc\n", "a.tsv:3: no 'label'"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "c"}\n', "a.jsonl:2: no 'label'"),
        ("a.jsonl", '{"text": "a"\n', "a.jsonl:1: not JSON"),
        ("a.jsonl", "[" * 5000 + "\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"text": "a", "label": ' + "1" * 5000 + "}\n", "a.jsonl:1: not JSON"),
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
        Classification(path, path, TOKENIZER, max_len=10, seed=0, batch_size=3, options=ClassifyConfig())
    assert message in str(error.value)


def labelled(path, tokenizer=TOKENIZER, valid=None, **options) -> Classification:
    return Classification(path, valid or path, tokenizer, 32, seed=1, batch_size=4, options=ClassifyConfig(**options))


def test_rare_labels_and_empty_texts_are_noted(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\na\tx\nb\tx\n \ty\n")
    notes = labelled(path).notes
    assert any("1 of 2 labels occur only once (such as 'y')" in note for note in notes)
    assert any("1 of 3 texts are empty (the first:" in note and "a.tsv:4" in note for note in notes)
    assert labelled(write(tmp_path / "b.tsv", TSV + "more\tbad\n")).notes == []


def test_balanced_weights_give_each_class_the_same_say(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "a\tx\n" * 6 + "b\ty\n" * 2)
    assert labelled(path).class_weights is None
    weights = labelled(path, class_weights="balanced").class_weights
    assert weights.tolist() == pytest.approx([8 / 12, 8 / 4])  # 6 w_x = 2 w_y, and their mean over examples is 1
    logits, labels = torch.randn(8, 2), torch.tensor([0] * 6 + [1] * 2)

    class Model(torch.nn.Module):
        def answers(self, inputs):
            return {"classify": logits}

    inputs = {"tokens": torch.zeros(8, 1), "labels": labels}
    loss = labelled(path, class_weights="balanced").loss(Model(), inputs)["classify"]
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss, each[:6].sum() * 2 / 3 + each[6:].sum() * 2)


def test_texts_are_normalised(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\nThe Café, again!\tx\nb\ty\n")
    data = labelled(path, normalize="lower,accents,punctuation,stopwords")
    assert TOKENIZER.decode(data.train[0][0][1:-1]) == "cafe"
    with pytest.raises(UserError, match="did you mean accents"):
        labelled(path, normalize="acents")


def test_augmentation_is_a_function_of_the_example_number(tmp_path):
    rows = "".join(f"w{i} one two three four five six\tl{i % 2}\n" for i in range(20))
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + rows)
    tokenizer = ByteTokenizer().with_special(Bert.special_tokens)
    plain = labelled(path, tokenizer)
    data = labelled(path, tokenizer, augment="all", augment_share=0.5, augment_rate=0.3)
    drawn = [data.batch(np.arange(20 * epoch, 20 * epoch + 20)) for epoch in range(10)]
    again = data.batch(np.arange(60, 80))
    assert torch.equal(again.inputs["tokens"], drawn[3].inputs["tokens"])
    texts = {tuple(row) for row, _, _ in plain.train}
    rows = [
        ids[:n] for b in drawn for ids, n in zip(b.inputs["tokens"].tolist(), b.inputs["lengths"].tolist(), strict=True)
    ]
    changed = [tuple(row) not in texts for row in rows]
    assert 0.35 < sum(changed) / len(changed) < 0.65
    assert any(tokenizer.mask in row for row in rows) and all(row[0] == tokenizer.cls for row in rows)
    assert {len(b.inputs["labels"]) for b in drawn} == {20} and sum(int(b.inputs["labels"].sum()) for b in drawn) == 100
    with pytest.raises(UserError, match=r"no \[MASK\]"):
        labelled(path, augment="mask")


def test_segments_of_pairs(tmp_path):
    tokenizer = ByteTokenizer().with_special(Bert.special_tokens)
    pair = '{"text": "ab", "text_b": "c", "label": "1"}\n'
    path = write(tmp_path / "a.jsonl", pair + '{"text": "d", "text_b": "", "label": "0 "}\n')
    data = labelled(path, tokenizer)
    (batch,) = data.validation(4)
    cls, sep, pad = tokenizer.cls, tokenizer.sep, tokenizer.pad
    assert batch.inputs["tokens"].tolist() == [[cls, 100, sep, sep, pad, pad], [cls, 97, 98, sep, 99, sep]]
    assert batch.inputs["segments"].tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert data.labels == ["0", "1"]  # without the space
    single = write(tmp_path / "b.jsonl", pair + '{"text": "d", "label": "0"}\n')
    with pytest.raises(UserError, match=r"b.jsonl:2: no 'text_b', unlike in .*b.jsonl:1"):
        labelled(single, tokenizer)


def test_masks_in_a_text():
    tokenizer = ByteTokenizer().with_special(Bert.special_tokens)
    mask = tokenizer.mask
    assert masked_ids(tokenizer, "a [MASK] b[MASK]") == [*b"a", mask, *b" b", mask]  # the space belongs to the mask
    assert masked_ids(tokenizer, "a ") == [*b"a "]
    with pytest.raises(UserError):
        masked_ids(TOKENIZER, "[MASK]")


def test_unknown_label_in_validation(tmp_path):
    train = write(tmp_path / "train.tsv", TSV)
    valid = write(tmp_path / "valid.tsv", "text\tlabel\na\tgood\nb\tgoood\n")
    with pytest.raises(UserError, match=r"valid\.tsv:3: label 'goood'.*did you mean good"):
        Classification(train, valid, TOKENIZER, max_len=10, seed=0, batch_size=3, options=ClassifyConfig())


def test_what_is_cut_is_noted(tmp_path):
    """Of 10 tokens 8 are for a text, or 7 for both of a pair."""
    path = write(tmp_path / "a.tsv", "text\tlabel\n12345678\tx\n123456789\ty\n12345678901\ty\n")
    options = dict(seed=0, batch_size=3, options=ClassifyConfig())
    _, note, same = Classification(path, path, TOKENIZER, max_len=10, **options).notes  # the first: x occurs once
    assert note == same == f"{path}: 2 of 3 texts are cut to 8 tokens; 4 of all 28 tokens are not read (14.3%)"
    assert len(Classification(path, path, TOKENIZER, max_len=13, **options).notes) == 1
    pair = '{"text": "abcd", "text_b": "efg", "label": "1"}\n{"text": "abcd", "text_b": "efgh", "label": "0"}\n'
    path = write(tmp_path / "b.jsonl", pair)
    data = Classification(path, path, TOKENIZER, max_len=10, **options)
    assert data.notes[-1] == f"{path}: 1 of 2 texts are cut to 7 tokens; 1 of all 15 tokens are not read (6.7%)"
    assert data.cut == {split: {"texts": 2, "cut": 1, "tokens": 15, "lost": 1} for split in ("train", "valid")}
