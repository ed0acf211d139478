"""Nothing lost, nothing believed: what is overwritten, damaged, foreign or no number is refused in one line."""

import contextlib
import io
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, command_line, environment, last_json

from mini import GPT, load_run
from mini.__main__ import main
from mini.flags import UserError, first_to_say, run_command
from mini.tensors import load_tensors, save_tensors
from mini.text.corpus import DataConfig
from mini.text.tokens import open_tokens, prepare_tokens
from mini.training import checkpoints
from mini.training.ranks import World
from mini.training.speed import Speedometer

QUICK = [*TINY, "--sample_every", 0, "--eval_every", 0, "--log_every", 1, "--steps", 2]


def refused(done, *words: str) -> None:
    """One line, and these words in it."""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.fixture
def run(gpt, tmp_path):
    """A copy of a finished run, to be spoilt."""
    shutil.copytree(gpt, tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------- loss of data
def test_overwrite_deletes_the_run_alone(text_file, run, command):
    (run / "notes.txt").write_text("mine")
    command("train_gpt.py", "--data", text_file, *QUICK, "--out", run, "--overwrite", "true")
    assert (run / "notes.txt").read_text() == "mine" and len(checkpoints.read_metrics(run)) == 2


@pytest.mark.parametrize("inside", ["init", "data", "another"])
def test_overwrite_refuses_where_something_is_read_or_another_run_lies_within(text_file, run, gpt, command, inside):
    flags = ["train_gpt.py", "--steps", 2, "--device", "cpu", "--out", run, "--overwrite", "true"]
    flags += TINY if inside != "init" else []
    if inside == "data":
        shutil.copy(text_file, run / "text.txt")
        flags += ["--data", run / "text.txt"]
    else:
        shutil.copytree(gpt, run / "deeper" / "one")
        flags += ["--data", text_file, *(["--init", run / "deeper" / "one"] if inside == "init" else [])]
    before = sorted(run.rglob("*"))
    refused(command(*flags, status=2), "lies in", "name another --out")
    assert sorted(run.rglob("*")) == before


def test_overwrite_refuses_where_a_foreign_file_lies_among_checkpoints(text_file, run, command):
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "notes.txt").write_text("mine")
    done = command("train_gpt.py", "--data", text_file, *QUICK, "--out", run, "--overwrite", "true", status=2)
    refused(done, "notes.txt is no file of a run")
    assert load_run(run)


def test_a_file_in_the_place_of_a_folder(text_file, command):
    for out in (text_file, text_file / "deeper"):
        refused(command("train_gpt.py", "--data", text_file, *QUICK, "--out", out, status=2), "is a file")


def test_a_run_named_like_a_setting_is_overwritten(text_file, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        command("train_gpt.py", "--data", text_file, *QUICK, "--out", "gpt", "--overwrite", "true")


def test_only_what_is_there_before_config_json_counts_as_a_start_cut_short(text_file, run, command):
    (run / "config.json").unlink()  # the old result.json would pass for that of the new run
    done = command("train_gpt.py", "--data", text_file, *QUICK, "--out", run, status=2)
    refused(done, "not a run folder")


def test_outputs_replace_only_what_they_wrote(tmp_path, gpt, run, labelled, command):
    weights = (run / "model.safetensors").read_bytes()
    more = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv", "--steps", 1, "--out", tmp_path / "c"]
    command("train_gpt.py", "--task", "classify", "--init", gpt, *more)
    classify = ["-m", "mini", "classify", tmp_path / "c", "a text", "--out"]
    (tmp_path / "link").symlink_to(tmp_path / "somewhere")
    for out in (run / "model.safetensors", tmp_path / "link", tmp_path, labelled / "train.tsv", os.devnull):
        refused(command(*classify, out, status=2), "--out")
    assert (run / "model.safetensors").read_bytes() == weights and not (tmp_path / "somewhere").exists()
    for _ in range(2):  # its own output it may replace
        command(*classify, tmp_path / "labels.tsv")
    table = (tmp_path / "labels.tsv").read_bytes()
    again = ["-m", "mini", "classify", tmp_path / "c", tmp_path / "labels.tsv", "--out", tmp_path / "labels.tsv"]
    refused(command(*again, status=2), "--out")  # what it reads
    assert (tmp_path / "labels.tsv").read_bytes() == table
    refused(command(*classify, tmp_path / "c" / "best.safetensors", status=2), "would be a file of the run")


def test_vectors_replace_vectors_alone(bert, tmp_path, command):
    (tmp_path / "a.txt").write_text("a\nb\n")
    embed = ["-m", "mini", "embed", bert, tmp_path / "a.txt", "--out", tmp_path / "a.npy"]
    for _ in range(2):
        command(*embed)
    np.save(tmp_path / "a.npy", np.arange(3))
    refused(command(*embed, status=2), "is not what this command writes")


def test_an_empty_folder_whose_start_was_cut_short_is_filled(text_file, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text("{")  # killed before config.json was there
    command("train_gpt.py", "--data", text_file, *QUICK, "--out", tmp_path / "run")
    assert load_run(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(command("train_gpt.py", "--data", text_file, *QUICK, "--out", tmp_path / "mine", status=2), "thesis.tex")


# ---------------------------------------------------------------- wrong, silently
@pytest.fixture
def kept_best(tmp_path, command):
    """An unfinished run with best weights, and the command that goes on with it."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--train", tmp_path / "pairs.jsonl", "--valid", tmp_path / "pairs.jsonl"]
    flags = ["train_gpt.py", "--task", "pairs", *files, *TINY, "--eval_every", 2, "--steps", 6, "--checkpoint_every", 4]
    flags += ["--tokenizer", "bytes", "--optimizer", "adamw", "--lr", 0.003]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = last_json(command(*flags, "--out", whole))
    kept = checkpoints.keep_best
    return flags, whole, cut, result, kept


def test_best_weights_are_those_that_were_measured(kept_best, command, monkeypatch):
    flags, whole, cut, result, kept = kept_best

    def killed(folder, model, step, world):
        checksum = kept(folder, model, step, world)
        if step == 6:
            raise KeyboardInterrupt
        return checksum

    monkeypatch.setattr(checkpoints, "keep_best", killed)
    command(*flags, "--out", cut, status=130)
    monkeypatch.setattr(checkpoints, "keep_best", kept)
    shutil.copytree(cut, cut.with_name("other"))
    again = last_json(command(*flags, "--out", cut))
    assert again["val_loss"] == result["val_loss"] and again["best_step"] == result["best_step"]
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list(cut.glob("best-*"))
    for best in cut.with_name("other").glob("best-*"):
        best.write_bytes(best.read_bytes()[:-1] + b"\x01")
    done = command(*flags, "--out", cut.with_name("other"), status=2)
    assert "no checkpoint can be used" in done.stderr


def test_best_weights_do_not_pile_up(labelled, tmp_path, command, monkeypatch):
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv"]
    flags = ["train_gpt.py", "--task", "classify", *files, *TINY, "--steps", 12, "--eval_every", 1, "--lr", 0.003]
    flags += ["--checkpoint_every", 6, "--keep", 2, "--sample_every", 0, "--out", tmp_path / "run"]
    kept, most, n = checkpoints.keep_best, [], []

    def counted(folder, model, step, world):
        n.append(step)
        checksum = kept(folder, model, step, world)
        most.append(len(list(folder.glob("best-*"))))
        return checksum

    monkeypatch.setattr(checkpoints, "keep_best", counted)
    command(*flags)
    assert len(n) > 3 and max(most) <= 3  # of two checkpoints, and the newest
    assert not list((tmp_path / "run").glob("best-*"))


def test_an_older_damaged_checkpoint_ends_no_training(text_file, tmp_path, command):
    flags = [
        "train_gpt.py",
        "--data",
        text_file,
        *QUICK,
        "--checkpoint_every",
        1,
        "--keep",
        5,
        "--out",
        tmp_path / "run",
    ]
    command(*flags)
    for name in ("model.safetensors", "result.json"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "best-mine.safetensors").write_text("not of the run")
    shutil.copytree(tmp_path / "run/checkpoints/step-00000001", tmp_path / "run/checkpoints/step-00000000")
    (tmp_path / "run/checkpoints/step-00000000/state.json").write_text("{")
    command(*flags)
    assert (tmp_path / "run" / "best-mine.safetensors").exists()


def test_a_checkpoint_of_another_run_is_passed_over(text_file, tmp_path, command):
    flags = ["train_gpt.py", "--data", text_file, *TINY, "--sample_every", 0, "--eval_every", 0, "--log_every", 1]
    flags += ["--steps", 6, "--checkpoint_every", 2]
    for seed in (1, 2):
        command(*flags, "--seed", seed, "--out", tmp_path / str(seed))
    expected = (tmp_path / "1" / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "result.json"):
        (tmp_path / "1" / name).unlink()
    shutil.rmtree(tmp_path / "1" / "checkpoints" / "step-00000004")
    shutil.copytree(tmp_path / "2" / "checkpoints" / "step-00000004", tmp_path / "1" / "checkpoints" / "step-00000004")
    done = command(*flags, "--out", tmp_path / "1")
    assert "belongs to another run" in done.stdout
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == expected


def test_tokens_are_those_that_were_written(text_file, tmp_path, command, cache, monkeypatch):
    made = ["-m", "mini", "tokens", text_file, "--tokenizer", "bytes", "--out"]
    use = ["train_gpt.py", *TINY[2:], "--steps", 2, "--out", tmp_path / "run", "--data"]
    for name in ("a", "b"):
        command(*made, tmp_path / name)
    tokens = np.memmap(tmp_path / "a" / "train.tokens", np.uint16, "r+")
    tokens[5] += 1
    tokens.flush()
    with monkeypatch.context() as unchecked:  # opens it this once, and does not make it good
        unchecked.setenv("MINI_UNCHECKED", "1")
        unchecked.setenv("MINI_CACHE", str(cache))  # as the commands have it
        assert open_tokens(tmp_path / "a")
    refused(command(*use, tmp_path / "a", status=2), "train.tokens", "damaged")
    command("-m", "mini", "tokens", text_file, "--vocab_size", 300, "--out", tmp_path / "bpe")
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        shutil.copy(tmp_path / "bpe" / name, tmp_path / "b" / name)
    refused(command(*use, tmp_path / "b", status=2), "tokenizer.json")
    meta = json.loads((tmp_path / "b" / "meta.json").read_text())
    (tmp_path / "b" / "meta.json").write_text(json.dumps(meta | {"sha256": {}}))
    refused(command(*use, tmp_path / "b", status=2), "no checksum of")


def test_damaged_tokens_in_the_cache_are_made_anew(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    config = DataConfig(str(text_file), tokenizer="bytes")
    folder, _ = prepare_tokens(config, 0, None)
    whole = (folder.path / "train.tokens").read_bytes()
    for damaged in (whole[:-2], b"\x01" + whole[1:]):
        (folder.path / "train.tokens").write_bytes(damaged)
        prepare_tokens(config, 0, None)
        assert (folder.path / "train.tokens").read_bytes() == whole


@pytest.mark.parametrize("flag", ["--data", "--init", "--valid", "--tokenizer", "--out", "--separator"])
def test_an_empty_value_is_refused(flag, command):
    refused(command("train_gpt.py", flag, "", status=2), f"{flag}: it is empty")


def test_weights_that_are_no_numbers(run, tmp_path, command):
    tensors = {name: tensor.clone() for name, tensor in load_tensors(run / "model.safetensors").items()}
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    (run / "model.safetensors").unlink()
    save_tensors(run / "model.safetensors", tensors)
    (run / "result.json").unlink()  # which has their checksum
    for line in (["-m", "mini", "sample", run, "A"], ["compress.py", "prune", run, "--out", tmp_path / "x"],
                 ["compress.py", "quantize", run, "--out", tmp_path / "x"]):  # fmt: skip
        refused(command(*line, status=2), "no numbers")
    assert not (tmp_path / "x").exists()


def test_empty_values_of_a_list(command, tmp_path):
    refused(command("-m", "mini", "tokens", "", "--out", tmp_path / "x", status=2), "FILES: it is empty")


def test_weights_whose_outputs_are_no_numbers(bert, gpt, tmp_path, command):
    """Each is one, but they overflow."""
    (tmp_path / "a.txt").write_text("a\n")
    for source in (gpt, bert):
        run = tmp_path / source.name
        shutil.copytree(source, run)
        tensors = {name: torch.full_like(t, 3e38) for name, t in load_tensors(run / "model.safetensors").items()}
        (run / "model.safetensors").unlink()
        save_tensors(run / "model.safetensors", tensors)
        (run / "result.json").unlink()
    lines = [["compress.py", name, tmp_path / "gpt", *more, "--out", tmp_path / "x"]
             for name, *more in (["prune"], ["quantize"], ["reduce", "--keep", "0"])]  # fmt: skip
    lines += [["-m", "mini", "sample", tmp_path / "gpt", "A"], ["-m", "mini", "fill", tmp_path / "bert", "a [MASK]"]]
    lines += [["-m", "mini", "embed", tmp_path / "bert", tmp_path / "a.txt"]]
    for line in lines:
        assert "of no use" in command(*line, status=2).stderr, line
        assert not (tmp_path / "x" / "result.json").exists()
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


@pytest.mark.parametrize("label", ["go\\tod", "go\\nod"])
def test_labels_of_several_lines(tmp_path, label, command):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "label": "{label}"}}\n{{"text": "b", "label": "bad"}}\n')
    files = ["--train", tmp_path / "a.jsonl", "--valid", tmp_path / "a.jsonl"]
    done = command("train_gpt.py", "--task", "classify", *files, *TINY, "--out", tmp_path / "run", status=2)
    refused(done, "a.jsonl:1", "tabs or line breaks")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "result.json"])
def test_a_finished_run_that_was_changed(run, name, command, monkeypatch):
    path = run / name
    content = path.read_bytes()
    at = content.rindex(b"7") if name != "model.safetensors" else len(content) - 1
    path.write_bytes(content[:at] + bytes([content[at] ^ 3]) + content[at + 1 :])
    refused(command("-m", "mini", "sample", run, "A", status=2), name)
    monkeypatch.setenv("MINI_UNCHECKED", "1")
    if name in ("model.safetensors", "result.json"):
        command("-m", "mini", "sample", run, "A", "--max_new_tokens", 2)


# ---------------------------------------------------------------- too much
def test_shapes_are_compared_before_a_model_is_built(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "fixtures" / "gpt2", tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config | {"n_embd": 2**20, "n_head": 2, "n_layer": 1000}))
    with pytest.raises(UserError, match="do not fit"):
        GPT.from_published(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config | {"n_layer": 10**9}))
    with pytest.raises(UserError, match="n_layers"):
        GPT.from_published(tmp_path / "gpt2")


def test_a_pickle_of_odd_tensors(tmp_path):
    shutil.copytree(ROOT / "tests" / "fixtures" / "gpt2", tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").unlink(missing_ok=True)
    for odd in ({1: torch.ones(2)}, {"a": torch.ones(1).expand(10**9)}, {"a": torch.ones(3).to_sparse()}, {"a": 1}):
        torch.save(odd, tmp_path / "gpt2" / "pytorch_model.bin")
        with pytest.raises(UserError, match="name: tensor"):
            GPT.from_published(tmp_path / "gpt2")


# ---------------------------------------------------------------- no traceback
def test_figures_that_are_none(text_file, run, command):
    flags = ["train_gpt.py", "--data", text_file, *TINY, "--steps", 60, "--eval_every", 0, "--sample_every", 0]
    for figures in ({"val_loss": "x", "steps": []}, {"val_loss": 1.0}, {}, {"val_loss": 1.0, "sha256": 3}):
        (run / "result.json").write_text(json.dumps(figures))
        refused(command(*flags, "--out", run, status=2), "result.json")


def test_names_that_are_no_text(text_file, tmp_path, command):
    odd = os.fsdecode(b"\xffrun")
    command("train_gpt.py", "--data", text_file, *QUICK, "--out", tmp_path / odd)
    assert load_run(tmp_path / odd)
    refused(command("train_gpt.py", "--data", text_file, *QUICK, "--out", "/", status=2), "name a folder")
    refused(command("-m", "mini", "sample", tmp_path / "a\nb\x1b[2J", "A", status=2), r"a\nb\x1b[2J")


def test_half_a_character(run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mini", "sample", str(run), "a \udcff b", "--max_new_tokens", "2"])
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as out:
        main()
    out.flush()
    assert out.buffer.getvalue().startswith(b"a \\udcff b")


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError(), "error: not enough memory here (MemoryError): give smaller sizes"),
        (RuntimeError("CUDA out of memory. Tried to\n..."), "CUDA out of memory. Tried to)"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_what_is_said_of_memory(error, said, capsys, monkeypatch):
    def fail(argv: list) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit if said else RuntimeError):
        run_command(fail)
    assert (said or "") in capsys.readouterr().err


def test_metrics_that_are_none(run):
    (run / "metrics.jsonl").write_text('{"step": "x", "loss": 1.0}\n{"step": 3, "loss": 2.5}\n' + "[" * 100_000 + "\n")
    assert [row["step"] for row in checkpoints.read_metrics(run)] == [3]


def test_of_many_processes_each_mistake_is_said_once(tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    said = []
    for rank, message in ((1, "error: only here"), (0, "error: all"), (1, "error: all")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        said += [message] if first_to_say(message) else []
    assert said == ["error: only here", "error: all"]


def test_an_error_of_another_rank_is_seen(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import os, time
        from mini.flags import UserError, run_command
        def main(argv):
            if os.environ["RANK"] == "1":
                raise UserError("here alone")
            time.sleep(60)
        run_command(main)
    """)
    done = subprocess.run(command_line(script, torchrun=2), capture_output=True, text=True, env=environment(tmp_path))
    assert done.returncode and done.stderr.count("error: here alone\n") == 1


@pytest.mark.parametrize(
    "flag", ["--n_layers", "--d_model", "--d_ff", "--n_heads", "--batch_size", "--max_len", "--lr"]
)
def test_sizes_that_nobody_has(flag, text_file, tmp_path, command):
    flags = ["train_gpt.py", "--data", text_file, *TINY[:2], "--steps", 1, flag, "1e18" if flag != "--lr" else "1e308"]
    refused(command(*flags, "--out", tmp_path / "run", status=2), flag)
    assert not (tmp_path / "run").exists()


def test_a_temperature_that_float32_has_not(run, command):
    cold, greedy = (
        command("-m", "mini", "sample", run, "The", "--temperature", t, "--max_new_tokens", 5).stdout
        for t in ("1e-46", "0")
    )
    assert cold == greedy


def test_a_clock_that_stands_still(gpt):
    model = load_run(gpt)[0]
    state = {"tokens": 0, "train_seconds": 0.0}
    speed = Speedometer(model, 0, torch.float32, World("cpu"), state)
    assert speed.overall({"tokens": 5, "train_seconds": 0.0})["tokens_per_s"] > 0
