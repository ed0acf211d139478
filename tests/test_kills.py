"""Killed at every single file operation, a command that is given again ends as if nothing had happened.

`pytest -m faults` tries them all; the ordinary suite some of them.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_here

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
SOME = 2  # operations of each command, evenly spread, in the ordinary suite


def run_forked(argv: list, cache: Path, inside: Path, kill_at: int = -1) -> tuple[int, int]:
    """Runs a command in a process of its own, killed before file operation number kill_at in a folder.

    Returns (its exit status, or minus the signal; how many operations it came to).
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # those of the parent are not here
        signal.alarm(60)
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
            if changes and isinstance(arguments[0], str | bytes | os.PathLike) and str(inside) in str(arguments[0]):
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(watch)
        status = run_here([str(a) for a in argv], cache).returncode
        os.write(writing, str(count).encode())
        os._exit(status)
    os.close(writing)
    count = os.read(reading, 100)
    os.close(reading)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), int(count or 0)


@pytest.fixture
def commands(gpt, text_file, labelled, tmp_path):
    """{name: (a function that gives the command line for a folder, what it makes there)}"""
    train = ["train_gpt.py", "--data", text_file, *TINY, "--steps", 4, "--checkpoint_every", 2, "--keep", 1]
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv"]
    best = [
        "train_gpt.py",
        "--task",
        "classify",
        *files,
        *TINY,
        "--steps",
        4,
        "--eval_every",
        1,
        "--checkpoint_every",
        2,
    ]
    tokens, weights = ["-m", "mini", "tokens", text_file, "--vocab_size", 300], "out/model.safetensors"
    return {
        "train": (lambda d: [*train, "--out", d / "out"], weights),
        "into a folder": (lambda d: [*train, "--out", d], "model.safetensors"),
        "best": (lambda d: [*best, "--lr", 0.01, "--out", d / "out"], weights),
        "prune": (lambda d: ["compress.py", "prune", gpt, "--steps", 2, "--out", d / "out"], weights),
        "quantize": (lambda d: ["compress.py", "quantize", gpt, "--out", d / "out"], weights),
        "tokens": (lambda d: [*tokens, "--out", d / "out"], "out/train.tokens"),
    }


def check(name: str, commands: dict, cache: Path, tmp_path: Path, some: int | None) -> int:
    command, made = commands[name]
    whole = tmp_path / "whole"
    whole.mkdir()
    status, n = run_forked(command(whole), cache, whole)
    assert status == 0 and n > 3
    expected = (whole / made).read_bytes()
    places = range(n) if some is None else sorted({n * i // some for i in range(some)})
    for at in places:
        folder = tmp_path / f"{at}"
        folder.mkdir()
        assert run_forked(command(folder), cache, folder, at)[0] == -signal.SIGKILL, at
        assert run_forked(command(folder), cache, folder)[0] == 0, f"stuck after operation {at} of {n}"
        assert (folder / made).read_bytes() == expected, f"other bytes after operation {at} of {n}"
        left = [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".lock")]
        assert not left, f"after operation {at} of {n}: {left}"
        shutil.rmtree(folder)
    return len(places)


NAMES = ["train", "into a folder", "best", "prune", "quantize", "tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_some_operations(name, commands, cache, tmp_path):
    check(name, commands, cache, tmp_path, SOME)


@pytest.mark.faults
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_every_operation(name, commands, cache, tmp_path):
    print(f"\n{name}: {check(name, commands, cache, tmp_path, None)} kills")
