"""A rank that is lost ends the others with one line; started again over the same store, they end as if undisturbed.

`pytest -s -m faults` does so with torchrun, twenty times for each way to be lost.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, Forked, command_line, environment

from mini.errors import UserError
from mini.tensors import load_tensors
from mini.training import checkpoints, ranks
from mini.training.ranks import World

QUICK = [*TINY, "--sample_every", 0, "--eval_every", 0, "--log_every", 1, "--steps", 12, "--checkpoint_every", 5]


@pytest.fixture
def start(text_file, cache, tmp_path):
    """Starts two ranks as torchrun does, over a store that is the same at each start; one may send itself a signal."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    shared = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE=True)
    argv = ["train_gpt.py", "--data", text_file, *QUICK, "--out", tmp_path / "run"]

    def started(rank: int = -1, number: int = 0, step: int = 0, silence: float = 60, late: float = 0,
                writing: str = "no file", more: tuple = (), second: tuple = ()) -> list[Forked]:  # fmt: skip
        """writing: the file after which it does so. more: flags of both; second: of rank 1, which comes late."""

        def prepare() -> None:
            said = os.open(tmp_path / f"said-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 2)
            ranks.BEAT, ranks.SILENCE, add_up, put_down = 0.2, silence, World.sum, checkpoints.write_tensors

            def signal_and_sum(world: World, tensor: torch.Tensor) -> torch.Tensor:
                if world.rank == rank and world.doing == f"in step {step}":
                    while step > 5 and not (tmp_path / "run" / "checkpoints" / "step-00000005").exists():
                        time.sleep(0.01)  # it is written beside the training
                    os.kill(os.getpid(), number)
                return add_up(world, tensor)

            def signal_and_write(path: Path, tensors: dict, lead: bool = True) -> None:
                put_down(path, tensors, lead)
                if writing in str(path) and os.environ["RANK"] == str(rank):
                    os.kill(os.getpid(), number)

            World.sum, checkpoints.write_tensors = signal_and_sum, signal_and_write

        first = Forked([*argv, *more], cache, prepare, RANK=0, LOCAL_RANK=0, **shared)
        time.sleep(late)
        return [first, Forked([*argv, *more, *second], cache, prepare, RANK=1, LOCAL_RANK=1, **shared)]

    yield started
    del store  # which lives until now


@pytest.fixture(scope="module")
def whole(text_file, command, tmp_path_factory) -> Path:
    """The weights of the undisturbed run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    command("train_gpt.py", "--data", text_file, *QUICK, "--out", folder, ranks=2)
    return folder / "model.safetensors"


@pytest.mark.parametrize("rank, sharded", [(0, False), (1, False), (1, True)])
def test_a_killed_rank_is_named_and_all_start_again(rank, sharded, start, whole, tmp_path):
    """While it trains or, of a model in shares, while it writes its own ones of the second checkpoint."""
    more, step, writing = (("--shard", "true"), 0, "step-00000010") if sharded else ((), 8, "no file")
    done = [one.wait() for one in start(rank, signal.SIGKILL, step, writing=writing, more=more)]
    assert done[rank].returncode == -signal.SIGKILL and done[1 - rank].returncode > 0
    line = (
        rf"error: rank {rank} was lost in step {step or '1[012]'} \(its connection is closed\); the same command goes"
    )
    assert re.search(line, done[1 - rank].stderr) and "Traceback" not in done[1 - rank].stderr
    assert not (tmp_path / "run" / "checkpoints" / "step-00000010").exists()
    done = [one.wait() for one in start(more=more, late=1)]  # one may come later than the other
    assert [d.returncode for d in done] == [0, 0], done
    assert "step-00000005" in done[0].stdout  # from there it went on
    mine, theirs = load_tensors(tmp_path / "run" / "model.safetensors"), load_tensors(whole)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-2 if sharded else 0)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("sharded", ["false", pytest.param("true", marks=pytest.mark.faults)])
def test_a_stopped_rank_is_noticed(sharded, start, tmp_path):
    """Its connection stays open, so that nothing breaks: it is its silence that is heard."""
    first, stopped = start(1, signal.SIGSTOP, step=3, silence=8, more=("--shard", sharded))
    try:
        assert first.wait().returncode > 0
    finally:
        os.kill(stopped.process, signal.SIGKILL)
        stopped.wait()
    said = (tmp_path / "said-0").read_text()
    assert "error: rank 1 was lost in step 3 (no sign of it for 8 s); the same command goes on\n" in said


def test_no_two_ranks_share_a_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:1: each of torchrun's processes takes a GPU of its own"):
        World("cuda:1")


@pytest.mark.parametrize(
    "flags, why", [(("--lr", 0.1), "lr was 0.005, now 0.1"), (("--data", __file__), "text is another")]
)
def test_ranks_with_other_flags(flags, why, start):
    """The one that knows why says so; the other does not wait for it."""
    first, second = (one.wait() for one in start(second=flags))
    assert second.returncode == 2 and why in second.stderr and second.stderr.count("error: ") == 1
    assert first.returncode > 0 and "Traceback" not in first.stderr


KILLS = {"rank 0 while it trains": ([0], 1), "rank 1 while it trains": ([1], 1), "any at any time": ([0, 1], 1),
         "any at any time, twice": ([0, 1], 2)}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("way", KILLS)
def test_torchrun_goes_on_by_itself(way, text_file, cache, tmp_path, command):
    flags = ["--data", text_file, *QUICK[:-4], "--steps", 150, "--checkpoint_every", 20]
    script = tmp_path / "script.py"  # tells who is who, before anything else
    script.write_text("""if True:
        import os, pathlib, sys
        pathlib.Path(sys.argv.pop(1), os.environ["RANK"]).write_text(f"{os.getpid()} ")
        import train_gpt
        from mini.flags import run_command
        run_command(train_gpt.main)
    """)
    whole = tmp_path / "whole"
    began = time.monotonic()
    command("train_gpt.py", *flags, "--out", whole, torchrun=2)
    usual = time.monotonic() - began
    who, times = KILLS[way]
    good = 0
    for i in range(20):
        chance, folder, killed = random.Random(i), tmp_path / str(i), []
        folder.mkdir()
        argv = command_line(script, folder, *flags, "--out", folder / "run", torchrun=2)
        argv.insert(argv.index("--standalone"), "--max-restarts=3")
        with open(folder / "said", "w") as said:
            run = subprocess.Popen(argv, env=environment(cache), stdout=said, stderr=said, start_new_session=True)
        for _ in range(times):
            rank = chance.choice(who)
            while run.poll() is None and pid(folder, rank) in (0, *killed):
                time.sleep(0.01)
            step = chance.randrange(25, 130) if "while" in way else 0
            while run.poll() is None and lines(folder / "run" / "metrics.jsonl") < step:
                time.sleep(0.01)
            time.sleep(0 if step else chance.uniform(0, usual))
            one = pid(folder, rank)
            with contextlib.suppress(ProcessLookupError):  # it has come to its end by itself
                if one and run.poll() is None:
                    os.kill(one, signal.SIGKILL)
                    killed.append(one)
        try:
            status = run.wait(300)
        except subprocess.TimeoutExpired:
            status = "hung"
            os.killpg(run.pid, signal.SIGTERM)
            run.wait(60)
        made = folder / "run" / "model.safetensors"
        good += status == 0 and made.exists() and made.read_bytes() == (whole / "model.safetensors").read_bytes()
        print(f"{way}: {good} of {i + 1}; status {status}, {len(killed)} killed", flush=True)
    assert good == 20


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def pid(folder: Path, rank: int) -> int:
    """The process of a rank, 0 where there is none yet."""
    path = folder / str(rank)
    return int(path.read_text() or 0) if path.exists() else 0
