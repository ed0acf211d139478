"""Question answering: SQuAD's files, windows, spans, judgement, and the questions that come with Python."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mini.errors import UserError
from mini.model.bert import NEVER
from mini.tasks.qa import (
    Answer,
    Question,
    QuestionAnswering,
    Window,
    best_spans,
    best_threshold,
    collate,
    collect,
    cut_windows,
    judge,
    questions_note,
    read_squad,
)
from mini.text import python_docs

CONTEXT = "Architecturally, the school has a Catholic character. Atop the Main Building's gold dome is a golden statue."


class Words:
    """A word with the space before it is a token, as in a byte-level BPE; so is a sign."""

    cls, sep, pad = 0, 1, 2

    def __init__(self):
        self.numbers = {}

    def encode(self, text):
        return self.encode_with_offsets(text)[0].tolist()

    def encode_with_offsets(self, text):
        found = list(re.finditer(r" ?\w+| ?[^\w\s]|\s", text))
        ids = [3 + self.numbers.setdefault(match[0], len(self.numbers)) for match in found]
        return np.array(ids, dtype=np.int64), np.array([match.span() for match in found], np.int64).reshape(-1, 2)


def options(stride=4, max_question=8, max_answer=30, n_best=5):
    return SimpleNamespace(stride=stride, max_question=max_question, max_answer=max_answer, n_best=n_best)


def question(text="What?", context=CONTEXT, answer=None, name="q") -> Question:
    return Question(name, text, context, *(([], []) if answer is None else ([answer], [context.index(answer)])))


def squad_file(path, *entries, context=CONTEXT):
    """entries: (question, *[(answer, start), ..])"""
    qas = [
        {
            "id": f"q{i}",
            "question": asked,
            "answers": [{"text": text, "answer_start": start} for text, start in answers],
        }
        for i, (asked, *answers) in enumerate(entries)
    ]
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}))
    return str(path)


# ---------------------------------------------------------------- files
def test_reads_both_versions(tmp_path):
    answer = {"text": "Catholic", "answer_start": CONTEXT.index("Catholic")}
    qas = [
        {"id": "a", "question": "Which?", "answers": [answer, answer]},
        {"id": "b", "question": "Who?", "answers": [], "is_impossible": True, "plausible_answers": [answer]},
        {"id": "c", "question": "Where?", "answers": []},
    ]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    notes = []
    questions = read_squad(path, notes)
    start = answer["answer_start"]
    assert [(q.id, q.answers, q.starts) for q in questions] == [
        ("a", ["Catholic"] * 2, [start] * 2), ("b", [], []), ("c", [], []),
    ]  # fmt: skip
    assert notes == [] and questions[0].context == CONTEXT


def test_what_cannot_be_used_is_counted(tmp_path):
    right, wrong = ("Catholic", CONTEXT.index("Catholic")), ("Catholic", 3)
    entries = [
        ("a?", right),
        ("b?", wrong),
        ("c?", wrong, right),
        (" ", right),
        ("e?", ("statue.", -7)),
        ("f?", ("", 0)),
    ]
    path, notes = squad_file(tmp_path / "train.json", *entries), []
    questions = read_squad(path, notes)
    assert [q.id for q in questions] == ["q0", "q2"] and questions[1].starts == [right[1]]
    assert notes == [
        f"{path}: 3 of 6 questions skipped: their answer is not at its place in the context (first: q1)",
        f"{path}: 1 of 6 questions skipped: they are empty (first: q3)",
        f"{path}: 1 answers of the other questions left out: not at their place in the context",
    ]
    with pytest.raises(UserError, match="1 of 1 questions skipped: their context is empty"):
        read_squad(squad_file(tmp_path / "b.json", ("a?",), context="\n"), [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "should hold a JSON object"),
        ({}, "x.json: no 'data'"),
        ({"data": 3}, "x.json: 'data' should be list, not int"),
        ({"data": []}, "x.json: no questions"),
        ({"data": [{"paragraphs": []}, {}]}, "x.json: data[1]: no 'paragraphs'"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, "data[0].paragraphs[0]: no 'context'"),
        ({"data": [{"paragraphs": [{"context": "a", "qas": [{"id": 1}]}]}]}, "paragraphs[0].qas[0]: no 'question'"),
        ({"data": [{"paragraphs": [{"context": "a", "qas": ["?"]}]}]}, "paragraphs[0].qas[0]: no 'question'"),
        ({"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "?"}]}]}]}, "qas[0]: no 'answers'"),
        (
            {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "?", "answers": [{"text": "a"}]}]}]}]},
            "qas[0].answers[0]: no 'answer_start'",
        ),
    ],
)
def test_a_file_of_another_form_is_refused_with_the_place(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_squad(path, [])
    assert message in str(caught.value) and "x.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_squad(tmp_path / "none.json", [])


# ---------------------------------------------------------------- windows
@pytest.mark.parametrize("n_words", [1, 9, 10, 11, 14, 15, 40])
@pytest.mark.parametrize("stride", [1, 4, 10, 99])
def test_windows_cover_the_context_and_overlap(n_words, stride):
    tokenizer, room = Words(), 10
    context = " ".join(f"w{i}" for i in range(n_words))
    ids, spans = tokenizer.encode_with_offsets(context)
    head = [0, *tokenizer.encode_with_offsets("a b c?")[0], 1]
    starts = []
    for window in cut_windows([question("a b c?", context)], tokenizer, len(head) + room + 1, options(stride))[0]:
        assert window.ids[: window.begin].tolist() == head and window.ids[-1] == 1
        start = spans[:, 0].tolist().index(window.spans[0, 0])
        assert window.ids[window.begin : -1].tolist() == ids[start : start + room].tolist()
        assert window.spans.tolist() == spans[start : start + room].tolist()
        starts.append(start)
    step = min(stride, room)
    assert starts == list(range(0, len(starts) * step, step))
    assert starts[-1] + room >= n_words and (len(starts) == 1 or starts[-2] + room < n_words)  # and none too many


def test_a_context_of_which_the_tokenizer_keeps_nothing():
    tokenizer = Words()
    tokenizer.encode_with_offsets = lambda text: (np.zeros(0, np.int64), np.zeros((0, 2), np.int64))
    windows = cut_windows([question(context="\x00", answer="\x00")], tokenizer, 32, options())[0]
    assert [window.ids.tolist() for window in windows] == [[0, 1, 1]] and windows[0].last == 0
    inputs = collate(windows, tokenizer, 0).inputs
    rows = best_spans(torch.zeros(1, 3), torch.zeros(1, 3), inputs["context"], 4, 30)
    assert collect(windows, rows) == [(0, [])]


def test_targets_are_the_answer_or_cls():
    tokenizer = Words()
    for answer in (
        "Catholic",
        " has a ",
        "Architecturally",
        "a golden statue.",
        "Main Building's gold",
        "'s gold dome",
    ):
        windows = cut_windows([question(answer=answer)], tokenizer, 16, options(stride=1))[0]
        assert len(windows) > 2
        inside = [window for window in windows if window.last]
        for window in inside:
            start = window.spans[window.first - window.begin, 0]
            end = window.spans[window.last - window.begin, 1]
            assert CONTEXT[start:end].strip() == answer.strip()
        assert 0 < len(inside) < len(windows)
        assert all((window.first > 0) == (window.last > 0) for window in windows)
    assert {(w.first, w.last) for w in cut_windows([question()], tokenizer, 16, options())[0]} == {(0, 0)}


def test_an_answer_that_no_window_holds_whole_is_no_target():
    windows = cut_windows([question(answer=CONTEXT[:60].strip())], Words(), 12, options(stride=2))[0]
    assert {(w.first, w.last) for w in windows} == {(0, 0)}


def test_a_long_question_is_cut_and_a_short_context_is_enough():
    tokenizer = Words()
    (window,) = cut_windows([question("one two three four five six?", "Yes.", "Yes")], tokenizer, 32, options(9, 3))[0]
    assert window.begin == 5 and len(window.ids) == 8
    assert (window.first, window.last) == (5, 5)
    assert window.ids[1:4].tolist() == tokenizer.encode_with_offsets("one two three")[0].tolist()


def test_long_questions_are_counted():
    _, cut = cut_windows([question("one two three four five six?"), question("one?")], Words(), 32, options(9, 3))
    assert cut == {"texts": 2, "cut": 1, "tokens": 9, "lost": 4}
    (note,) = questions_note("a.json", cut, 3)
    assert note.startswith("a.json: 1 of 2 questions are cut to 3 tokens") and note.endswith(
        "4 of all 9 tokens are not read (44.4%)"
    )


def test_no_room_for_a_context():
    cut_windows([question("one two three")], Words(), 7, options())
    with pytest.raises(UserError, match="--max_len 6: no room for a context beside a question"):
        cut_windows([question("one two three")], Words(), 6, options())
    tokenizer = Words()
    tokenizer.sep = None
    with pytest.raises(UserError, match=r"no \[CLS\], \[SEP\]"):
        cut_windows([question()], tokenizer, 64, options())


def test_collate():
    tokenizer = Words()
    windows, _ = cut_windows([question("Is it?", "Yes."), question("Is it a b c?", "Of course.", "course")], tokenizer,
                             32, options())  # fmt: skip
    batch = collate(windows, tokenizer, 0)
    a, b = windows
    assert batch.inputs["tokens"].tolist() == [[*a.ids, 2, 2, 2, 2], list(b.ids)]
    assert batch.inputs["segments"].tolist() == [[0] * 5 + [1] * 3 + [0] * 4, [0] * 8 + [1] * 4]
    assert batch.inputs["lengths"].tolist() == [len(a.ids), len(b.ids)] == [8, 12]
    assert batch.inputs["context"].tolist()[0] == [False] * 5 + [True] * 2 + [False] * 5
    assert batch.inputs["context"][1].sum() == len(b.spans)
    assert batch.inputs["starts"].tolist() == batch.inputs["ends"].tolist() == [0, b.begin + 1]
    assert batch.inputs["rows"].tolist() == [0, 1]
    assert batch.counts == {"qa": 4} and batch.n_tokens == 20
    assert all(t.dtype == torch.int64 for name, t in batch.inputs.items() if name != "context")
    assert batch.inputs.keys() == {"tokens", "segments", "lengths", "starts", "ends", "rows", "context"}


def test_data_set(tmp_path):
    start = CONTEXT.index("Catholic")
    train = squad_file(
        tmp_path / "train.json", *[(f"Which {i}?", ("Catholic", start)) for i in range(5)], ("x", ("y", 1))
    )
    valid = squad_file(tmp_path / "valid.json", ("Which?", ("Catholic", start)), ("Who?",))
    arguments = (Words(), 16, 1, 4, options())
    data = QuestionAnswering(train, valid, *arguments)
    assert data.notes == [
        f"{train}: 1 of 6 questions skipped: their answer is not at its place in the context (first: q5)"
    ]
    assert not data.has_impossible and QuestionAnswering(valid, train, *arguments).has_impossible
    assert [q.id for q in data.questions] == ["q0", "q1"]

    seen = [tuple(row) for step in range(data.n) for row in numbers(data.batch(np.arange(4 * step, 4 * step + 4)))]
    windows = [tuple(w.ids.tolist()) for w in data.train]
    assert sorted(seen) == sorted(windows * 4)  # in four epochs each window four times
    whole = data.batch(np.arange(8, 12)).inputs["tokens"]
    parts = [numbers(data.batch(np.arange(i, i + 1))) for i in range(8, 12)]
    assert numbers(data.batch(np.arange(8, 12))) == [row for part in parts for row in part] and whole.size(0) == 4

    batches = list(data.validation(3))
    rows = torch.cat([batch.inputs["rows"] for batch in batches]).tolist()
    assert sorted(rows) == list(range(len(data.valid)))
    for batch in batches:
        for number, ids in zip(batch.inputs["rows"].tolist(), numbers(batch), strict=True):
            assert ids == data.valid[number].ids.tolist()

    again = QuestionAnswering(train, valid, *arguments)
    assert data.checksum == again.checksum != QuestionAnswering(valid, train, *arguments).checksum


def numbers(batch) -> list[list[int]]:
    """The rows of a batch without their padding."""
    pairs = zip(batch.inputs["tokens"].tolist(), batch.inputs["lengths"].tolist(), strict=True)
    return [row[:length] for row, length in pairs]


# ---------------------------------------------------------------- spans
@pytest.mark.parametrize(("n_best", "max_answer"), [(1, 3), (5, 1), (7, 4), (200, 99)])
def test_best_spans_against_two_loops(n_best, max_answer):
    generator = torch.Generator().manual_seed(n_best)
    start, end = torch.randn(2, 6, 12, generator=generator).unbind()
    context = torch.rand(6, 12, generator=generator) < 0.7
    context[:, 0] = False
    context[-1] = False
    rows = best_spans(start, end, context, n_best, max_answer)
    assert rows.shape == (6, 1 + 3 * n_best) and rows.isfinite().all()
    for b in range(6):
        expected = [
            (float(start[b, i] + end[b, j]), i, j)
            for i in range(12)
            for j in range(i, min(12, i + max_answer))
            if context[b, i] and context[b, j]
        ]
        expected = sorted(expected, reverse=True)[:n_best]
        assert rows[b, 0] == start[b, 0] + end[b, 0]
        found = [tuple(span) for span in rows[b, 1:].view(-1, 3).tolist()]
        assert found[: len(expected)] == expected
        assert all(span == (NEVER, 0, 0) for span in found[len(expected) :])


def test_best_spans_of_half_precision_keep_their_order():
    start, end = torch.zeros(2, 1, 300)
    start[0, 298], end[0, 298], end[0, 299] = 256, 1, 2
    context = torch.arange(300)[None] > 290
    rows = best_spans(start.bfloat16(), end.bfloat16(), context, 2, 5)
    assert rows.tolist() == [[0, 258, 298, 299, 257, 298, 298]]  # in bfloat16, 299 and 257 would be 300 and 256


def test_collect_merges_windows():
    context = "one two three"
    spans = np.array([[0, 3], [3, 7], [7, 13]])

    def window(number, begin, stretch):
        return Window(0, number, context, np.zeros(begin + len(stretch) + 1, np.int32), begin, stretch, 0, 0)

    windows = [window(0, 3, spans[:2]), window(0, 3, spans[1:]), window(1, 2, spans)]
    rows = [
        [1.5, 3.0, 4, 4, 2.0, 3, 4],  # "two", "one two"
        [0.5, 5.0, 3, 3, 4.0, 4, 4],  # "two" again, "three"
        [2.0, 1.0, 2, 4, NEVER, 0, 0],
    ]
    (null, first), (other_null, second) = collect(windows, torch.tensor(rows, dtype=torch.float64))
    assert null == 0.5 and first == [Answer("two", 5.0, 4, 7), Answer("three", 4.0, 8, 13)]  # cut to n_best = 2
    assert other_null == 2.0 and second == [Answer("one two three", 1.0, 0, 13)]
    assert all(context[a.start : a.end] == a.text for a in first + second)


def test_collect_offers_no_white_space():
    (window,) = cut_windows([question(context="a \n b")], Words(), 32, options())[0]
    tokens = [(window.begin + i, window.begin + j) for i in range(4) for j in range(i, 4)]
    row = [0.0] + [value for n, (i, j) in enumerate(tokens) for value in (float(n), i, j)]
    ((_, answers),) = collect([window], np.array([row]))
    assert sorted({a.text for a in answers}) == ["a", "a \n b", "b"] and len(answers) == 3


def test_a_question_from_a_person_goes_all_the_way():
    """A model that knows the answer's places gives its text, whichever window it is in."""
    tokenizer = Words()
    windows = cut_windows([question("Where?")], tokenizer, 16, options())[0]
    inputs = collate(windows, tokenizer, 0).inputs
    gold = cut_windows([question("Where?", answer="gold dome")], tokenizer, 16, options())[0]
    start, end = torch.zeros(2, *inputs["tokens"].shape)
    for b, window in enumerate(gold):
        start[b, window.first], end[b, window.last] = 9, 9
    ((null, answers),) = collect(windows, best_spans(start, end, inputs["context"], 5, 30))
    assert answers[0].text == "gold dome" and answers[0].score == 18 and null == 0
    assert len(answers) == 5 and len({(a.start, a.end) for a in answers}) == 5


# ---------------------------------------------------------------- judgement
def answered(text: str, score: float, null: float) -> tuple:
    return null, [Answer(text, score, 0, len(text))] if text else []


def test_judge_without_impossible_questions():
    questions = [question(answer="the school"), question(answer="golden statue")]
    figures = judge(questions, [answered("school", 1, 99), answered("a golden dome", 1, 99)], False)
    assert figures == pytest.approx({"exact_match": 0.5, "exact_match_se": 0.5, "f1": 0.75, "f1_se": 0.25})


def test_judge_chooses_a_threshold():
    questions = [question(answer="school"), question(), question(answer="golden statue"), question()]
    answers = [answered("school", 5, 1), answered("dome", 2, 1), answered("golden", 3, 3), answered("statue", 1, 4)]
    # differences -4, -1, 0, 3: answering all but the last is worth 1 + 0 + 2/3 + 1, only the first 1 + 1 + 0 + 1.
    figures = judge(questions, answers, False)
    assert {name: value for name, value in figures.items() if not name.endswith("_se")} == pytest.approx(
        {"exact_match": 3 / 4, "f1": 3 / 4, "null_threshold": -4, "has_answer_f1": 0.5, "no_answer_accuracy": 1}
    )
    given = judge(questions, answers, False, threshold=0)
    assert given["null_threshold"] == 0 and given["f1"] == pytest.approx((1 + 0 + 2 / 3 + 1) / 4)
    answers[1] = answered("dome", 2, 4)  # difference 2
    figures = judge(questions, answers, False)
    assert figures["null_threshold"] == 0 and figures["f1"] == pytest.approx((1 + 1 + 2 / 3 + 1) / 4)
    assert figures["exact_match"] == 3 / 4 and figures["has_answer_f1"] == pytest.approx(5 / 6)


def test_judge_with_one_kind_of_questions():
    possible = judge([question(answer="school")], [answered("school", 5, 9)], True)
    assert possible == {"exact_match": 1, "f1": 1, "null_threshold": 4, "has_answer_f1": 1}
    impossible = judge([question(), question()], [answered("school", 5, 9), answered("", 0, 3)], False)
    assert impossible["f1"] == impossible["no_answer_accuracy"] == 1 and np.isfinite(impossible["null_threshold"])


@pytest.mark.parametrize("seed", range(30))
def test_threshold_against_trying_all(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 25))
    impossible = rng.random(n) < 0.5
    f1 = np.where(impossible, rng.random(n) < 0.1, rng.random(n).round(1))
    differences = rng.integers(-4, 5, n) / 2  # many equal ones

    def total(threshold):
        return np.where(differences > threshold, impossible, f1).sum()

    best = max(total(t) for t in [*differences, differences.min() - 1])
    assert total(best_threshold(differences, f1, impossible)) == pytest.approx(best)


# ---------------------------------------------------------------- the questions that come with Python
def modules(content: dict) -> set[str]:
    return {qa["id"].split(".")[0] for paragraph in content["data"][0]["paragraphs"] for qa in paragraph["qas"]}


def test_python_docs_questions():
    sizes, descriptions = {}, []
    for split in ("train", "valid"):
        content = python_docs.questions(split)
        for paragraph in content["data"][0]["paragraphs"]:
            context, asked = paragraph["context"], [qa["question"] for qa in paragraph["qas"]]
            assert 5 <= len(asked) <= 8 and len(set(asked)) == len(asked)
            for qa in paragraph["qas"]:
                (answer,) = qa["answers"]
                start, name = answer["answer_start"], answer["text"]
                assert context[start:].startswith(f"{name}: {qa['question']}\n")
                assert start == 0 or context[start - 1] == "\n"
                assert qa["id"].endswith(f".{name}") and name.lower() not in qa["question"].lower()
                assert 4 <= len(qa["question"].split()) <= 25
            descriptions += asked
        notes = []
        sizes[split] = len(read_squad("python-docs", notes, split))
        assert not notes
    assert len({description.lower() for description in descriptions}) == len(descriptions) == sum(sizes.values())
    assert not modules(python_docs.questions("train")) & modules(python_docs.questions("valid"))
    assert sizes["train"] > 1000 and sizes["valid"] > 100


def test_python_docs_questions_are_the_same_in_another_process():
    code = "import json; from mini.text import python_docs; print(json.dumps(python_docs.questions('valid')))"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    here = python_docs.questions("valid")  # meanwhile
    assert json.loads(other.communicate()[0]) == here


def test_python_docs_knows_its_parts(tmp_path):
    for k in range(20):
        lines = [f'def name{i}():\n    """Does the thing number {k}{i}x of many. And more."""' for i in range(7)]
        (tmp_path / f"m{k}.py").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "standard_library", lambda: tmp_path)
        data = QuestionAnswering("python-docs", "python-docs", Words(), 64, 1, 4, options(64, 16))
    assert len(data.questions) == 14 and len({window.question for window in data.train}) == 126
    assert (
        data.questions[0].question.startswith("Does the thing number") and "And more" not in data.questions[0].context
    )
    with pytest.raises(UserError, match="came without sources"):
        python_docs.questions("train", tmp_path / "none")
