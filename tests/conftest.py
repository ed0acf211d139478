import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from mini.tasks.lm import LanguageModelling
from mini.training import checkpoints

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
            done = run_ranks(arguments, cache, ranks)
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


@pytest.fixture(scope="session")
def bert(text_file, command, tmp_path_factory) -> Path:
    """The same of a tiny BERT."""
    folder = tmp_path_factory.mktemp("runs") / "bert"
    flags = ["--steps", 40, "--eval_every", 0, "--sample_every", 0, "--nsp", "false", "--out", folder]
    command("train_bert.py", "--data", text_file, *TINY, *flags)
    return folder


WORDS = {"good": ["great", "lovely", "fine"], "bad": ["awful", "boring", "dull"]}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """A folder with train.tsv and valid.tsv, in which a word tells the label."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = [f"a {word} film number {i}\t{label}" for i in range(30) for label, words in WORDS.items() for word in words]
    for name, chosen in (("train.tsv", rows), ("valid.tsv", rows[:12])):
        (folder / name).write_text("text\tlabel\n" + "\n".join(chosen) + "\n")
    return folder


@pytest.fixture(scope="session")
def squad_file(tmp_path_factory) -> Path:
    """Questions with and without an answer, in the form of SQuAD 2.0."""
    paragraphs = []
    for i in range(60):
        year, name, impossible = 100 + i, ("anna", "bela", "cora", "dora", "elsa")[i % 5], i % 10 == 9
        context = f"In year {year} it {'rained and nobody was there' if impossible else f'was {name} who came'}."
        answers = [] if impossible else [{"text": name, "answer_start": context.index(name)}]
        question = {"id": str(i), "question": "Who came?", "answers": answers, "is_impossible": impossible}
        paragraphs.append({"context": context, "qas": [question]})
    path = tmp_path_factory.mktemp("squad") / "train.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


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


class Forked:
    """A command in a fork of this process: in a process of its own, without importing torch anew."""

    def __init__(self, argv: list, cache: Path, prepare: Callable[[], None] = lambda: None, **variables: object):
        """prepare: called there, before the command. variables: of its environment."""
        self.argv, self.said = [str(a) for a in argv], tempfile.TemporaryFile()  # noqa: SIM115
        self.process = os.fork()
        if not self.process:
            try:
                signal.alarm(170)
                os.environ |= {name: str(value) for name, value in variables.items()}
                prepare()
                done = run_here(self.argv, cache)
                self.said.write(json.dumps([done.stdout, done.stderr]).encode())
                self.said.flush()
                os._exit(done.returncode)
            finally:
                os._exit(70)

    def wait(self) -> subprocess.CompletedProcess:
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        self.said.seek(0)
        return subprocess.CompletedProcess(self.argv, status, *json.loads(self.said.read() or '["", ""]'))


def run_ranks(argv: list, cache: Path, n: int) -> subprocess.CompletedProcess:
    """What torchrun does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        shared = dict(WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=found.getsockname()[1])
    done = [rank.wait() for rank in [Forked(argv, cache, RANK=r, LOCAL_RANK=r, **shared) for r in range(n)]]
    out, err = "".join(d.stdout for d in done), "".join(d.stderr for d in done)
    return subprocess.CompletedProcess(argv, max(d.returncode for d in done), out, err)


def signalled(step: int, number: int, argv: list, cache: Path) -> subprocess.CompletedProcess:
    """Runs a script that sends itself a signal right after it has logged a step."""
    append = checkpoints.append_metrics

    def append_and_signal(folder: Path, row: dict) -> None:
        append(folder, row)
        if row["step"] == step:
            os.kill(os.getpid(), number)

    return Forked(argv, cache, lambda: setattr(checkpoints, "append_metrics", append_and_signal)).wait()


def command_line(*arguments: object, torchrun: int = 0) -> list[str]:
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    return launcher + [str(ROOT / a) if str(a).endswith(".py") else str(a) for a in arguments]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "MINI_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


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
