"""What a user types to train and use a BERT, bad input included."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, last_json, metrics

from mini import load_run
from mini.tasks.hidden import HiddenStates
from mini.tensors import load_tensors, save_tensors

FIXTURE = Path(__file__).parents[1] / "fixtures" / "bert"


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Many documents of short sentences."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "and", "slept"]
    folder = tmp_path_factory.mktemp("documents")
    for d in range(20):
        lines = [" ".join(rng.choice(words, rng.integers(4, 9))).capitalize() + "." for _ in range(40)]
        (folder / f"{d:02}.txt").write_text(" ".join(lines))
    return folder


@pytest.fixture(scope="module")
def flags(documents):
    return ["train_bert.py", "--data", documents, *TINY]


@pytest.fixture(scope="module")
def run(flags, command, tmp_path_factory):
    """A small pretrained run."""
    folder = tmp_path_factory.mktemp("runs") / "bert"
    done = command(*flags, "--steps", 300, "--sample_every", 100, "--out", folder)
    assert "python -m mini fill" in done.stdout and "it was" in done.stdout and "by frequency alone" in done.stdout
    result = last_json(done)
    assert result["mlm_loss"] > 0 and 0 <= result["nsp_accuracy"] <= 1
    assert result["val_loss"] == pytest.approx(result["mlm_loss"] + result["nsp_loss"])
    return folder


@pytest.fixture(scope="module")
def classifier(run, labelled, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("classify") / "run"
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv", "--normalize", "lower"]
    more = ["--epochs", 6, "--lr", 3e-3, "--augment", "swap,delete", "--class_weights", "balanced", "--out", out]
    more += ["--device", "cpu", "--dtype", "float32"]  # as the command classifies
    command("train_bert.py", "--task", "classify", "--init", run, *files, *more)
    return out


def test_resume_is_exact(flags, command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--dropout", 0.1, "--checkpoint_every", 6, "--log_every", 1, "--sample_every", 0]
    command(*flags, *more, "--steps", 12, "--out", whole)
    command(*flags, *more, "--steps", 12, "--out", cut)
    (cut / "model.safetensors").unlink()
    (cut / "result.json").unlink()
    command(*flags, *more, "--steps", 12, "--out", cut)
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    strip = [{k: v for k, v in row.items() if "tokens_per_s" not in k and k != "mfu"} for row in metrics(whole)]
    assert strip == [{k: v for k, v in row.items() if "tokens_per_s" not in k and k != "mfu"} for row in metrics(cut)]


def test_ranks_and_parts_do_not_matter(flags, command, tmp_path):
    losses = []
    for n, (ranks, parts) in enumerate([(0, 1), (0, 4), (2, 2)]):
        out = tmp_path / str(n)
        more = ["--steps", 6, "--accumulation", parts, "--dtype", "float32", "--log_every", 1, "--sample_every", 0]
        command(*flags, *more, "--out", out, ranks=ranks)
        losses.append([(row["mlm"], row["nsp"]) for row in metrics(out)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=2e-4)


def test_one_segment(flags, command, tmp_path):
    out = tmp_path / "one"
    result = last_json(command(*flags, "--nsp", "false", "--whole_word", "true", "--steps", 3, "--out", out))
    assert "nsp_loss" not in result and result["val_loss"] == result["mlm_loss"]
    assert not any(name.startswith(("nsp", "pooler")) for name in json_names(out / "model.safetensors"))
    again = command("train_bert.py", "--init", out, "--data", flags[2], "--steps", 2, "--out", tmp_path / "two")
    assert "nsp_accuracy" in last_json(again)  # the pair's head is fresh


def json_names(path: Path) -> list[str]:
    data = path.read_bytes()
    return list(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def test_fill(run, classifier, command):
    for where in (run, FIXTURE):
        lines = command("-m", "mini", "fill", where, "The cat [MASK] on a mat.").stdout.splitlines()
        assert len(lines) == 6 and lines[0] == "The cat [MASK] on a mat."
        values = [float(line.split()[0]) for line in lines[1:]]
        assert values == sorted(values, reverse=True) and 0 < sum(values) <= 1.001
    two = command("-m", "mini", "fill", run, "The [MASK] sat on a [MASK].", "--top", 2).stdout
    assert two.count("mask ") == 2 and len(two.splitlines()) == 7
    assert "[MASK] is missing" in command("-m", "mini", "fill", run, "The cat", status=2).stderr
    long = "cat " * 20 + "[MASK]"
    assert "cut off by max_len" in command("-m", "mini", "fill", run, long, status=2).stderr
    assert "no head for masked tokens" in command("-m", "mini", "fill", classifier, "a [MASK]", status=2).stderr


def test_classify(classifier, labelled, command, tmp_path):
    answer = command("-m", "mini", "classify", classifier, "A LOVELY film number 3", "a lovely film number 3").stdout
    _, upper, lower = (line.split("\t")[:2] for line in answer.splitlines())
    assert upper == lower  # lower-cased as in training
    out = tmp_path / "predictions.tsv"
    command("-m", "mini", "classify", classifier, labelled / "valid.tsv", "--out", out)
    rows = [line.split("\t") for line in out.read_text().splitlines()]
    truth = [line.split("\t")[1] for line in (labelled / "valid.tsv").read_text().splitlines()[1:]]
    hits = [row[0] == label for row, label in zip(rows[1:], truth, strict=True)]
    assert sum(hits) / len(hits) == json.loads((classifier / "result.json").read_text())["accuracy"]


def test_classifiers_train_further(classifier, labelled, command, tmp_path):
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv"]
    more = ["--steps", 1, "--lr", 0, "--out", tmp_path / "more", "--device", "cpu"]
    done = command("train_bert.py", "--task", "classify", "--init", classifier, *files, *more)
    before = json.loads((classifier / "result.json").read_text())
    assert last_json(done)["confusion"] == before["confusion"]  # the head was kept, and --normalize with it
    assert json.loads((tmp_path / "more" / "config.json").read_text())["task_options"]["normalize"] == "lower"
    refused = command("train_bert.py", "--task", "classify", "--init", classifier, *files, *more, "--normalize", "none",
                      status=2)  # fmt: skip
    assert "--normalize none: " in refused.stderr and "has lower" in refused.stderr


def test_pairs_of_texts(run, command, tmp_path):
    rows = [{"text": a, "text_b": b, "label": str(a == b)} for a in "abcd" for b in "abcd" for _ in range(4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    more = ["--train", path, "--valid", path, "--epochs", 1, "--out", tmp_path / "pairs", "--device", "cpu"]
    result = last_json(command("train_bert.py", "--task", "classify", "--init", run, *more))
    assert set(result["classes"]) == {"False", "True"} and result["majority"] == 0.75
    table = command("-m", "mini", "classify", tmp_path / "pairs", path).stdout.splitlines()
    assert len(table) == 65


def test_embed(run, labelled, command, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("The cat sat.\n\nA dog ran under a tree.\nThe cat sat.\n")
    command("-m", "mini", "embed", run, texts)
    vectors = np.load(tmp_path / "texts.txt.npy")
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[0], vectors[3], atol=1e-5)
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-3
    command("-m", "mini", "embed", run, labelled / "valid.tsv", "--out", tmp_path / "v.npy", "--pooling", "cls")
    assert np.load(tmp_path / "v.npy").shape == (12, 32)
    (tmp_path / "empty.txt").write_text("\n")
    assert "no text in it" in command("-m", "mini", "embed", run, tmp_path / "empty.txt", status=2).stderr


def test_question_answering(run, squad_file, command, tmp_path, monkeypatch):
    out = tmp_path / "qa"
    more = [
        "--train",
        squad_file,
        "--valid",
        squad_file,
        "--epochs",
        30,
        "--lr",
        3e-3,
        "--batch_size",
        16,
        "--out",
        out,
    ]
    flags = [
        "--tokenizer",
        "bytes",
        "--n_layers",
        2,
        "--n_heads",
        2,
        "--d_model",
        32,
        "--max_len",
        64,
        "--device",
        "cpu",
    ]
    done = command("train_bert.py", "--task", "qa", *flags, *more)
    result = last_json(done)
    assert result["f1"] >= result["exact_match"] >= 0 and "null_threshold" in result
    context, kept = "In year 117 it was cora who came.", json.loads((out / "result.json").read_text())
    for threshold, answers in ((1e9, True), (-1e9, False)):  # of no answer's score above the best span's
        monkeypatch.setenv("MINI_UNCHECKED", "1")  # as it is changed on purpose
        (out / "result.json").write_text(json.dumps(kept | {"null_threshold": threshold}))
        asked = ["answer", out, "--question", "Who came?", "--context", context, "--show", 2]
        lines = command("-m", "mini", *asked).stdout.splitlines()
        assert ("no answer" in lines[0]) != answers
        if answers:
            first, last = map(int, re.search(r"characters (\d+)-(\d+)", lines[1]).groups())
            assert lines[0] == context[first:last] and len(lines) == 4
    assert (
        "answers no questions"
        in command("-m", "mini", "answer", run, "--question", "a", "--context", "b", status=2).stderr
    )
    assert "--question: it is empty" in command("-m", "mini", "answer", out, "--context", "b", status=2).stderr


def test_question_answering_on_pythons_documentation(command, tmp_path):
    """Without files, from nothing, on two ranks: the spans that each has found are put together."""
    shape = ["--n_layers", 1, "--n_heads", 2, "--d_model", 16, "--max_len", 96, "--vocab_size", 600, "--device", "cpu"]
    more = ["--steps", 2, "--dtype", "float32", "--batch_size", 64]
    results = []
    for ranks in (0, 2):
        out = tmp_path / f"qa{ranks}"
        accumulation = ["--accumulation", 1 if ranks else 2]
        done = command("train_bert.py", "--task", "qa", *shape, *more, *accumulation, "--out", out, ranks=ranks)
        results.append(last_json(done))
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"], rel=1e-4)
    for name in ("exact_match", "f1"):  # of spans that after two steps are all but tied
        assert results[0][name] == pytest.approx(results[1][name], abs=0.02)
    assert "null_threshold" not in results[0]


def test_wrong_answers_are_counted(run, squad_file, command, tmp_path):
    content = json.loads(squad_file.read_text())
    content["data"][0]["paragraphs"][3]["qas"][0]["answers"][0]["answer_start"] += 1
    path = tmp_path / "off.json"
    path.write_text(json.dumps(content))
    more = [
        "--train",
        path,
        "--valid",
        squad_file,
        "--steps",
        1,
        "--out",
        tmp_path / "qa",
        "--max_len",
        32,
        "--stride",
        8,
    ]
    done = command("train_bert.py", "--task", "qa", "--init", run, *more, "--device", "cpu")
    assert "1 of 60 questions skipped: their answer is not at its place" in done.stdout
    shutil.rmtree(tmp_path / "qa")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "classfy"], "--task classfy: choose one of mlm, hidden, classify, qa (did you mean classify?)"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--task", "classify"], "--task classify needs --train FILE and --valid FILE"),
        (["--task", "qa", "--whole_word", "true"], "unknown flag --whole_word"),
        (["--init", FIXTURE, "--d_model", "64"], "--d_model 64"),
        (["--init", FIXTURE, "--max_len", "64"], "--max_len 64"),
        (["--train", FIXTURE / "vocab.txt"], "--train is a file to fine-tune on"),
        (["--n_segments", "1"], "--n_segments 1"),
        (["--init", FIXTURE.parent / "gpt2"], "holds a GPT, but this needs a BERT"),
        (["--tokenizer", "no-such.txt"], "it should be a WordPiece vocabulary"),
    ],
)
def test_refusals(flags, message, documents, command, tmp_path):
    out = tmp_path / "out"
    assert message in command("train_bert.py", "--data", documents, *flags, "--out", out, status=2).stderr
    assert not out.exists()


def test_published_weights_can_be_fine_tuned(labelled, command, tmp_path):
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv", "--out", tmp_path / "run"]
    done = command("train_bert.py", "--task", "classify", "--init", FIXTURE, *files, "--max_len", 20, "--steps", 4)
    assert "accuracy" in last_json(done) and (tmp_path / "run" / "vocab.txt").is_file()
    assert "is not a classifier" in command("-m", "mini", "classify", FIXTURE, "text", status=2).stderr


def test_what_is_read_is_not_written_over(classifier, run, labelled, command):
    before = (labelled / "valid.tsv").read_bytes()
    for flags in (["classify", classifier], ["embed", run]):
        done = command("-m", "mini", *flags, labelled / "valid.tsv", "--out", labelled / "valid.tsv", status=2)
        assert "is the file to read" in done.stderr and (labelled / "valid.tsv").read_bytes() == before


def test_a_file_is_not_a_text(classifier, documents, command):
    assert "file or folder" in command("-m", "mini", "classify", classifier, documents / "00.txt", status=2).stderr
    assert "file or folder" in command("-m", "mini", "classify", classifier, documents, "a text", status=2).stderr
    assert "is empty" in command("-m", "mini", "classify", classifier, " ", status=2).stderr


def test_too_many_tokens_for_a_small_text(tmp_path, command):
    """The message counts as the flag does, special tokens among them."""
    (tmp_path / "text.txt").write_text("A cat sat. A dog ran.\n\n" * 60)
    flags = ["train_bert.py", "--data", tmp_path / "text.txt", *TINY[2:], "--separator", r"\n\n", "--steps", 2]
    refused = command(*flags, "--vocab_size", 999, "--out", tmp_path / "run", status=2).stderr
    assert "--vocab_size 999: " in refused
    most = refused.split("yields only ")[1].split(";")[0]
    done = command(*flags, "--vocab_size", most, "--out", tmp_path / "run")
    assert f"vocabulary {most}" in done.stdout


def test_one_document_has_no_other(tmp_path, command):
    (tmp_path / "text.txt").write_text("A cat sat. A dog ran.\n\n" * 60)
    flags = ["train_bert.py", "--data", tmp_path / "text.txt", *TINY, "--out", tmp_path / "run"]
    assert "--separator" in command(*flags, status=2).stderr and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- published without a head
def test_an_encoder_without_a_head_is_judged_by_its_originals_hidden_states(command, documents, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(FIXTURE, folder)
    tensors = {n: t.clone() for n, t in load_tensors(FIXTURE / "model.safetensors").items() if not n.startswith("cls.")}
    (folder / "model.safetensors").unlink()
    save_tensors(folder / "model.safetensors", tensors)
    text = ["--data", documents, "--device", "cpu"]
    int8 = last_json(command("compress.py", "quantize", folder, "--out", tmp_path / "int8", *text))
    half = last_json(command("compress.py", "reduce", folder, "--layers", 1, "--out", tmp_path / "half", *text))
    assert 0 < int8["val_loss"] < 0.05 < half["val_loss"]
    # the figure is Σ ‖h - h₀‖² / ‖h₀‖², whatever comes between the original and the run
    again = last_json(command("compress.py", "quantize", tmp_path / "half", "--out", tmp_path / "both", *text))
    assert again["val_loss"] == pytest.approx(half["val_loss"], rel=0.1)
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config["task"] == "hidden" and config["task_options"] == {"original": str(folder)}
    original, tokenizer = load_run(folder)
    small, _ = load_run(tmp_path / "half")
    ids = torch.tensor([[tokenizer.cls, *range(5, 19), tokenizer.sep]])
    with torch.no_grad():
        h, h0 = small(ids), original(ids)
    task = HiddenStates.__new__(HiddenStates)
    task.original = original
    inputs = {"tokens": ids, "lengths": torch.tensor([16])}
    expected = ((h - h0).norm(dim=-1) / h0.norm(dim=-1)).square().sum()
    torch.testing.assert_close(task.losses({"hidden": h}, inputs)["hidden"], expected)
    refused = command("compress.py", "distill", folder, "--steps", 1, "--out", tmp_path / "x", *text, status=2)
    assert "has no head" in refused.stderr and not (tmp_path / "x").exists()
