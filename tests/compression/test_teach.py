"""TinyBERT's steps in one command, texts written anew by a masked language model, and a teacher's kept answers."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, last_json, metrics
from test_distill import WAYS, inputs_for, make, task_for

from mini import load_run
from mini.compression import distill
from mini.compression.distill import DistillConfig
from mini.compression.rewrite import RewriteConfig, candidates, rewrite, word_tokens, written_anew
from mini.compression.teacher_cache import TeacherCache, merged_soft_targets
from mini.errors import UserError
from mini.tasks.metrics import classification_report
from mini.tensors import load_tensors, save_tensors

QUICK = ["--eval_every", 0, "--sample_every", 0]


@pytest.fixture(scope="module")
def pretrained(text_file, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "bert"
    tokens = ["--tokenizer", "bpe", "--vocab_size", 300, "--nsp", "false"]
    command("train_bert.py", "--data", text_file, *TINY, *tokens, "--steps", 150, *QUICK, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def files(text_file, tmp_path_factory):
    """Sentences about a cat or a dog."""
    folder = tmp_path_factory.mktemp("labelled")
    lines = text_file.read_text().splitlines()
    rows = [f"The {animal} {line}\t{animal}" for line in lines[:100] for animal in ("cat", "dog")]
    (folder / "train.tsv").write_text("text\tlabel\n" + "\n".join(rows[:160]) + "\n")
    (folder / "valid.tsv").write_text("text\tlabel\n" + "\n".join(rows[160:]) + "\n")
    return ["--train", folder / "train.tsv", "--valid", folder / "valid.tsv"]


@pytest.fixture(scope="module")
def classifier(pretrained, files, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "classifier"
    flags = ["--lr", 3e-3, "--epochs", 20, "--out", out]
    assert last_json(command("train_bert.py", "--task", "classify", "--init", pretrained, *files, *flags))["mcc"] > 0
    return out


def tinybert(command, teacher, out, *flags, status=0, ranks=0):
    options = ["--recipe", "tinybert", "--steps", 6, "--copies", 1, "--checkpoint_every", 3]
    options += [] if "--init" in flags else ["--general_steps", 4]
    return command("compress.py", "distill", teacher, "--out", out, *options, *flags, status=status, ranks=ranks)


# ---------------------------------------------------------------- texts written anew
def test_only_whole_words_are_replaced_by_what_the_model_says(pretrained):
    model, tokenizer = load_run(pretrained)
    text = "The cat sat under Zanzibar and the dog slept."
    ids = [tokenizer.cls, *tokenizer.encode(text), tokenizer.sep]
    (likely,) = candidates(model, tokenizer, [ids], word_tokens(tokenizer), 1)
    words = {place: tokenizer.decode([ids[place]]) for place in likely}
    assert set(words.values()) <= {" cat", " sat", " under", " and", " the", " dog", " slept"} and len(words) >= 4
    place = min(likely)  # the likeliest word by hand, with every seventh of those places masked
    masked = torch.tensor([ids])
    masked[0, list(likely)[::7]] = tokenizer.mask
    logits, _ = model.predict(masked, torch.tensor([len(ids)]), torch.tensor([[place]]))
    best = max(np.flatnonzero(word_tokens(tokenizer)), key=lambda i: float(logits[0, 0, i].detach()))
    assert likely[place] == [best]
    copies = list(written_anew(model, tokenizer, [text], RewriteConfig(copies=3, rate=0.0)))
    assert copies == [[text] * 3]
    ((new,),) = written_anew(model, tokenizer, [text], RewriteConfig(copies=1, rate=1.0, top=1))
    by_hand = [likely[p][0] if p in likely else i for p, i in enumerate(ids)][1:-1]
    assert new == tokenizer.decode(by_hand) and new != text


def test_a_wordpiece_text_keeps_its_pieces(tmp_path):
    from mini.text.wordpiece import load_wordpiece

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "fun", "great", "##est", ",", "##ny"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")
    tokenizer = load_wordpiece(tmp_path / "vocab.txt")
    assert [vocab[i] for i in np.flatnonzero(word_tokens(tokenizer))] == ["a", "film", "fun", "great"]
    model = make(WAYS[3], vocab_size=len(vocab))
    (copies,) = written_anew(
        model, tokenizer, ["A funny \U0001f600, great  film"], RewriteConfig(copies=30, rate=0.5, top=2)
    )
    assert {text.split()[1] for text in copies} == {"funny"}  # of two pieces
    assert {text.split()[2] for text in copies} == {"\U0001f600,"} and all("  " in text for text in copies)
    kept = np.mean([text.split()[-1] == "film" for text in copies])
    assert len(set(copies)) > 5 and 0.3 < kept < 1  # about half stay, and some are drawn again
    again = list(
        written_anew(model, tokenizer, ["A funny \U0001f600, great  film"], RewriteConfig(copies=30, rate=0.5, top=2))
    )
    assert again == [copies]


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_file_is_written_as_it_was(pretrained, tmp_path, suffix):
    rows = [{"text": 'The "cat" sat', "text_b": "on a mat", "label": "1"}, {"text": "x", "text_b": "", "label": "0"}]
    form = {
        "tsv": 'text\ttext_b\tlabel\nThe "cat" sat\ton a mat\t1\nx\t\t0\n',
        "csv": 'text,text_b,label\n"The ""cat"" sat",on a mat,1\nx,,0\n',
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }
    (tmp_path / f"a.{suffix}").write_text(form[suffix])
    model, tokenizer = load_run(pretrained)
    n = rewrite(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}", model, tokenizer, RewriteConfig(copies=2, rate=0))
    once = form[suffix].split("\n")
    head = [once.pop(0)] if suffix != "jsonl" else []
    assert n == 6 and (tmp_path / f"b.{suffix}").read_text().split("\n") == head + [once[0]] * 3 + [once[1]] * 3 + [""]


def test_rewrite_command(pretrained, classifier, files, tmp_path, command):
    train = files[1]
    done = command("-m", "mini", "rewrite", pretrained, train, "--copies", 2, "--out", tmp_path / "new.tsv")
    assert "480 rows, of which 2 in 3" in done.stdout
    old, new = (path.read_text().splitlines()[1:] for path in (train, tmp_path / "new.tsv"))
    assert new[::3] == old and [row.split("\t")[1] for row in new[1::3]] == [row.split("\t")[1] for row in old]
    assert new[1::3] != old and new[2::3] != new[1::3]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "a", "text_b": "b", "label": 1}\n{"text": "a", "label": 0}\n')
    done = command("-m", "mini", "rewrite", pretrained, mixed, "--out", tmp_path / "x.jsonl", status=2)
    assert "mixed.jsonl:2: no 'text_b'" in done.stderr
    for run, out, message in [
        (classifier, "x.tsv", "no head for masked tokens"),
        (pretrained, "x.csv", "has to be a .tsv file"),
        (pretrained, train, "exists already"),
        (pretrained, "", "--out"),
    ]:
        flags = ["--out", tmp_path / out] if out else []
        assert message in command("-m", "mini", "rewrite", run, train, *flags, status=2).stderr


# ---------------------------------------------------------------- TinyBERT
def test_four_steps_that_are_not_repeated(classifier, tmp_path, command):
    whole = tmp_path / "whole"
    done = tinybert(command, classifier, whole)
    steps = [tmp_path / f"whole{name}" for name in ("-general", "-layers", "")]
    assert [last["steps"] for last in map(read_result, steps)] == [4, 6, 6]
    assert done.stdout.count("The teacher:") == 2  # pretrained and fine-tuned
    losses = [
        set(metrics(step)[-1]) & {"classify", "mlm", "soft", "embedding", "hidden", "attention"} for step in steps
    ]
    inner = {"embedding", "hidden", "attention"}
    assert losses == [inner | {"mlm"}, inner | {"classify"}, {"soft", "classify"}]
    configs = [json.loads((step / "config.json").read_text()) for step in steps]
    assert [c["task"] for c in configs] == ["mlm", "classify", "classify"]
    assert configs[1]["data"]["train"] == configs[2]["data"]["train"]
    (augmented,) = tmp_path.glob("whole-augmented-*.tsv")
    assert configs[1]["data"]["train"] == str(augmented) and len(augmented.read_text().splitlines()) == 321
    assert "best_step" not in read_result(steps[1]) and "best_step" in read_result(whole)
    assert configs[2]["distill"]["temperature"] == 1.0 and metrics(whole)[-1]["loss"] == metrics(whole)[-1]["soft"]

    assert "it begins with the teacher's layers 0" in done.stdout and "Layers, teacher:student: 1:0" in done.stdout
    assert [f"step {n} of 4" in done.stdout for n in (1, 2, 3, 4)] == [True] * 4

    # Cut off in the third step: the command goes on from there, to the same bits.
    before = load_tensors(whole / "model.safetensors")
    shutil.rmtree(whole)
    for name in ("result.json", "model.safetensors"):
        (steps[1] / name).unlink()
    again = tinybert(command, classifier, whole)
    assert f"{steps[0]} is finished already" in again.stdout and "going on from" in again.stdout
    after = load_tensors(whole / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert last_json(again)["accuracy"] == read_result(whole)["accuracy"]
    assert load_run(whole)[0].config.n_layers == 1


def read_result(run):
    return json.loads((run / "result.json").read_text())


def test_the_teacher_is_fine_tuned_where_only_the_pretrained_one_is_given(pretrained, files, tmp_path, command):
    flags = [*files, "--lr", 3e-3, "--augment", "mask", "--copies", 0, "--init", pretrained, "--steps", 30]
    two = tinybert(command, pretrained, tmp_path / "two", *flags, ranks=2)
    config = json.loads((tmp_path / "two-teacher" / "config.json").read_text())
    assert config["init"] == str(pretrained) and config["optim"]["lr"] == 3e-3 and config["train"]["steps"] == 30
    assert config["task_options"]["augment"] == "mask" and not (tmp_path / "two-augmented.tsv").exists()
    assert not (tmp_path / "two-general").exists() and last_json(two)["steps"] == 30


def test_refusals_come_before_any_training(pretrained, classifier, files, tmp_path, command):
    alone, other, int8 = tmp_path / "alone", tmp_path / "other", tmp_path / "int8"
    size = ["--n_layers", 2, "--n_heads", 2, "--d_model", 32, "--device", "cpu", "--lr", 0, "--epochs", 1]
    command("train_bert.py", "--task", "classify", *files, *size, "--tokenizer", pretrained, "--out", alone)
    command("train_bert.py", "--task", "classify", *files, *size, "--vocab_size", 290, "--out", other)
    command("compress.py", "quantize", classifier, "--scheme", "static", "--out", int8)
    before = set(tmp_path.iterdir())
    for teacher, flags, message in [
        (alone, [], "with --general"),
        (alone, ["--general", pretrained], "no better than chance"),
        (classifier, ["--general", classifier], "is fine-tuned itself"),
        (other, ["--general", pretrained], "another tokenizer"),
        (classifier, ["--n_heads", 1], "has 1 heads"),
        (classifier, ["--cache", tmp_path / "c"], "--cache"),
        (classifier, ["--recipe", "hinton", "--copies", 0], "--copies has no effect here"),
        (classifier, ["--init", pretrained, "--general_steps", 3], "--init stands for the first step"),
        (classifier, ["--alpha", 0.5], "--alpha has no effect here: tinybert"),
        (classifier, ["--init", other], "another tokenizer"),
        (classifier, ["--init", int8], "is int8"),
        (classifier, ["--init", classifier, "--d_model", 16], "--d_model has no effect here: the student is that of"),
        (classifier, ["--recipe", "hinton"], "--copies has no effect here"),
        (pretrained, [*files, "--layer_map", "0:7"], "no 7"),
        (pretrained, [*files, "--general", pretrained], "leave it out"),
    ]:
        assert message in tinybert(command, teacher, tmp_path / "x", *flags, status=2).stderr
        assert set(tmp_path.iterdir()) - before <= {tmp_path / ".x-general.lock"}, message


def test_more_refusals(gpt, classifier, text_file, tmp_path, command):
    def distill_here(run, *flags):
        return command("compress.py", "distill", run, *flags, "--steps", 2, "--eval_every", 0, status=2).stderr

    command("compress.py", "quantize", gpt, "--out", tmp_path / "int8")
    done = command("compress.py", "distill", tmp_path / "int8", "--out", tmp_path / "x", status=2)
    assert "say how long the student learns with --steps" in done.stderr
    refused = distill_here(tmp_path / "int8", "--start", "first", "--out", tmp_path / "x")
    assert "is quantized, so its student begins at random" in refused
    flags = ["--steps", 1, *QUICK, "--out", tmp_path / "of-int8"]
    assert "it begins at random" in command("compress.py", "distill", tmp_path / "int8", *flags).stdout
    command("compress.py", "distill", gpt, "--steps", 2, *QUICK, "--out", tmp_path / "a")
    again = ["--out", tmp_path / "a", "--overwrite", "true"]
    assert "--out is the run to start from" in distill_here(gpt, *again, "--init", tmp_path / "a")
    shutil.copytree(gpt, tmp_path / "bad")
    tensors = {name: torch.zeros_like(t) for name, t in load_tensors(gpt / "model.safetensors").items()}
    save_tensors(tmp_path / "bad" / "model.safetensors", tensors)
    (tmp_path / "bad" / "result.json").unlink()  # which has the checksum of others
    assert "no better than chance" in distill_here(tmp_path / "bad", *again)
    assert read_result(tmp_path / "a")["steps"] == 2  # still there
    for flags, name in (
        (["--top_k", 3], "top_k"),
        (["--relation_heads", 2], "relation_heads"),
        (["--alpha", 0, "--temperature", 3], "temperature"),
    ):
        assert f"--{name} has no effect here" in distill_here(gpt, "--out", tmp_path / "x", *flags)
    # OUT is taken by another run: seen before the steps that come before it.
    command("compress.py", "distill", classifier, "--steps", 1, "--out", tmp_path / "taken")
    assert "taken holds another run" in tinybert(command, classifier, tmp_path / "taken", status=2).stderr
    assert not (tmp_path / "taken-general").exists()
    short = ["--positions", "learned", "--steps", 1, "--lr", 0, *QUICK]
    for max_len in (16, 32):
        out = tmp_path / f"learned{max_len}"
        size = ["--max_len", max_len, "--n_layers", 1, "--n_heads", 2, "--d_model", 16, "--tokenizer", "bytes"]
        command("train_gpt.py", "--data", text_file, *size, *short, "--out", out)
    stderr = distill_here(tmp_path / "learned32", "--init", tmp_path / "learned16", "--out", tmp_path / "x")
    assert "learned positions for 16 tokens only" in stderr


def test_chance():
    task = task_for(WAYS[2])
    for confusion, better in (
        ([[930, 0], [70, 0]], False),  # always the largest class
        ([[480, 450], [30, 40]], False),  # a guess
        ([[740, 190], [5, 65]], True),  # less accurate than the largest class, and yet informed
    ):
        assert task.beats_chance(classification_report(np.array(confusion), ["a", "b"])) == better
    task = task_for(WAYS[4])
    task.valid = [SimpleNamespace(ids=range(8)), SimpleNamespace(ids=range(32))]
    for loss, better in ((2.773, False), (2.0, True)):  # the mean of ln 8 and ln 32 is 2.773
        assert task.beats_chance({"val_loss": loss, "f1": 0.2}) == better


def test_a_student_may_be_augmented_other_than_its_teacher(classifier, tmp_path, command):
    flags = ["--steps", 2, "--augment", "insert,mask", "--augment_share", 1]
    command("compress.py", "distill", classifier, "--out", tmp_path / "a", *flags)
    options = json.loads((tmp_path / "a" / "config.json").read_text())["task_options"]
    assert options["augment"] == "insert,mask" and options["augment_share"] == 1


# ---------------------------------------------------------------- kept answers
def test_merged_classes():
    g = torch.Generator().manual_seed(0)
    student, logits = torch.randn(4, 9, generator=g), 3 * torch.randn(4, 9, generator=g)
    whole = distill.soft_targets(student, logits, 2.0)
    last = 0.0
    for k in (1, 3, 8, 9, 12):
        cache_free = (logits / 2).log_softmax(-1).topk(min(k, 9))
        rest = [] if k >= 9 else [(1 - cache_free.values.exp().sum(1, keepdim=True)).log()]
        kept = torch.cat([cache_free.values, *rest], 1)
        found = merged_soft_targets(student, kept, cache_free.indices, 2.0)
        p, q = kept.exp(), (student / 2).softmax(-1)
        q = torch.cat(
            [q.gather(1, cache_free.indices), *([1 - q.gather(1, cache_free.indices).sum(1)[:, None]] * len(rest))], 1
        )
        torch.testing.assert_close(found, 4 * (p * (p / q).log()).sum(), rtol=1e-4, atol=1e-5)
        assert last <= float(found) <= float(whole) * (1 + 1e-5)  # finer classes tell more apart
        last = float(found) - 1e-4
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("settings", WAYS)
def test_a_cache_asks_once_and_mixes_nothing_up(settings, tmp_path):
    teacher, student = make(settings, seed=1), make(settings, n_layers=2)
    inputs, options = inputs_for(settings), DistillConfig(cache=str(tmp_path), top_k=60)
    plain = distill.Distillation(task_for(settings), student, teacher, DistillConfig()).loss(student, inputs)
    task = distill.Distillation(task_for(settings), student, teacher, options)
    first = task.loss(student, inputs)
    assert task.cache.batches() == 1
    task.ask = None  # may not be called
    second = task.loss(student, inputs)
    for name in plain:
        torch.testing.assert_close(first[name], plain[name])
        assert torch.equal(first[name], second[name])
    other = {**inputs, "tokens": inputs["tokens"].flip(0)}
    with pytest.raises(TypeError):
        task.loss(student, other)
    assert TeacherCache(tmp_path, make(settings, seed=2), 60, 2.0).batches() == 0
    assert all(TeacherCache(tmp_path, teacher, *how).batches() == 0 for how in ((60, 1.0), (50, 2.0)))


def test_students_share_a_cache(gpt, tmp_path, command):
    def taught(name, *flags):
        common = ["--steps", 4, *QUICK, "--dtype", "float32", "--out", tmp_path / name]
        return command("compress.py", "distill", gpt, *common, *flags)

    cache = ["--cache", tmp_path / "cache"]
    plain = last_json(taught("plain"))
    assert "0 batches are there" in taught("first", *cache, "--top_k", 1000).stdout
    assert "4 batches are there" in taught("second", *cache, "--top_k", 1000).stdout
    weights = [load_tensors(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_result(tmp_path / "first")["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)
    assert "0 batches are there" in taught("fewer", *cache, "--top_k", 5).stdout
    assert "4 batches are there" in taught("narrow", *cache, "--top_k", 5, "--d_model", 16, "--alpha", 0.9).stdout


def test_a_cache_of_more_than_answers_is_refused():
    with pytest.raises(UserError, match="--cosine needs more"):
        DistillConfig("distilbert", cache="x")
