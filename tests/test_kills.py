"""Killed at every single file operation, a command that is given again ends as if nothing had happened.

`pytest -m faults` tries them all; the ordinary suite some of them.
"""

import json
import mmap
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import TINY, Forked

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
SHORT = ["--steps", 4, "--checkpoint_every", 2, "--keep", 1, "--eval_every", 0, "--sample_every", 0]


def run_forked(argv: list, cache: Path, inside: Path, kill_at: int = -1) -> tuple[int, int]:
    """Runs a command in a process of its own, killed before file operation number kill_at in a folder.

    Returns (its exit status, or minus the signal; how many operations it came to).
    """
    count = mmap.mmap(-1, 8)  # shared with the fork

    def watch(event: str, arguments: tuple) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        if changes and isinstance(arguments[0], str | bytes | os.PathLike) and str(inside) in str(arguments[0]):
            done = int.from_bytes(count[:], "little")
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count[:] = (done + 1).to_bytes(8, "little")

    status = Forked(argv, cache, lambda: sys.addaudithook(watch)).wait().returncode
    return status, int.from_bytes(count[:], "little")


@pytest.fixture(scope="module")
def commands(gpt, labelled, squad_file, text_file, command, tmp_path_factory) -> dict:
    """{name: (the command but for its --out, what it makes, the run that is there already, if any)}

    What each makes is wholly decided by its flags, but for the times in a report.
    """
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv"]
    questions = ["--train", squad_file, "--valid", squad_file]
    bert, classifier = (tmp_path_factory.mktemp("runs") / name for name in ("bert", "classifier"))
    words = ["--nsp", "false", *TINY, "--tokenizer", "bpe", "--vocab_size", 300, "--eval_every", 0, "--sample_every", 0]
    command("train_bert.py", "--data", text_file, *words, "--steps", 150, "--out", bert)
    more = ["--task", "classify", "--init", bert, *files, "--epochs", 20, "--lr", 3e-3]
    command("train_bert.py", *more, "--out", classifier)
    train, run = ["train_gpt.py", "--data", text_file, *TINY, *SHORT], "out/model.safetensors"
    best = ["--task", "classify", "--init", bert, *files, *SHORT, "--eval_every", 1, "--lr", 0.01]
    tinybert = ["--recipe", "tinybert", "--copies", 1, "--general_steps", 2]
    return {
        "train_gpt.py": (train, run),
        "train_gpt.py into a folder that is there": (train, "model.safetensors"),
        "train_gpt.py --overwrite": ([*train, "--overwrite", "true"], run, gpt),
        "train_bert.py": (["train_bert.py", "--data", text_file, "--nsp", "false", *TINY, *SHORT], run),
        "train_bert.py --task classify": (["train_bert.py", *best], run),
        "train_bert.py --task qa": (["train_bert.py", "--task", "qa", "--init", bert, *questions, *SHORT], run),
        "compress.py prune": (["compress.py", "prune", gpt, *SHORT], run),
        "compress.py quantize": (["compress.py", "quantize", gpt, "--scheme", "static"], run),
        "compress.py quantize --scheme qat": (["compress.py", "quantize", gpt, "--scheme", "qat", *SHORT], run),
        "compress.py reduce": (["compress.py", "reduce", gpt, "--layers", 1], run),
        "compress.py distill --cache": (["compress.py", "distill", gpt, *SHORT, "--cache", "{}/cache"], run),
        "compress.py distill --recipe tinybert": (["compress.py", "distill", classifier, *tinybert, *SHORT], run),
        "compress.py report": (["compress.py", "report", gpt, "--repeats", 1], "out/report.json"),
        "mini tokens": (["-m", "mini", "tokens", text_file, "--vocab_size", 300], "out/train.tokens"),
        "mini classify": (["-m", "mini", "classify", classifier, files[1]], "out.tsv"),
        "mini embed": (["-m", "mini", "embed", bert, files[1]], "out.npy"),
        "mini rewrite": (["-m", "mini", "rewrite", bert, files[1]], "out.tsv"),
    }


def kill(name: str, commands: dict, cache: Path, tmp_path: Path, some: int | None = None) -> list[str]:
    """Kills a command at its file operations, or some of them, each in a folder of its own; returns what went wrong."""
    argv, made, *there = commands[name]

    def run(folder: Path, kill_at: int = -1) -> tuple[int, int]:
        out = folder / made.split("/")[0] if made != "model.safetensors" else folder
        return run_forked([*(str(a).format(folder) for a in argv), "--out", out], cache, folder, kill_at)

    def content(folder: Path) -> bytes | set:
        found = (folder / made).read_bytes()
        return set(json.loads(found)) if "report" in made else found

    def new_folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        for run in there:
            shutil.copytree(run, tmp_path / name / "out")
        return tmp_path / name

    whole = new_folder("whole")
    status, n = run(whole)
    assert status == 0 and n > 1
    places = range(n) if some is None else sorted({n * i // some for i in range(some)})
    failures = []
    for at in places:
        folder = new_folder(f"{at}")
        assert run(folder, at)[0] == -signal.SIGKILL, at
        if run(folder)[0] and not ("rewrite" in name and (folder / made).exists()):  # done, which it does not do again
            failures.append(f"stuck after operation {at} of {n}")
        elif content(folder) != content(whole):
            failures.append(f"other bytes after operation {at} of {n}")
        left = [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".lock")]
        failures += [f"{left} after operation {at} of {n}"] * bool(left)
        shutil.rmtree(folder)
    print(f"{name}: {len(places)} kills, {len(failures)} failures", flush=True)
    return failures


@pytest.mark.parametrize("name", ["train_bert.py --task classify", "compress.py prune", "mini tokens"])
def test_killed_at_some_operations(name, commands, cache, tmp_path):
    assert not kill(name, commands, cache, tmp_path, some=3)


@pytest.mark.faults
def test_every_command_killed_at_every_operation(commands, cache, tmp_path):
    failures = {}
    for name in commands:
        (tmp_path / name).mkdir()
        failures[name] = kill(name, commands, cache, tmp_path / name)
    assert not any(failures.values()), failures
