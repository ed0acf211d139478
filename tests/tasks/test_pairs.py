"""Answers to prompts: what is read, what is cut, and how generated answers are judged."""

import json
import math

import numpy as np
import pytest
import torch

from mini import GPT, ModelConfig
from mini.errors import UserError
from mini.tasks.base import IGNORE
from mini.tasks.metrics import bleu, overlap, overlap_figures, rouge, words_13a
from mini.tasks.pairs import PairsConfig, PromptAnswers, first_sentence, read_pairs
from mini.text import python_docs
from mini.text.corpus import DataConfig
from mini.text.tokenizer_base import ByteTokenizer
from mini.text.tokens import prepare_tokens

TOKENIZER = ByteTokenizer()
EOT = TOKENIZER.eot


def write(path, pairs: list[tuple[str, str]]):
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs))
    return path


def make(path, max_len: int = 32, **options):
    return PromptAnswers(path, path, TOKENIZER, max_len, seed=1, batch_size=4, options=PairsConfig(**options))


# ---------------------------------------------------------------- ROUGE and BLEU, worked by hand
def test_rouge_by_hand():
    """cat, on, mat and two of the; the cat, on the, the mat; the cat .. on the mat."""
    assert rouge("The cat sat on the mat.", "the cat is on the mat") == pytest.approx([10 / 12, 6 / 10, 10 / 12])
    assert rouge("the the the the", "the cat") == pytest.approx([2 / 6, 0, 2 / 6])  # each word counts as often as it is
    assert rouge("a b c d", "d c b a") == pytest.approx([1, 0, 2 / 8])
    assert rouge("a x b y c", "a b c") == pytest.approx([6 / 8, 0, 6 / 8])  # a subsequence may have gaps
    assert rouge("", "a b") == rouge("a", "") == rouge("!", "?") == [0, 0, 0]


def test_bleu_by_hand():
    pairs = [("the cat sat on the mat", "the cat is on the mat"), ("a b c d", "a b c d e")]
    figures = overlap_figures(torch.tensor([overlap(*pair) for pair in pairs]).sum(0).tolist())
    precisions = 9 / 10 * 6 / 8 * 3 / 6 * 1 / 4  # 5 + 4 words, 3 + 3 pairs, 1 + 2 threes, 0 + 1 fours
    assert figures["bleu"] == pytest.approx(math.exp(1 - 11 / 10) * precisions**0.25)
    assert figures["rouge1"] == pytest.approx((10 / 12 + 8 / 9) / 2)
    assert bleu([4, 3, 2, 1, 4, 3, 2, 1, 4, 3]) == 1  # longer than the gold one: no penalty
    assert bleu([4, 3, 2, 0, 4, 3, 2, 1, 4, 4]) == 0 == bleu([0.0] * 10)


def test_words_of_bleu():
    text = "Hello, world! It's 3.5-4 (x-y) U.S. &quot;A&amp;B&quot; 1,000, end-\nless\n"
    expected = 'Hello , world ! It\'s 3.5 - 4 ( x-y ) U . S . " A & B " 1,000 , endless'
    assert words_13a(text) == expected.split()


# ---------------------------------------------------------------- examples
def test_what_is_cut_is_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [("0123456789", "yes"), ("01234567890123", "no"), ("abc", "z")])
    data = make(path, max_len=10)
    assert data.cut["train"] == data.cut["valid"] == {"texts": 3, "cut": 2, "tokens": 27, "lost": 3 + 6}
    assert data.notes[0].startswith(f"{path}: 2 of 3 prompts lose their beginning")
    assert data.notes[0].endswith("9 of all 27 tokens are not read (33.3%)")
    assert [TOKENIZER.decode(ids[:begin]) for ids, begin, _ in data.train] == ["3456789", "67890123", "abc"]
    assert make(path, max_len=32).notes == [] and make(path, max_len=32).cut["train"]["cut"] == 0


def test_only_the_answer_is_predicted(tmp_path):
    data = make(write(tmp_path / "a.jsonl", [("2+2=", "4"), ("long prompt", "yes")]), max_len=10)
    (batch,) = data.validation(8)
    assert batch.inputs["tokens"].tolist() == [[*b"2+2=4", *[EOT] * 5], [*b" prompt", *b"yes"]]
    targets = [[IGNORE] * 3 + [ord("4"), EOT] + [IGNORE] * 5, [IGNORE] * 6 + [*b"yes", EOT]]
    assert batch.inputs["targets"].tolist() == targets
    assert batch.counts == {"lm": 6} and batch.n_bytes == 4


@pytest.mark.parametrize(
    "row, message",
    [
        (("", "a"), "a.jsonl:1: the prompt is empty"),
        (("a", ""), "a.jsonl:1: the answer is empty"),
        (("a", "much too long for it"), "a.jsonl:1: the answer has 21 tokens, --max_len is 10"),
    ],
)
def test_bad_pairs_are_named(tmp_path, row, message):
    with pytest.raises(UserError) as error:
        make(write(tmp_path / "a.jsonl", [row]), max_len=10)
    assert message in str(error.value)


def test_first_sentences():
    assert first_sentence("  One. Two.") == "One." and first_sentence("No end") == "No end"
    assert (
        first_sentence("It is 3.5, e.g. high! Yes.") == "It is 3.5, e.g. high!"
        and first_sentence("Title\n\nText.") == "Title"
    )


def test_docstrings_and_their_first_lines():
    train, valid = python_docs.summaries("train"), python_docs.summaries("valid")
    assert len(train) > 4 * len(valid) > 100
    lines = [line.lower() for _, _, line in train + valid]
    assert len(set(lines)) == len(lines) and not any("\n" in line for line in lines)
    assert (read_pairs("python-docs", "valid")[0][1:]) == (f"{valid[0][1]}\n\nFirst line:", f" {valid[0][2]}")


def test_held_out_docstrings_are_those_that_pretraining_holds_out(tmp_path):
    folder, _ = prepare_tokens(DataConfig(tokenizer="bytes"), 0, None, set(), ())
    read, held_out = (bytes(split.tokens.astype(np.uint8)).decode() for split in (folder.train, folder.valid))
    valid = python_docs.summaries("valid")
    # Of a docstring whose paragraphs all stand elsewhere `documents` has nothing, so that it is on neither side.
    assert all(line in held_out or line not in read for _, _, line in valid)
    assert sum(line in read for _, _, line in valid) < len(valid) / 10  # what stands twice


# ---------------------------------------------------------------- answers
class Parrot(GPT):
    """Answers each prompt with what the table says."""

    table: dict[str, str]

    def generate(self, tokens, most, lengths, stop):
        new = [TOKENIZER.encode(self.table[TOKENIZER.decode(row[:n])])[:most]
               for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]  # fmt: skip
        n = min(most, 1 + max(map(len, new)))
        rows = zip(tokens.tolist(), lengths.tolist(), new, strict=True)
        filled = [row[:at] + (ids + stop * n)[:n] + [0] * (tokens.size(1) - at) for row, at, ids in rows]
        return torch.tensor(filled)


class Silent(GPT):
    """Ends every answer before it begins."""

    def logits(self, hidden):
        return torch.zeros(*hidden.shape[:-1], TOKENIZER.vocab_size).index_fill(-1, torch.tensor(EOT), 1.0)


def shape(max_len: int) -> ModelConfig:
    return ModelConfig(n_layers=1, n_heads=1, d_model=8, max_len=max_len, vocab_size=TOKENIZER.vocab_size)


@torch.no_grad()
def judged(data: PromptAnswers, model: GPT, batch_size: int) -> dict:
    sums: dict = {}
    for batch in data.validation(batch_size):
        counts = {f"count/{name}": torch.tensor(float(n)) for name, n in batch.counts.items()}
        for name, value in (data.measure(model, batch.inputs) | counts | {"bytes": torch.tensor(1.0)}).items():
            sums[name] = sums.get(name, 0) + value
    return data.metrics(sums)


def test_answers_are_judged_against_their_own_golds(tmp_path):
    pairs = [(f"Question {'x' * i}? More.", f"the answer is number {i} of them") for i in range(7)]
    path = write(tmp_path / "a.jsonl", pairs)
    data, model = make(path, max_len=80, n_judged=5), Parrot(shape(80)).eval()
    model.table = dict(pairs)
    figures = judged(data, model, 3)
    assert [figures[name] for name in ("rouge1", "rouge2", "rougeL", "bleu")] == pytest.approx([1, 1, 1, 1])
    assert figures["copied_rouge1"] == 0 and len(data.golds) == 5
    model.table = {prompt: answer.replace("number", "about") for prompt, answer in pairs}
    wrong = judged(data, model, 2)  # six words of seven, four pairs of six: the .. answer is about N of them
    assert [wrong[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([6 / 7, 4 / 6, 6 / 7])
    assert wrong["bleu"] == 0 and wrong["val_loss"] == pytest.approx(figures["val_loss"])
    assert "rouge1" not in judged(make(path, max_len=80, n_judged=0), model, 3)
    model.table = {"Two of them. Rest.": "two of them"}
    copied = judged(make(write(tmp_path / "b.jsonl", [("Two of them. Rest.", "two of them")]), 80), model, 1)
    assert copied["copied_rougeL"] == 1 == copied["rougeL"] and copied["bleu"] == 0  # three words have no four in a row


def test_nothing_of_a_gold_is_taken_for_an_answer(tmp_path):
    """Behind a short prompt its own answer stands in the batch, where a longer prompt goes on."""
    pairs = [("a prompt of many words, all of them here", "x"), ("Why?", "because the sky is blue and wide today")] * 3
    data = make(write(tmp_path / "a.jsonl", pairs), max_len=80)
    figures = judged(data, Silent(shape(80)).eval(), 6)
    assert [figures[name] for name in ("rouge1", "rouge2", "rougeL", "bleu")] == [0, 0, 0, 0]
    assert data.write(Silent(shape(80)).eval(), [[1, 2, 3], [4]], 5) == [[], []]


def test_what_is_judged_has_room(tmp_path):
    """Whatever the gold's length, a prompt keeps the same tokens, and its answer has so many at the most."""
    seen = []

    class Listening(Silent):
        def generate(self, tokens, most, **options):
            seen.append((tokens.tolist(), most))
            return super().generate(tokens, most, **options)

    path = write(tmp_path / "a.jsonl", [("0123456789" * 3, "yes"), ("abc", "a long one, longer than ten bytes")])
    data = make(path, max_len=36, max_answer=10)
    judged(data, Listening(shape(36)).eval(), 1)
    prompts = [list(b"456789" + b"0123456789" * 2), list(b"abc")]  # of 36, ten are for the answer
    assert sorted(seen) == sorted([([prompts[0]], 10), ([prompts[1]], 10)])
    assert data.notes[-1].startswith(f"{path}: 1 of 2 answers to judge have more than the 10 tokens")


def test_a_diverged_model_is_not_asked(tmp_path):
    model = GPT(shape(80)).eval()
    torch.nn.init.constant_(model.stack.tokens.weight, float("nan"))
    figures = judged(make(write(tmp_path / "a.jsonl", [("a", "b")])), model, 1)
    assert math.isnan(figures["val_loss"]) and "rouge1" not in figures


def test_ragged_prompts_are_answered_as_one_by_one():
    """By a model with windows, whose cache is a ring, and beyond max_len."""
    torch.manual_seed(0)
    config = dict(n_layers=2, n_heads=2, d_model=16, max_len=24, vocab_size=TOKENIZER.vocab_size, positions="rope")
    model, data = GPT(ModelConfig(window=4, **config)).eval(), PromptAnswers.__new__(PromptAnswers)
    data.tokenizer, prompts = TOKENIZER, [list(b"ab"), list(b"abcdefghijkl"), list(b"q" * 20)]
    together = data.write(model, prompts, 9)
    assert together == [data.write(model, [prompt], 9)[0] for prompt in prompts] and len(set(map(tuple, together))) > 1
