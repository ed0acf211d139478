"""A model cut into shares learns what a whole one does, and is written as one."""

import json
import shutil
from functools import partial, partialmethod

import pytest
import torch
from conftest import TINY, last_json, metrics, run_ranks

from mini import load_run
from mini.tensors import held, load_tensors, write_tensors
from mini.training import checkpoints

QUICK = [*TINY, "--dtype", "float32", "--eval_every", 7, "--sample_every", 0, "--log_every", 1]


def losses(folder) -> list[float]:
    return [row["loss"] for row in metrics(folder)]


def test_sharded_as_whole_and_on_with_any_number_of_ranks(text_file, tmp_path, command):
    """Muon and AdamW, 3 heads' worth of rows that no number of ranks divides, samples on the way."""
    sizes = ["--d_model", 36, "--n_heads", 3, "--steps", 14, "--checkpoint_every", 6, "--sample_every", 9]
    flags = ["train_gpt.py", "--data", text_file, *QUICK, *sizes]
    command(*flags, "--out", tmp_path / "whole", ranks=2)
    result = last_json(command(*flags, "--shard", "true", "--out", tmp_path / "4", ranks=4))
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert result["val_loss"] == pytest.approx(metrics(tmp_path / "whole")[-1]["val_loss"], rel=1e-4)
    tensors = [load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "4")]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=0, atol=1e-3)
    assert load_run(tmp_path / "4")[0].num_params() == result["parameters"]

    for ranks, sharded in ((1, "false"), (8, "true")):
        out = tmp_path / f"on-{ranks}"
        shutil.copytree(tmp_path / "4", out)
        for name in ("model.safetensors", "result.json"):
            (out / name).unlink()
        shutil.rmtree(out / "checkpoints" / "step-00000012")
        done = command(*flags, "--shard", sharded, "--out", out, ranks=ranks)
        assert "going on from" in done.stdout and "step-00000006" in done.stdout
        assert losses(out) == pytest.approx(losses(tmp_path / "4"), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ["--accumulation", 2, "--checkpoint_activations", "true", "--dropout", 0.1],
        ["--optimizer", "adamw", "--weight_decay", 0.1, "--dtype", "bfloat16", "--norm", "layernorm", "--bias", "true",
         "--tied", "false", "--vocab_multiple", 64],
    ],
)  # fmt: skip
def test_sharded_with(options, text_file, tmp_path, command):
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 10, *options]
    for sharded in ("true", "false"):
        command(*flags, "--shard", sharded, "--out", tmp_path / sharded, ranks=2)
    close = 1e-2 if "bfloat16" in options else 1e-4
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=close)


def test_sharded_and_compiled(text_file, tmp_path, command, monkeypatch):
    """By the part of the compiler that needs no threads, which forks of this process would not have."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 8, "--checkpoint_activations", "true"]
    for compiled in ("true", "false"):
        done = command(*flags, "--shard", "true", "--compile", compiled, "--out", tmp_path / compiled, ranks=2)
        assert "torch.compile does not work here" not in done.stdout + done.stderr
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-4)


def test_sharded_fine_tuning_keeps_the_best(labelled, bert, tmp_path, command):
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv", "--test", labelled / "valid.tsv"]
    flags = ["train_bert.py", "--task", "classify", "--init", bert, *files, "--steps", 12, "--eval_every", 2]
    flags += ["--dtype", "float32", "--checkpoint_every", 5, "--lr", 0.01, "--batch_size", 8, "--device", "cpu"]
    results = [last_json(command(*flags, "--shard", sharded, "--out", tmp_path / sharded, ranks=2))
               for sharded in ("true", "false")]  # fmt: skip
    for name in ("best_step", "accuracy", "test_accuracy"):
        assert results[0][name] == pytest.approx(results[1][name], abs=0.1)
    assert results[0]["test_loss"] == pytest.approx(results[0]["val_loss"], rel=1e-5)  # of the same file and weights
    assert not list((tmp_path / "true").glob("best-*"))


def test_what_is_not_cut_into_shares(bert, labelled, tmp_path, command):
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv"]
    flags = ["train_bert.py", "--task", "classify", "--init", bert, *files, "--lora_rank", 2, "--shard", "true"]
    assert "--shard: adapters" in command(*flags, "--out", tmp_path / "x", status=2).stderr
    done = command("compress.py", "prune", bert, "--shard", "true", "--out", tmp_path / "x", status=2)
    assert "unknown flag --shard" in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_write_one_file(ranks, tmp_path):
    """Each its rows, in any order: the bytes are those of one that has them all."""
    tensors = {"a": torch.randn(7, 3), "b": torch.arange(4, dtype=torch.int64), "c": torch.tensor(2.5)}
    write_tensors(tmp_path / "whole", {name: held(tensor) for name, tensor in tensors.items()})
    for rank in reversed(range(ranks)):
        rows = {name: held(tensor) for name, tensor in tensors.items()}
        share = -(-7 // ranks)
        rows["a"] = rows["a"]._replace(
            tensor=tensors["a"][rank * share :][:share], first=min(7, rank * share), whole=False
        )
        write_tensors(tmp_path / "shares", rows, lead=rank == 0)
    assert (tmp_path / "shares").read_bytes() == (tmp_path / "whole").read_bytes()
    torch.testing.assert_close(load_tensors(tmp_path / "shares"), tensors)


def test_sharded_tasks_that_write(tmp_path, command):
    """Each token of an answer gathers the model: all ranks write the same ones, of unequal number and length."""
    rows = [{"prompt": f"{i} letters:", "answer": "x" * (1 + i % 7)} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--train", tmp_path / "pairs.jsonl", "--valid", tmp_path / "pairs.jsonl", "--n_judged", 3]
    flags = ["train_gpt.py", "--task", "pairs", *files, *TINY, "--dtype", "float32", "--steps", 4, "--eval_every", 2]
    results = [last_json(command(*flags, "--shard", sharded, "--out", tmp_path / sharded, ranks=2))
               for sharded in ("true", "false")]  # fmt: skip
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"], rel=1e-4)
    assert results[0].keys() == results[1].keys() and "bleu" in results[0]


def test_rows_that_cannot_be_written_end_all_ranks(text_file, tmp_path, cache, monkeypatch):
    """A disk that is full for one of them: it says so, none waits for it, and nothing half-written stays."""
    write = checkpoints.write_tensors

    def full(path, tensors, lead=True):
        if not lead and "step-" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors, lead)

    monkeypatch.setattr(checkpoints, "write_tensors", full)  # which the ranks inherit
    flags = ["train_gpt.py", "--data", text_file, *QUICK, "--steps", 60, "--checkpoint_every", 3, "--shard", "true"]
    done = run_ranks([*flags, "--out", tmp_path / "run"], cache, 2)
    assert done.returncode > 0 and "step-00000003: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "run" / "checkpoints").iterdir())
