"""A run judged on files: against what the training itself says, by hand, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, last_json

from mini import evaluate, load_run
from mini.evaluate import likelihoods
from mini.tasks.metrics import with_error
from mini.tensors import load_tensors, save_tensors


def lines(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judged(command, run, *files, status: int = 0):
    done = command("-m", "mini", "evaluate", run, *files, "--device", "cpu", status=status)
    return done.stderr if status else last_json(done)


def test_text_in_bits_per_byte(gpt, text_file, tmp_path, command):
    """The loss of each token in its window, by hand; the error shrinks as one over the root of the length."""
    model, tokenizer = load_run(gpt)
    path = tmp_path / "text.txt"
    path.write_text(text_file.read_text()[:4000])
    found = judged(command, gpt, path)
    ids = torch.tensor([tokenizer.eot, *tokenizer.encode(path.read_text())])
    T, total = model.config.max_len, 0.0
    for begin in range(0, len(ids) - 1, T):
        window = ids[begin : begin + T + 1]
        logits = model(window[None, :-1])[0].log_softmax(-1)
        total -= logits.gather(1, window[1:, None]).sum().item()
    assert found["val_bpb"] == pytest.approx(total / math.log(2) / 4000, rel=1e-4)
    path.write_text(text_file.read_text()[:16000])
    more = judged(command, gpt, path)
    assert 0.3 < more["val_bpb_se"] / found["val_bpb_se"] < 0.8
    both = judged(command, gpt, path, text_file)["files"]
    assert both[str(path)]["val_bpb"] == more["val_bpb"] and both[str(text_file)]["judged"] > more["judged"]


def test_masked_tokens(bert, text_file, command):
    found = judged(command, bert, text_file)
    assert found["mlm_loss"] == found["val_loss"] and 0 <= found["mlm_accuracy"] <= 1 and found["mlm_loss_se"] > 0


def test_labels_keep_their_numbers(bert, labelled, tmp_path, command):
    """A test file may lack a label, and gives what the training gave for the same rows."""
    flags = ["--task", "classify", "--init", bert, "--train", labelled / "train.tsv", "--epochs", 4, "--lr", 3e-3]
    files = ["--valid", labelled / "valid.tsv", "--test", labelled / "valid.tsv"]
    result = last_json(command("train_bert.py", *flags, *files, "--device", "cpu", "--dtype", "float32",
                               "--out", tmp_path / "run"))  # fmt: skip
    assert result["test_accuracy"] == result["accuracy"]
    assert result["test_loss"] == pytest.approx(result["val_loss"], rel=1e-4)
    found = judged(command, tmp_path / "run", labelled / "valid.tsv")
    assert found["accuracy"] == result["accuracy"] and found["val_loss"] == pytest.approx(result["val_loss"], rel=1e-4)
    assert found["judged"] == 12
    rows = (labelled / "valid.tsv").read_text().splitlines()
    (tmp_path / "good.tsv").write_text("\n".join([rows[0], *(r for r in rows[1:] if r.endswith("good"))]) + "\n")
    assert judged(command, tmp_path / "run", tmp_path / "good.tsv")["judged"] == 6
    (tmp_path / "odd.tsv").write_text("text\tlabel\na film\tgreat\n")
    assert "label 'great' is not one that is learnt" in judged(
        command, tmp_path / "run", tmp_path / "odd.tsv", status=2
    )


def test_a_tenth_is_held_out_and_said(bert, labelled, tmp_path, command):
    flags = ["--task", "classify", "--init", bert, "--train", labelled / "train.tsv", "--steps", 1, "--device", "cpu"]
    done = command("train_bert.py", *flags, "--out", tmp_path / "a")
    (said,) = (line for line in done.stdout.splitlines() if "are held out for validation, always the same" in line)
    n = int(said.split(" of 180")[0].split()[-1])
    assert 8 < n < 30 and sum(sum(row) for row in last_json(done)["confusion"]) == n
    few = tmp_path / "few.tsv"
    few.write_text("text\tlabel\na\tx\nb\ty\n")
    refused = command("train_bert.py", "--task", "classify", "--init", bert, "--train", few, "--out", "x", status=2)
    assert "2 are too few to hold some out" in refused.stderr


def test_questions_and_answers(bert, squad_file, tmp_path, command):
    """By the threshold of the run, not by the best for this file."""
    flags = ["--task", "qa", "--init", bert, "--train", squad_file, "--valid", squad_file, "--steps", 5]
    result = last_json(
        command("train_bert.py", *flags, "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "q")
    )
    found = judged(command, tmp_path / "q", squad_file)
    assert found["f1"] == pytest.approx(result["f1"]) and found["f1_se"] > 0
    assert found["null_threshold"] == result["null_threshold"]


def test_prompts_and_answers(gpt, tmp_path, command):
    path = lines(
        tmp_path / "p.jsonl", [{"prompt": "The cat", "answer": " sat."}, {"prompt": "A dog", "answer": " ran."}]
    )
    found = judged(command, gpt, path)
    model, tokenizer = load_run(gpt)
    scores = likelihoods(model, tokenizer, [("The cat", " sat."), ("A dog", " ran.")], "", 8)
    assert found["judged"] == 2 and "rouge1" in found
    assert found["val_loss"] < 20 and scores.max() < 0


def test_likelihoods_by_hand(gpt, bert):
    """Of a GPT the sum of the text's tokens after its context; of a BERT each token masked alone."""
    texts = [("The cat", " sat."), ("", "A dog ran."), ("x" * 60, " on.")]
    model, tokenizer = load_run(gpt)
    found, room = likelihoods(model, tokenizer, texts, "", 2), model.config.max_len
    for (context, text), score in zip(texts, found, strict=True):
        before, ids = tokenizer.encode(context), tokenizer.encode(text)
        before = before[max(0, len(before) + len(ids) - room) :]
        row = torch.tensor([tokenizer.eot, *before, *ids])
        logits = model(row[None, :-1])[0].log_softmax(-1)  # (T, V)
        expected = logits[torch.arange(len(row) - 1), row[1:]][-len(ids) :].sum()
        assert score == pytest.approx(expected.item(), rel=1e-4)
    model, tokenizer = load_run(bert)
    (score,) = likelihoods(model, tokenizer, [("A", " cat")], "", 3)
    ids, expected = [tokenizer.cls, *tokenizer.encode("A"), *tokenizer.encode(" cat"), tokenizer.sep], 0.0
    for place in range(2, len(ids) - 1):
        masked = torch.tensor([ids])
        masked[0, place] = tokenizer.mask
        mlm, _ = model.predict(masked, torch.tensor([len(ids)]), torch.tensor([[place]]))
        expected += mlm[0, 0].log_softmax(-1)[ids[place]].item()
    assert score == pytest.approx(expected, rel=1e-4)


def test_minimal_pairs_and_choices(gpt, bert, tmp_path, command, monkeypatch):
    """Counted of made-up likelihoods: minus the number of vowels, whatever the context."""
    pairs = [{"good": a, "bad": b} for a, b in (("x", "a"), ("a", "x"), ("a", "e"))]
    path = lines(tmp_path / "m.jsonl", pairs)
    assert 0 <= judged(command, gpt, path)["accuracy"] <= 1 >= judged(command, bert, path)["accuracy"]

    def made_up(model, tokenizer, texts: list, *_) -> np.ndarray:
        return -np.array([sum(c in "aeiou" for c in text) for _, text in texts], dtype=float)

    monkeypatch.setattr(evaluate, "likelihoods", made_up)
    found = judged(command, gpt, path)
    assert found["accuracy"] == found["chance"] == 0.5 and found["accuracy_se"] == pytest.approx(0.5 / math.sqrt(3))
    choices = [{"context": "The cat", "choices": ["ae", "xxxxxxxxaaa"], "answer": 0},
               {"context": "The dog ran ", "choices": ["aexx", "axxa", "xxaxxx"], "answer": 2}]  # fmt: skip
    found = judged(command, gpt, lines(tmp_path / "c.jsonl", choices))
    assert found["accuracy"] == 1 and found["accuracy_norm"] == 0.5  # the longer one has fewer vowels per byte
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"context": "a", "choices": ["b"], "answer": 0}, "two texts or more"),
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "expected"),
        ({"context": "a", "choices": ["b", ""], "answer": 0}, "expected"),
        ({"context": "a", "choices": ["b", "c"], "answer": "0"}, "expected"),
        ({"context": "a", "choices": ["b" * 99, "c"], "answer": 0}, "tokens, and there is room for 1 to"),
        ({"good": "a"}, "not of the form"),
        ({"good": "a", "bad": ""}, "has 0 tokens"),
    ],
)
def test_files_that_cannot_be_judged(gpt, tmp_path, command, row, message):
    path = lines(tmp_path / "x.jsonl", [row])
    said = judged(command, gpt, path, status=2)
    assert message in said and said.count("\n") == 1
    assert "no such" in judged(command, gpt, tmp_path / "none.txt", status=2)


def test_hidden_states(tmp_path, text_file, command):
    """Of published weights without heads, held against themselves."""
    (tmp_path / "bert").mkdir()
    for path in (ROOT / "tests" / "fixtures" / "bert").iterdir():
        shutil.copy(path, tmp_path / "bert")
    tensors = load_tensors(tmp_path / "bert" / "model.safetensors")
    save_tensors(
        tmp_path / "bert" / "model.safetensors", {n: t for n, t in tensors.items() if not n.startswith("cls.")}
    )
    found = judged(command, tmp_path / "bert", text_file)
    assert found["val_loss"] == pytest.approx(0, abs=1e-9) and found["unit"] == "windows"


def test_standard_errors():
    assert with_error("a", np.array([1.0, 3.0])) == {"a": 2.0, "a_se": 1.0}
    assert with_error("a", np.array([1.0])) == {"a": 1.0}
