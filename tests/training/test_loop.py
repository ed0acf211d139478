"""The loop's promises: one gradient however the batch is cut, and a run that nothing can disturb."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, Forked, command_line, environment, last_json, lm_loss, metrics, signalled

from mini import load_run
from mini.errors import UserError
from mini.tensors import load_tensors
from mini.training import checkpoints, loop, speed
from mini.training.checkpoints import newest_checkpoint
from mini.training.loop import TrainConfig, is_better, rescaled
from mini.training.ranks import World
from mini.training.start import open_run, open_task

QUICK = [*TINY, "--sample_every", 0, "--eval_every", 0, "--log_every", 1]


def weights_of(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def dropout_run(text_file, command, tmp_path_factory):
    """An uninterrupted training with dropout, and the flags that made it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 120, "--checkpoint_every", 10, "--dropout", 0.2]
    return folder, flags, last_json(command(*flags, "--out", folder))


def test_learns_and_leaves_a_whole_run(dropout_run, command):
    folder, flags, result = dropout_run
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert result["val_loss"] == rows[-1]["val_loss"] and result["tokens"] == 120 * 8 * 32
    assert all(row["tokens_per_s"] > 0 and row["mfu"] > 0 for row in rows)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000100", "step-00000110"]
    model, tokenizer = load_run(folder)
    assert not model.training and tokenizer.kind == "bytes"
    # and the figure it reports is that of the saved weights on the whole held-out text, to its last byte
    text = flags[2].read_bytes()
    held_out = [tokenizer.eot, *text[int(len(text) * 0.9) :]]
    total = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=result["dtype"] == "bfloat16"):
        for start in range(0, len(held_out) - 1, 32):
            window = torch.tensor([held_out[start : start + 33]])
            total += float(lm_loss(model, window[:, :-1], window[:, 1:]))
    assert result["val_loss"] == pytest.approx(total / (len(held_out) - 1), rel=1e-3)
    assert result["val_bpb"] == pytest.approx(result["val_loss"] / math.log(2))
    assert (folder / "loss.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_finished_run_is_not_trained_again(dropout_run, command):
    folder, flags, result = dropout_run
    before = weights_of(folder)
    done = command(*flags, "--out", folder)
    assert "finished already" in done.stdout + done.stderr and last_json(done) == result
    assert weights_of(folder) == before


def test_sigkill_then_the_same_command(dropout_run, cache, tmp_path, command):
    whole, flags, _ = dropout_run
    argv = [*flags, "--out", tmp_path / "run"]
    killed = signalled(37, signal.SIGKILL, argv, cache)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "run" / "model.safetensors").exists()
    load_run(tmp_path / "run")  # an unfinished run opens too
    done = command(*argv)
    assert "going on from" in done.stdout + done.stderr
    assert weights_of(tmp_path / "run") == weights_of(whole)
    strip = [{k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")} for row in metrics(tmp_path / "run")]
    assert strip == [{k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")} for row in metrics(whole)]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_write_a_checkpoint_first(dropout_run, cache, tmp_path, command, number, status):
    whole, flags, _ = dropout_run
    argv = [*flags, "--checkpoint_every", 0, "--out", tmp_path / "run"]
    stopped = signalled(5, number, argv, cache)
    assert stopped.returncode == status and "Traceback" not in stopped.stdout
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert str(checkpoint) in stopped.stdout
    command(*argv)
    assert weights_of(tmp_path / "run") == weights_of(whole)


@pytest.mark.parametrize("damage", ["truncate", "flip", "state"])
def test_damaged_checkpoint_is_passed_over(dropout_run, tmp_path, command, damage):
    whole, flags, _ = dropout_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("model.safetensors", "result.json"):
        (folder / name).unlink()
    newest = folder / "checkpoints" / "step-00000110"
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    if damage == "truncate":
        (newest / "optimizer.safetensors").write_bytes(content[:-100])
    elif damage == "flip":
        content[-50] ^= 1
        (newest / "optimizer.safetensors").write_bytes(content)
    else:
        state = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps({**state, "step": 111}))
    done = command(*flags, "--out", folder, "--keep", 1)
    assert "step-00000110 is damaged" in done.stdout + done.stderr
    assert weights_of(folder) == weights_of(whole)
    (checkpoint,) = (folder / "checkpoints").iterdir()  # written after the fall-back, and kept
    assert newest_checkpoint(folder) == checkpoint


def test_all_checkpoints_damaged(dropout_run, tmp_path, command):
    whole, flags, _ = dropout_run
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run").rglob("*.safetensors"):
        path.unlink() if path.parent.name == "run" else path.write_bytes(b"junk")
    (tmp_path / "run" / "result.json").unlink()
    assert "no checkpoint can be used" in command(*flags, "--out", tmp_path / "run", status=2).stderr
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # nothing is thrown away


def test_an_existing_empty_folder_is_filled(text_file, tmp_path, command):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    command("train_gpt.py", "--data", text_file, *QUICK, "--steps", 1, "--out", tmp_path / "link")
    assert (tmp_path / "disk" / "model.safetensors").exists()


def test_changed_config_is_refused(dropout_run, command):
    folder, flags, _ = dropout_run
    before = weights_of(folder)
    done = command(*flags, "--out", folder, "--lr", 0.5, "--d_model", 64, status=2)
    assert "d_model was 32, now 64" in done.stderr and "lr was 0.005, now 0.5" in done.stderr
    assert done.stderr.count("\n") == 1 and weights_of(folder) == before
    command(*flags, "--out", folder, "--log_every", 7)  # what does not touch the result may change


def test_overwrite_begins_anew(dropout_run, tmp_path, command):
    whole, flags, _ = dropout_run
    shutil.copytree(whole, tmp_path / "run")
    command(*flags, "--out", tmp_path / "run", "--steps", 3, "--overwrite", "true")
    assert len(metrics(tmp_path / "run")) == 3
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    command(*flags, "--out", tmp_path / "precious", "--overwrite", "true", status=2)
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_ranks_and_accumulation_change_nothing(text_file, tmp_path, command):
    """1 rank x 4 parts, 2 x 2 and 4 x 1 train the same model, dropout included; so does one big batch without it."""
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--dtype", "float32", "--steps", 15, "--checkpoint_every", 0]
    losses, results = {}, {}
    for ranks, parts, dropout in ((1, 4, 0.1), (2, 2, 0.1), (4, 1, 0.1), (1, 1, 0.0), (1, 2, 0.0)):
        out = tmp_path / f"{ranks}x{parts}-{dropout}"
        extra = ["--accumulation", parts, "--dropout", dropout, "--out", out]
        done = command(*flags, *extra, ranks=ranks)
        losses[ranks, parts] = [row["loss"] for row in metrics(out)]
        results[ranks, parts] = last_json(done)
        assert done.stdout.count('"val_loss"') == 1  # only rank 0 prints
    for a, b in (((1, 4), (2, 2)), ((1, 4), (4, 1)), ((1, 1), (1, 2))):
        assert losses[a] == pytest.approx(losses[b], rel=1e-4)
        assert results[a]["val_loss"] == pytest.approx(results[b]["val_loss"], rel=1e-4)
        assert results[a]["tokens"] == results[b]["tokens"]
    assert losses[1, 4] != losses[1, 1]


def test_torchrun_goes_on_from_a_checkpoint(text_file, tmp_path, command):
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 12, "--checkpoint_every", 5]
    command(*flags, "--out", tmp_path / "whole", torchrun=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name in ("model.safetensors", "result.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    command(*flags, "--out", tmp_path / "run", ranks=2)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_divergence_stops_the_run(text_file, tmp_path, command):
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--optimizer", "adamw", "--clip", 0, "--dtype", "float32"]
    more = ["--lr", 1e37, "--warmup", 0, "--checkpoint_every", 1, "--out", tmp_path / "run"]
    done = command(*flags, *more, status=2)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: step 2: ") and "smaller --lr" in error
    assert "checkpoint: none" in error  # step-00000001 is there, but its weights are what failed
    assert not (tmp_path / "run" / "model.safetensors").exists()
    last = [*more[:-1], tmp_path / "last", "--steps", 1, "--lr", 1e38]
    error = command(*flags, *last, status=2).stderr.strip().splitlines()[-1]
    assert "the validation loss is" in error and not (tmp_path / "last" / "result.json").exists()


def test_compiled_training_gives_the_same_losses(text_file, tmp_path, command):
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--dtype", "float32", "--steps", 8]
    command(*flags, "--out", tmp_path / "eager")
    done = command(*flags, "--compile", "true", "--out", tmp_path / "compiled")
    if "torch.compile does not work here" in done.stdout:
        pytest.skip("no compiler")
    eager, compiled = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("eager", "compiled"))
    assert eager == pytest.approx(compiled, rel=1e-3)


@pytest.mark.parametrize("seconds, products", [(1.0, 1), (1e-5, 2)])
def test_no_large_product_where_a_small_one_is_slow(seconds, products, monkeypatch):
    """As in bfloat16 on a processor without it, where it would take minutes."""
    made = []
    monkeypatch.setattr(speed, "call_times", lambda call, n, device: made.append(call) or [seconds] * n)
    speed.matmul_speed.cache_clear()
    found = speed.matmul_speed(torch.device("cpu"), torch.float32)
    speed.matmul_speed.cache_clear()
    assert len(made) == products and found == 2 * (256, 2048)[products - 1] ** 3 / seconds


def test_float16_resumes_to_the_bit(text_file, tmp_path, command, monkeypatch):
    """And steps whose gradients it cannot hold are left out, with half the scale from then on."""
    scales = []
    monkeypatch.setattr(loop, "rescaled", lambda state, lost: scales.append(state["scale"]) or rescaled(state, lost))
    monkeypatch.setattr(loop, "FIRST_SCALE", 2.0**24)
    small = ["--d_model", 8, "--max_len", 4, "--n_layers", 1, "--batch_size", 1]  # CPUs are slow at it
    few = [*small, "--valid_fraction", 0.001, "--steps", 20, "--checkpoint_every", 8]
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--dtype", "float16", *few]
    result = last_json(command(*flags, "--out", tmp_path / "whole"))
    norms = [row["grad_norm"] for row in metrics(tmp_path / "whole")]
    assert result["dtype"] == "float16" and None in norms and norms[-1] is not None
    assert scales == sorted(scales, reverse=True) and scales[-1] < 2.0**24
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name in ("model.safetensors", "result.json", "checkpoints/step-00000016/state.json"):
        (tmp_path / "run" / name).unlink()
    command(*flags, "--out", tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_the_scale_of_float16():
    state = {"scale": 4.0, "good": 1999}
    assert rescaled(state, False) == {"scale": 8.0, "good": 0}
    assert rescaled(state, True) == {"scale": 2.0, "good": 0}
    assert rescaled({"scale": 4.0, "good": 7}, False) == {"scale": 4.0, "good": 8}


def test_a_checkpoint_that_cannot_be_written_ends_the_run(text_file, tmp_path, command, monkeypatch):
    """Though it is written beside the training: what is wrong is said, and nothing half-written stays."""

    def full(path, tensors, lead=True):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 6, "--checkpoint_every", 2]
    done = command(*flags, "--out", tmp_path / "run", status=2)
    assert "No space left" in done.stderr and done.stderr.count("error: ") == 1
    assert not list((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "run" / "result.json").exists()


def test_training_goes_on_while_a_checkpoint_is_written(text_file, tmp_path, command, monkeypatch):
    """And what is written is of the step that it is named after."""
    log, write, went_on = tmp_path / "run" / "metrics.jsonl", checkpoints.write_tensors, []

    def slow(path, tensors, lead=True):
        for _ in range(6000 * ("step-00000002" in str(path))):  # until the next step is logged
            if '"step": 3' in log.read_text():
                went_on.append(path.name)
                break
            time.sleep(0.01)
        write(path, tensors, lead)

    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 5, "--checkpoint_every", 2, "--keep", 5]
    command(*flags, "--out", tmp_path / "before")
    monkeypatch.setattr(checkpoints, "write_tensors", slow)
    command(*flags, "--out", tmp_path / "run")
    assert went_on == ["model.safetensors", "optimizer.safetensors"]
    for step in (2, 4):
        for name in ("model.safetensors", "optimizer.safetensors"):
            a, b = (tmp_path / run / "checkpoints" / f"step-0000000{step}" / name for run in ("before", "run"))
            assert a.read_bytes() == b.read_bytes()


def test_without_a_compiler_it_says_so_and_goes_on(text_file, tmp_path, cache):
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 2, "--compile", "true", "--out", tmp_path / "run"]
    nothing = {**environment(cache), "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run(command_line(*flags), env=nothing, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stdout + done.stderr and "Traceback" not in done.stderr


def write_pairs(path, n: int = 24):
    rows = [{"prompt": f"{i} letters:", "answer": "x" * (1 + i % 7)} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_unequal_counts_are_averaged_over_the_whole_batch(tmp_path, command):
    """Answers of different lengths: a mean of the parts' means would not be that of the batch."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    flags = ["train_gpt.py", "--task", "pairs", "--train", pairs, "--valid", pairs, *QUICK, "--dtype", "float32"]
    losses = []
    for parts, ranks in ((1, 0), (4, 0), (2, 2)):
        out = tmp_path / f"{parts}x{ranks}"
        command(*flags, "--steps", 6, "--accumulation", parts, "--out", out, ranks=ranks)
        losses.append([row["loss"] for row in metrics(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_fine_tuning_keeps_the_best_and_resumes_to_the_bit(tmp_path, cache, command):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    flags = ["train_gpt.py", "--task", "pairs", "--train", pairs, "--valid", pairs, *QUICK, "--dropout", 0.2]
    flags += ["--steps", 60, "--eval_every", 3, "--lr", 0.1, "--checkpoint_every", 7]  # so high that it worsens again
    result = last_json(command(*flags, "--out", tmp_path / "whole"))
    values = {row["step"]: row["val_loss"] for row in metrics(tmp_path / "whole") if "val_loss" in row}
    assert result["val_loss"] == min(values.values()) == values[result["best_step"]] <= values[60]
    argv = [*flags, "--out", tmp_path / "run"]
    assert signalled(25, signal.SIGKILL, argv, cache).returncode == -signal.SIGKILL
    again = last_json(command(*argv))
    assert again["best_step"] == result["best_step"] and again["val_loss"] == result["val_loss"]
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_several_threads_resume_to_the_bit(text_file, tmp_path, command):
    """The other tests use one thread, where sums have one order anyway."""
    wide = ["--d_model", 64, "--max_len", 64, "--steps", 40, "--checkpoint_every", 15, "--dropout", 0.2]
    flags = ["train_gpt.py", "--data", text_file, *QUICK, *wide]
    torch.set_num_threads(2)
    try:
        command(*flags, "--out", tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        for name in ("model.safetensors", "result.json", "checkpoints/step-00000030/state.json"):
            (tmp_path / "run" / name).unlink()
        command(*flags, "--out", tmp_path / "run")
    finally:
        torch.set_num_threads(1)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_two_processes_cannot_train_in_one_folder(dropout_run, cache, tmp_path, command):
    _, flags, _ = dropout_run
    argv = [*flags, "--steps", 100000, "--out", tmp_path / "run"]
    first = Forked(argv, cache)
    try:
        for _ in range(1000):
            if (tmp_path / "run" / "metrics.jsonl").exists():
                break
            time.sleep(0.05)
        assert "another process is training here" in command(*argv, status=2).stderr
        assert "another process" in command(*argv, "--overwrite", "true", status=2).stderr
    finally:
        os.kill(first.process, signal.SIGKILL)
    assert first.wait().returncode == -signal.SIGKILL


def test_budgets(gpt):
    """In tokens, or in arithmetic: three forward passes a step, by the model's own count."""
    model, task = load_run(gpt)[0], SimpleNamespace(n=100, fixed_shape=True, predicted=1.0)
    step = 8 * model.config.max_len  # tokens
    assert TrainConfig(batch_size=8, tokens=10.4 * step).total_steps(task, model) == 10
    flops = 3 * model.flops(model.config.max_len) * step
    assert TrainConfig(batch_size=8, flops=7 * flops).total_steps(task, model) == 7
    assert TrainConfig(batch_size=16, flops=7 * flops).total_steps(task, model) == 4
    assert TrainConfig(batch_size=8, flops=1).total_steps(task, model) == 1
    assert TrainConfig(batch_size=8, epochs=2).total_steps(task, model) == 25
    task.fixed_shape = False
    with pytest.raises(UserError, match="--tokens: this task's texts differ in length"):
        TrainConfig(tokens=1e6).total_steps(task, model)


def test_the_clock_ends_a_run_with_its_schedule(text_file, tmp_path, command):
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 10**6, "--schedule", "linear", "--lr", 0.01]
    flags += ["--warmup", 0]  # so that the first step has the full rate, however few there are
    result = last_json(command(*flags, "--max_seconds", 2, "--out", tmp_path / "run"))
    rows = metrics(tmp_path / "run")
    assert 0 < result["steps"] == rows[-1]["step"] < 10**6 and rows[-1]["val_loss"] == result["val_loss"]
    assert rows[-1]["lr"] < 1e-7 < 1e-4 < max(row["lr"] for row in rows)
    again = command(*flags, "--max_seconds", 2, "--out", tmp_path / "run")
    assert "finished already" in again.stdout and last_json(again) == result


def test_the_order_has_a_seed_of_its_own(text_file, tmp_path, command):
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 3, "--zero_init", "false"]
    losses = {}
    for seeds in ((1, None), (1, 1), (1, 2), (2, 1)):
        more = [] if seeds[1] is None else ["--data_seed", seeds[1]]
        command(*flags, "--seed", seeds[0], *more, "--out", out := tmp_path / "-".join(map(str, seeds)))
        losses[seeds] = [row["loss"] for row in metrics(out)]
    assert losses[1, None] == losses[1, 1] and losses[1, 1] != losses[1, 2] != losses[2, 1] != losses[1, 1]
    order = {}
    for seed, data_seed in ((1, 2), (3, 2), (2, None)):
        settings = open_run(str(tmp_path / "1-2"))
        settings.train = replace(settings.train, seed=seed, data_seed=data_seed)
        order[seed] = open_task(settings, World("cpu")).batch(np.arange(4)).inputs["tokens"].tolist()
    assert order[1] == order[3] == order[2]


def test_init_starts_from_the_weights(dropout_run, text_file, tmp_path, command):
    folder, _, result = dropout_run
    flags = ["train_gpt.py", "--init", folder, "--data", text_file, "--steps", 1, "--lr", 1e-9, "--optimizer", "adamw"]
    done = command(*flags, "--eval_every", 0, "--sample_every", 0, "--out", tmp_path / "run")
    assert last_json(done)["val_loss"] == pytest.approx(result["val_loss"], rel=1e-2)
    refused = ["--steps", 1, "--d_model", 48, "--out", tmp_path / "refused"]
    assert "--d_model 48: " in command("train_gpt.py", "--init", folder, "--data", text_file, *refused, status=2).stderr
    assert not (tmp_path / "refused").exists()
    tensors = load_tensors(tmp_path / "run" / "model.safetensors")
    for name, tensor in load_tensors(folder / "model.safetensors").items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-6, rtol=0)


def test_of_equally_good_weights_those_with_the_lower_loss_are_kept():
    best = None
    for step, (accuracy, loss) in enumerate([(0.5, 1.0), (0.9, 0.4), (0.9, 0.3), (0.9, 0.35), (0.8, 0.1)]):
        figures = {"accuracy": accuracy, "val_loss": loss, "best_step": step}
        best = figures if is_better(figures, best, "accuracy") else best
    assert best["best_step"] == 2
