import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from mini.tasks.lm import LanguageModelling

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for train_gpt.py and train_bert.py
torch.set_num_threads(1)  # as in the processes that tests start: the same order of sums, to the bit


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """40 kB of text with some structure to learn."""
    words = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "and", "slept", "all", "day"]
    generator = torch.Generator().manual_seed(0)
    sentences = []
    for _ in range(1000):
        n = int(torch.randint(4, 12, (1,), generator=generator))
        chosen = torch.randint(len(words), (n,), generator=generator)
        sentences.append(" ".join(words[i] for i in chosen).capitalize() + ".")
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(sentences))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def command(cache):
    """Runs a command of the project as its user would type it, in this process or, as so many ranks, in forks of it."""

    def run(*arguments: object, status: int = 0, ranks: int = 0, torchrun: int = 0) -> subprocess.CompletedProcess:
        if torchrun:
            argv = command_line(*arguments, torchrun=torchrun)
            done = subprocess.run(argv, capture_output=True, text=True, env=environment(cache), timeout=170)
        elif ranks > 1:
            done = run_ranks([str(a) for a in arguments], cache, ranks)
        else:
            done = run_here([str(a) for a in arguments], cache)
        assert done.returncode == status, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def gpt(text_file, command, tmp_path_factory) -> Path:
    """A run of a tiny GPT that has learnt something; to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "gpt"
    flags = ["--steps", 60, "--eval_every", 0, "--sample_every", 0, "--out", folder]
    command("train_gpt.py", "--data", text_file, *TINY, *flags)
    return folder


WORDS = {"good": ["great", "lovely", "fine"], "bad": ["awful", "boring", "dull"]}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    rows = [f"a {word} film number {i}\t{label}" for i in range(30) for label, words in WORDS.items() for word in words]
    for name, chosen in (("train.tsv", rows), ("valid.tsv", rows[:12])):
        (folder / name).write_text("text\tlabel\n" + "\n".join(chosen) + "\n")
    return folder


def run_here(argv: list[str], cache: Path) -> subprocess.CompletedProcess:
    import compress
    import mini.__main__
    import train_bert
    import train_gpt
    from mini.flags import run_command

    out, err, status = io.StringIO(), io.StringIO(), 0
    scripts = {"train_gpt.py": train_gpt.main, "train_bert.py": train_bert.main, "compress.py": compress.main}
    main = {"-m": mini.__main__.run, **scripts}[argv[0]]
    with (
        mock.patch.object(sys, "argv", argv[1:] if argv[0] == "-m" else argv),
        mock.patch.dict(os.environ, {"MINI_CACHE": str(cache)}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_command(main)
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


def run_ranks(argv: list[str], cache: Path, n: int) -> subprocess.CompletedProcess:
    """What torchrun does, without importing torch in each process anew."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        shared = dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(found.getsockname()[1]))
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(n):
            children.append(os.fork())
            if not children[-1]:
                try:
                    signal.alarm(170)
                    os.environ |= shared | dict(RANK=str(rank), LOCAL_RANK=str(rank))
                    done = run_here(argv, cache)
                    Path(folder, str(rank)).write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
                finally:
                    os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        answers = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(n)]
    status, out, err = zip(*answers, strict=True)
    return subprocess.CompletedProcess(argv, max(status), "".join(out), "".join(err))


def command_line(*arguments: object, torchrun: int = 0) -> list[str]:
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    return launcher + [str(ROOT / a) if str(a).endswith(".py") else str(a) for a in arguments]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "MINI_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def signalled(step: int, number: int, argv: list, cache: Path) -> subprocess.CompletedProcess:
    """Runs a script that sends itself a signal right after it has logged a step."""
    code = f"""if True:
        import os, runpy, sys
        from mini.training import checkpoints
        append = checkpoints.append_metrics
        def append_and_signal(folder, row):
            append(folder, row)
            if row["step"] == {step}:
                os.kill(os.getpid(), {int(number)})
        checkpoints.append_metrics = append_and_signal
        sys.path.insert(0, {str(ROOT)!r})
        sys.argv = {[str(ROOT / argv[0]), *map(str, argv[1:])]!r}
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.run([sys.executable, "-c", code], env=environment(cache), **options)


def lm_loss(model, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss of language modelling."""
    inputs = {"tokens": tokens, "targets": targets}
    return LanguageModelling.losses(None, model.answers(inputs), inputs)["lm"]


def last_json(done: subprocess.CompletedProcess) -> dict:
    return json.loads(done.stdout.strip().splitlines()[-1])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TINY = ["--tokenizer", "bytes", "--n_layers", 2, "--n_heads", 2, "--d_model", 32, "--max_len", 32, "--batch_size", 8,
        "--device", "cpu"]  # fmt: skip
