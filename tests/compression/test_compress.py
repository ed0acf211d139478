"""compress.py as its user types it: chains of steps, going on, bad input."""

import json
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY, last_json, signalled

from mini import load_run
from mini.compression import report
from mini.compression.prune import ramp_end
from mini.compression.report import table
from mini.errors import UserError
from mini.model import sparse
from mini.tensors import load_tensors
from mini.training.ranks import World
from mini.training.start import open_own_task, open_run, train_run


@pytest.fixture(scope="module")
def classifier(bert, labelled, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    flags = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv", "--out", folder / "run"]
    command("train_bert.py", "--task", "classify", "--init", bert, *flags, "--epochs", 20, "--lr", 3e-3)
    return folder / "run"


def compress(command, what, run, out, *flags, status=0):
    return command("compress.py", what, run, "--out", out, *flags, status=status)


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def size(run: Path) -> int:
    return (run / "model.safetensors").stat().st_size


def assert_holds(run: Path, share: float) -> None:
    """The saved masks cover this share of each matrix, and what they cover is zero."""
    model, _ = load_run(run)
    masks = sparse.masks_of(model)
    assert masks.keys() == sparse.prunable(model).keys()
    for name, mask in masks.items():
        assert int((~mask).sum()) == round(share * mask.numel())
        assert (model.get_parameter(name)[~mask] == 0).all()


def test_chain_of_a_gpt(gpt, tmp_path, command):
    """reduce -> prune -> quantize -> sample, each judged, each smaller."""
    before = result(gpt)
    a, b, c = (tmp_path / name for name in "abc")
    reduced = last_json(compress(command, "reduce", gpt, a, "--keep", 1, "--steps", 5))
    pruned = last_json(compress(command, "prune", a, b, "--sparsity", 0.5, "--steps", 10))
    done = compress(command, "quantize", b, c)
    quantized = last_json(done)
    assert before["parameters"] > reduced["parameters"] == pruned["parameters"] == quantized["parameters"]
    assert pruned["sparsity"] == pytest.approx(0.5, abs=1e-3) and quantized["sparsity"] == pruned["sparsity"]
    assert size(gpt) > size(a) > size(b) > size(c) == quantized["bytes"]
    assert quantized["val_loss"] == pytest.approx(pruned["val_loss"], rel=0.02)
    text = command("-m", "mini", "sample", c, "The cat", "--temperature", 0, "--max_new_tokens", 20).stdout
    assert text.startswith("The cat") and len(text) > 20
    model, _ = load_run(c)
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in sparse.masks_of(model).items())


@pytest.mark.parametrize("schedule", ["oneshot", "cubic"])
def test_pruned_runs_train_on_and_keep_their_zeros(gpt, tmp_path, command, schedule):
    a, b = tmp_path / "a", tmp_path / "b"
    healed = last_json(compress(command, "prune", gpt, a, "--sparsity", 0.8, "--steps", 30, "--schedule", schedule))
    plain = last_json(compress(command, "prune", gpt, b, "--sparsity", 0.8))
    assert_holds(a, 0.8)
    assert_holds(b, 0.8)
    assert healed["val_loss"] < plain["val_loss"]


def test_masks_survive_an_interruption(gpt, tmp_path, command, cache):
    flags = ["prune", gpt, "--sparsity", 0.7, "--schedule", "cubic", "--steps", 60, "--checkpoint_every", 20]
    command("compress.py", *flags, "--out", tmp_path / "whole")
    killed = signalled(30, signal.SIGKILL, ["compress.py", *flags, "--out", tmp_path / "cut"], cache)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "cut" / "result.json").exists()
    model, _ = load_run(tmp_path / "cut")  # an unfinished one opens too
    assert sparse.masks_of(model)
    command("compress.py", *flags, "--out", tmp_path / "cut")
    whole, cut = (load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert_holds(tmp_path / "cut", 0.7)


@pytest.mark.parametrize("pattern", ["heads", "neurons"])
def test_structured_chain_of_a_classifier(classifier, tmp_path, command, pattern):
    a, b = tmp_path / "a", tmp_path / "b"
    pruned = last_json(compress(command, "prune", classifier, a, "--pattern", pattern, "--method", "gradient"))
    assert pruned["parameters"] < result(classifier)["parameters"] and "sparsity" not in pruned
    quantized = last_json(compress(command, "quantize", a, b, "--scheme", "static", "--observer", "percentile"))
    assert quantized["val_loss"] == pytest.approx(pruned["val_loss"], abs=0.2)
    shown = command("-m", "mini", "classify", b, "a lovely film number 3").stdout
    assert shown.splitlines()[1].split("\t")[0] in ("good", "bad")
    config = json.loads((a / "config.json").read_text())["model"]
    assert (config["n_heads"] == 1 and config["d_head"] == 16) if pattern == "heads" else config["d_ff"] == 64


def test_quantized_runs_train_on_in_their_form(classifier, tmp_path, command):
    """Fine-tuned further, a pruned and quantized run is still both."""
    a, b, c = (tmp_path / name for name in "abc")
    compress(command, "prune", classifier, a, "--sparsity", 0.5)
    trained = last_json(compress(command, "quantize", a, b, "--scheme", "qat", "--steps", 10))
    assert trained["steps"] == 10 and trained["sparsity"] == pytest.approx(0.5, abs=1e-3)
    data = json.loads((classifier / "config.json").read_text())["data"]
    flags = ["--train", data["train"], "--valid", data["valid"], "--epochs", 1, "--out", c]
    command("train_bert.py", "--task", "classify", "--init", b, *flags)
    model, _ = load_run(c)
    masks = sparse.masks_of(model)
    assert sparse.sparsity(model) == pytest.approx(0.5, abs=1e-3) and len(masks) == len(sparse.masks_of(load_run(a)[0]))
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in masks.items())
    assert model.stack.tokens.weight.dtype == torch.int8 and size(c) < 0.5 * size(classifier)


def test_quantized_training_survives_an_interruption(gpt, tmp_path, command):
    """From its checkpoint, ranges among it, the run ends as the one that never stopped, to the bit."""
    flags = ["quantize", gpt, "--scheme", "qat", "--steps", 20, "--checkpoint_every", 10]
    command("compress.py", *flags, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    (tmp_path / "cut" / "model.safetensors").unlink()
    assert "going on from" in command("compress.py", *flags, "--out", tmp_path / "cut").stdout
    whole, cut = (load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("flags", [["prune", "--schedule", "cubic"], ["quantize", "--scheme", "qat"]])
def test_several_processes_and_parts_make_the_same_run(gpt, tmp_path, command, flags):
    what, *flags = flags
    flags += ["--steps", 6, "--dtype", "float32"]
    one = last_json(compress(command, what, gpt, tmp_path / "one", *flags))
    argv = ["compress.py", what, gpt, "--out", tmp_path / "two", *flags, "--accumulation", 2]
    two = last_json(command(*argv, ranks=2))
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)


def test_labels_have_to_be_those_of_the_run(classifier, labelled, tmp_path, command):
    rows = (labelled / "train.tsv").read_text()
    (tmp_path / "other.tsv").write_text(rows.replace("\tgood", "\tpositive"))
    (tmp_path / "more.tsv").write_text(rows + "neither\tunsure\n" * 2)
    for name, words in (("other.tsv", "bad, positive"), ("more.tsv", "bad, good, unsure")):
        flags = ["--train", tmp_path / name, "--valid", tmp_path / name]
        done = compress(command, "prune", classifier, tmp_path / "x", *flags, status=2)
        assert f"the labels {words}, but" in done.stderr and "knows bad, good" in done.stderr
        assert not (tmp_path / "x").exists()


def test_int8_file_is_a_quarter(text_file, tmp_path, command):
    flags = ["--steps", 2, "--eval_every", 0, "--sample_every", 0]
    model = ["--tokenizer", "bytes", "--n_layers", 2, "--n_heads", 4, "--d_model", 128, "--max_len", 32]
    command("train_gpt.py", "--data", text_file, *model, *flags, "--device", "cpu", "--out", tmp_path / "gpt")
    compress(command, "quantize", tmp_path / "gpt", tmp_path / "int8")
    assert size(tmp_path / "int8") <= 0.27 * size(tmp_path / "gpt")
    compress(command, "prune", tmp_path / "gpt", tmp_path / "sparse", "--sparsity", 0.9)
    assert size(tmp_path / "sparse") <= 0.16 * size(tmp_path / "gpt")


def test_reduce(gpt, bert, tmp_path, command):
    done = compress(command, "reduce", gpt, tmp_path / "a", "--layers", 1, "--by", "influence")
    assert "Block influence: 0: " in done.stdout and "Layers kept: " in done.stdout
    assert load_run(tmp_path / "a")[0].config.n_layers == 1
    done = compress(command, "reduce", bert, tmp_path / "b", "--layers", 1, "--by", "last")
    assert "Layers kept: 1" in done.stdout
    small, whole = load_run(tmp_path / "b")[0], load_run(bert)[0]
    assert torch.equal(small.stack.blocks[0].mlp.up.weight, whole.stack.blocks[1].mlp.up.weight)


def test_report(gpt, tmp_path, command, monkeypatch):
    spawned = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: spawned("fork" if kind == "spawn" else kind))
    a, b = tmp_path / "a", tmp_path / "b"
    compress(command, "prune", gpt, a, "--sparsity", 0.5)
    compress(command, "quantize", gpt, b)
    flags = ["--repeats", 2, "--lengths", "32,16"]
    done = command("compress.py", "report", gpt, a, b, "--out", tmp_path / "report", *flags)
    table = (tmp_path / "report" / "report.md").read_text()
    assert table.strip() in done.stdout
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    forms = [(row["run"], row["form"]) for row in rows if row["form"] != "torch-int8"]  # which not every version has
    assert forms == [(str(gpt), "saved"), (str(gpt), "bf16"), (str(a), "saved"), (str(b), "saved"), (str(b), "bf16")]
    dense, sparse, int8 = rows[0], *rows[-3:-1]
    assert "runs of seed 1;" in table and "int8" in table.splitlines()[0]
    assert dense["bytes"] == size(gpt) and int8["bytes"] == size(b)
    assert dense["difference"] == 0 < int8["difference"] < sparse["difference"]
    assert dense["speed"] == "real" and sparse["speed"] == "simulated" and int8["speed"] in ("real", "simulated")
    assert sparse["nonzeros"] < 0.52 * dense["nonzeros"] == 0.52 * dense["parameters"]
    assert dense["val_loss"] == pytest.approx(result(gpt)["val_loss"], rel=1e-3)
    times = ("ms_1_1", "ms_1_32", "ms_8_32", "ms_1_16", "ms_8_16")
    assert all(row[name] > 0 for row in rows for name in times) and all(row["memory_mb"] >= 0 for row in rows)
    assert "(8, 16) ms" in table and rows[0]["tokens_per_s"] == pytest.approx(8 * 32 / rows[0]["ms_8_32"] * 1000)


def test_a_report_replaces_a_report_alone(gpt, tmp_path, command):
    for foreign in ("report.md", "report.json"):
        (tmp_path / foreign).write_text("{}")
        done = command("compress.py", "report", gpt, "--out", tmp_path, status=2)
        assert f"{foreign}: exists already" in done.stderr and (tmp_path / foreign).read_text() == "{}"
        (tmp_path / foreign).unlink()


def test_a_row_that_fails_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"could not be measured .*no such run folder") as failed:
        report.in_own_process(str(tmp_path / "none"), "saved", tmp_path / "out", report.ReportOptions(device="cpu"))
    assert "\n" not in str(failed.value)


def test_no_weights_are_the_best_before_pruning_ends(classifier, tmp_path, command):
    flags = ["--schedule", "cubic", "--steps", 9, "--eval_every", 1]
    found = last_json(compress(command, "prune", classifier, tmp_path / "a", "--sparsity", 0.5, *flags))
    assert found["best_step"] >= ramp_end(9) == 6 and found["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_budgets_of_a_run_are_not_those_of_what_is_made_of_it(text_file, tmp_path, command):
    """Without --steps nothing is trained, whatever ended the run's own training."""
    budget = ["--tokens", 2560, "--max_seconds", 60, "--sample_every", 0, "--eval_every", 0]
    command("train_gpt.py", "--data", text_file, *TINY, *budget, "--out", tmp_path / "run")
    assert result(tmp_path / "run")["steps"] == 10
    compress(command, "prune", tmp_path / "run", tmp_path / "half", "--sparsity", 0.5)
    assert result(tmp_path / "half")["steps"] == 0


def test_masks_hold_beside_another_method(gpt, tmp_path, command, monkeypatch):
    compress(command, "prune", gpt, tmp_path / "a", "--sparsity", 0.5)
    settings, world, handed = open_run(str(tmp_path / "a")), World("cpu"), []

    def caught(*arguments):
        handed.extend(arguments[7])
        raise UserError("that is all")

    monkeypatch.setattr("mini.training.start.train", caught)
    settings.job.out, other = str(tmp_path / "b"), object()
    with pytest.raises(UserError, match="that is all"):
        train_run(settings, settings.source, open_own_task(settings, world), world, methods=[other])
    assert handed[0] is other and isinstance(handed[1], sparse.HoldMasks)


def test_a_report_of_unlike_runs_has_dashes():
    """Of another task, other data or another length: what cannot be compared is not, and nothing fails."""
    common = dict(form="saved", int8=False, bytes=10, parameters=3, nonzeros=3, tokens_per_s=1.0, memory_mb=1.0,
                  speed="real", difference=None)  # fmt: skip
    first = dict(common, run="a", judged_by="accuracy", judged_on="x", accuracy=0.75, ms_1_128=2.0, ms_8_128=9.0)
    other = dict(common, run="b", judged_by="val_loss", judged_on="y", val_loss=3.0, ms_1_32=2.0, ms_8_32=9.0)
    third = dict(first, run="c", judged_on="z", accuracy=0.5)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table([first, other, third]).splitlines()]
    titles, _, a, b, c = rows
    assert a[titles.index("accuracy")] == "0.7500" and a[titles.index("change")] == "+0.0000"
    assert b[titles.index("accuracy")] == b[titles.index("change")] == b[titles.index("(8, 128) ms")] == "-"
    assert c[titles.index("accuracy")] == "0.5000" and c[titles.index("change")] == "-"


@pytest.mark.parametrize(
    "what, flags, message",
    [
        ("prune", ["--sparsity", "1"], "must be below 1"),
        ("prune", ["--sparsity", "-0.1"], "at least 0"),
        ("prune", ["--pattern", "3:5"], "no multiple of 5"),
        ("prune", ["--pattern", "rows"], "choose one of"),
        ("prune", ["--pattern", "heads", "--sparsity", "0.9"], "all 2 heads of layer 0"),
        ("prune", ["--pattern", "neurons", "--method", "wanda"], "wanda"),
        ("prune", ["--method", "gradient"], "for --pattern heads"),
        ("prune", ["--method", "wanda", "--scope", "global"], "wanda"),
        ("prune", ["--sparsty", "0.5"], "--sparsity"),
        ("quantize", ["--scheme", "static", "--calibrate", "0"], "calibrate 0"),
        ("quantize", ["--scheme", "qat"], "how long with --steps"),
        ("prune", ["--schedule", "cubic"], "how long with --steps"),
        ("prune", ["--pattern", "2:4", "--sparsity", "0.5"], "leave --sparsity out"),
        ("prune", ["--pattern", "heads", "--sparsity", "0.1"], "none would go"),
        ("quantize", ["--observer", "mse"], "no ranges to find"),
        ("reduce", ["--keep", "0", "--by", "first"], "--keep names them"),
        ("prune", ["--steps", "3", "--epochs", "1"], "give one of them"),
        ("reduce", [], "--keep"),
        ("reduce", ["--keep", "0,2"], "no 2"),
        ("reduce", ["--keep", "1,0"], "rising"),
        ("reduce", ["--keep", "x"], "numbers"),
        ("reduce", ["--layers", "3"], "has 2"),
        ("reduce", ["--keep", "0,1"], "all layers"),
        ("reduce", ["--layers", "1", "--keep", "0"], "or how many"),
    ],
)
def test_bad_input(gpt, tmp_path, command, what, flags, message):
    done = compress(command, what, gpt, tmp_path / "x", *flags, status=2)
    assert message in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "x").exists()


def test_more_bad_input(gpt, tmp_path, command):
    a, b = tmp_path / "a", tmp_path / "b"
    compress(command, "quantize", gpt, a)
    compress(command, "prune", gpt, b, "--sparsity", 0.6)
    for what, run, flags, message in [
        ("prune", a, [], "is quantized already: prune first"),
        ("quantize", a, [], "quantized already"),
        ("reduce", a, ["--layers", "1"], "reduce first"),
        ("prune", b, ["--sparsity", "0.5"], "has 0.6 already"),
        ("prune", tmp_path / "nothing", [], "no such run folder"),
    ]:
        done = compress(command, what, run, tmp_path / "x", *flags, status=2)
        assert message in done.stderr and not (tmp_path / "x").exists()
    itself = compress(command, "quantize", gpt, gpt, "--overwrite", "true", status=2)
    assert "--out is the run to start from" in itself.stderr and (gpt / "model.safetensors").exists()
    assert "first run" in command("compress.py", "report", a, gpt, "--out", tmp_path / "r", status=2).stderr
    done = command("compress.py", "report", gpt, "--lengths", "16,4096", "--out", tmp_path / "r", status=2)
    assert "--lengths 4096: " in done.stderr and "reads 32 tokens at most" in done.stderr
    assert "name the run folder" in command("compress.py", "prune", gpt, status=2).stderr
    assert "did you mean prune" in command("compress.py", "prun", gpt, status=2).stderr
    assert "prune" in command("compress.py").stdout


def test_published_weights(tmp_path, command, text_file):
    """A folder of published weights is a RUN too."""
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "bert", tmp_path / "published")
    lines = text_file.read_text().splitlines()
    documents = [json.dumps({"text": " ".join(lines[i : i + 20])}) for i in range(0, 1000, 20)]
    (tmp_path / "text.jsonl").write_text("\n".join(documents))
    done = compress(command, "quantize", tmp_path / "published", tmp_path / "int8", "--data", tmp_path / "text.jsonl")
    assert "nsp_accuracy" in last_json(done)
    assert load_run(tmp_path / "int8")[0].stack.tokens.weight.dtype == torch.int8


def test_a_bert_on_a_token_folder(text_file, tmp_path, command):
    """Made without a model's special tokens, it serves compression as it served training."""
    command("-m", "mini", "tokens", text_file, "--tokenizer", "bytes", "--out", tmp_path / "tokens")
    flags = [*TINY[2:], "--steps", 3, "--nsp", "false", "--out", tmp_path / "bert"]
    command("train_bert.py", "--data", tmp_path / "tokens", *flags)
    done = compress(command, "prune", tmp_path / "bert", tmp_path / "a", "--schedule", "cubic", "--epochs", 0.1)
    assert last_json(done)["steps"] > 0
    assert_holds(tmp_path / "a", 0.5)
