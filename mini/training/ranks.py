"""The processes that train together, and what they do when one of them is lost."""

import contextlib
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mini.errors import UserError
from mini.training.devices import pick_device

BEAT = 1.0  # seconds from one sign of life to the next
SILENCE = os.environ.get("MINI_SILENCE", "45")  # seconds without any, after which a rank is lost
GONE = b"gone"  # in place of the signs of life of a rank that has ended by itself, or not yet begun
START_LIMIT = timedelta(minutes=5)  # for all ranks to be there


class World:
    """The processes that train together: one alone, or as many as torchrun started."""

    def __init__(self, device: str):
        self.sharded = False  # whether each process holds a share of the model only
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        if self.size > 1 and device.startswith("cuda:"):
            raise UserError(
                f"--device {device}: each of torchrun's processes takes a GPU of its own; give --device cuda"
            )
        self.device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        self.doing = "at the start"  # for messages
        if self.size > 1:
            try:
                self.silence = float(SILENCE)
            except ValueError:
                self.silence = math.nan
            if not 3 * BEAT < self.silence < math.inf:
                raise UserError(f"MINI_SILENCE={SILENCE}: expected seconds, more than {3 * BEAT:g}")
            backend = "cpu:gloo,cuda:nccl" if self.on_gpu else "gloo"  # what CPUs tell one another waits for no GPU
            self.store = meet(self.rank, self.size)
            own = dict(store=self.store, rank=self.rank, world_size=self.size)
            dist.init_process_group(backend, timeout=timedelta(hours=4), **own)  # rank 0 may tokenize for long

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, *text: object) -> None:
        """Prints from rank 0, without tearing a progress bar apart."""
        if self.main:
            tqdm.write(" ".join(map(str, text)))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value):
        """Rank 0's value, on every rank: for choices that hang on what each has measured."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def highest(self, value: int) -> int:
        """The highest of all ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def main_first(self, make: Callable):
        """make() on rank 0, then on the others: what the first one builds, the others find."""
        if self.main:
            failed = torch.ones(())
            try:
                result = make()
                failed.zero_()
                return result
            finally:
                self.sum(failed)
        if self.sum(torch.zeros(())):
            raise SystemExit(2)  # rank 0 says why
        return make()

    def wait(self) -> None:
        """Until all have come so far: what rank 0 has written is there for the others."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """While active, the loss of a rank ends this one, with a line that names it; torchrun then starts all again.

        Of one that is killed the connections close: the next word to it fails. One that is stopped, or whose machine
        is gone, is silent, and what waits for it would wait for hours: see watch().
        """
        if self.size == 1:
            yield
            return
        over = threading.Event()
        watch = threading.Thread(target=self.watch, args=(over,), daemon=True)
        watch.start()
        try:
            yield
        except BaseException as error:
            first = self.first_to_end()
            # A RuntimeError from gloo's own source, such as "[../gloo/transport/tcp/pair.cc:553] Connection closed".
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            if not first:  # which says why
                raise SystemExit(1) from None
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's is on its way, and this is worth a moment
            raise UserError(self.loss(self.silent_ranks(), "its connection is closed")) from None
        finally:
            over.set()
            watch.join(5)

    def watch(self, over: threading.Event) -> None:
        """Gives signs of life, and ends this process once the next rank has given none for long.

        So each is watched by another, whatever they do meanwhile, be it hours of tokenizing in one of them.
        """
        store, other = self.store.clone(), (self.rank + 1) % self.size
        last, heard = b"", time.monotonic()
        try:
            while not over.is_set():
                store.set(f"alive/{self.rank}", str(time.monotonic()))
                now = store.get(f"alive/{other}")
                if now != last or now == GONE:
                    last, heard = now, time.monotonic()
                elif time.monotonic() - heard > self.silence:
                    self.end(self.loss([other], f"no sign of it for {self.silence:.0f} s"))
                over.wait(BEAT)
            store.set(f"alive/{self.rank}", GONE)
        except dist.DistError:  # the store is in torchrun or, without that, in rank 0
            if not over.wait(5):  # in which time this process may have come to its end, too
                self.end(f"torchrun or rank 0 was lost {self.doing}; the same command goes on")

    def end(self, message: str) -> None:
        """Ends the process from beside its main thread, which may be waiting for one that is lost."""
        if self.first_to_end():
            os.write(2, f"\nerror: {message}\n".encode())  # not print(), in the middle of which that may be
        os._exit(1)

    def first_to_end(self) -> bool:
        """Whether no other rank has ended before its time: that one knows why, the others only see that it is gone."""
        with contextlib.suppress(dist.DistError):
            return self.store.add("ended", 1) == 1
        return True

    def silent_ranks(self) -> list[int]:
        """Those that give no sign of life just now, and have not ended by themselves."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        keys = [f"alive/{rank}" for rank in others]
        with contextlib.suppress(dist.DistError):
            before = self.store.multi_get(keys)
            time.sleep(3 * BEAT)
            now = self.store.multi_get(keys)
            return [rank for rank, a, b in zip(others, before, now, strict=True) if a == b != GONE]
        return [] if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else [0]  # which had the store

    def loss(self, ranks: list[int], how: str) -> str:
        """The line that says so."""
        who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else "another rank"
        most, count = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
        again = "stopping, so that torchrun can start all again" if count < most else "the same command goes on"
        return f"{who} {'were' if len(ranks) > 1 else 'was'} lost {self.doing} ({how}); {again}"

    def leave(self) -> None:
        """Ends together: a process that goes while another still talks to it can take it down."""
        self.wait()
        if self.size > 1:
            dist.destroy_process_group()


def meet(rank: int, size: int) -> dist.Store:
    """The store through which the ranks find each other, under a name that no earlier start had.

    torchrun keeps one store over all its restarts, and in it the addresses of processes that are gone; PyTorch takes
    each for new (rendezvous.py, _create_c10d_store), and who reads an address before it is replaced finds nobody. Nor
    do the torchruns of several machines count restarts alike. So each rank brings a word of its own, and rank 0
    answers the words that are there with the name, until all have come.
    """
    store, *_ = next(dist.rendezvous("env://", timeout=START_LIMIT))
    name = word = secrets.token_hex(8)
    if rank > 0:
        store.set(f"word/{rank}", word)
        try:
            name = store.get(f"answer/{word}").decode()  # waits for it
        except dist.DistStoreError:
            raise UserError(f"rank {rank} waited for rank 0, which did not come in time") from None
    mine = dist.PrefixStore(name, store)
    mine.set(f"alive/{rank}", GONE)
    deadline = time.monotonic() + START_LIMIT.total_seconds()
    while missing := [other for other in range(1, size) if rank == 0 and not mine.check([f"alive/{other}"])]:
        for other in missing:
            if store.check([f"word/{other}"]):
                store.set(f"answer/{store.get(f'word/{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise UserError(f"of the {size} ranks {', '.join(map(str, missing))} did not come in time")
        time.sleep(0.02)
    return mine
