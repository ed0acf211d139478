"""What a training runs on: the processes that share it, their device, its number format, compiler and memory."""

import contextlib
import copy
import ctypes
import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mini.errors import UserError

SILENCE = float(os.environ.get("MINI_SILENCE", 45))  # seconds without a sign of life, after which a rank is lost
GONE = b"gone"  # in place of the signs of life of a rank that has ended by itself, or not yet begun
START_LIMIT = timedelta(minutes=5)  # for all ranks to be there


class World:
    """The processes that train together: one alone, or as many as torchrun started."""

    def __init__(self, device: str):
        self.sharded = False  # whether each process holds a share of the model only
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        self.doing = "at the start"  # for messages
        if self.size > 1:
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

    def alone(self) -> "World":
        """The same device, for what one process does by itself."""
        other = copy.copy(self)
        other.size, other.rank = 1, 0
        return other

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
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            if not first:  # which says why
                raise SystemExit(1) from None
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's is on its way, and this is worth three seconds
            raise UserError(self.loss(self.silent_ranks(), "its connection is closed")) from None
        finally:
            over.set()
            watch.join(5)

    def watch(self, over: threading.Event) -> None:
        """Gives a sign of life every second, and ends this process once the next rank has given none for long.

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
                elif time.monotonic() - heard > SILENCE:
                    self.end(self.loss([other], f"no sign of it for {SILENCE:.0f} s"))
                over.wait(1)
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
        """Those that give no sign of life for three seconds, and have not ended by themselves."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        keys = [f"alive/{rank}" for rank in others]
        with contextlib.suppress(dist.DistError):
            before = self.store.multi_get(keys)
            time.sleep(3)
            now = self.store.multi_get(keys)
            return [rank for rank, a, b in zip(others, before, now, strict=True) if a == b != GONE]
        return []

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
        name = store.get(f"answer/{word}").decode()  # waits for it
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


def pick_device(name: str, index: int = 0) -> torch.device:
    """The device of a --device flag; auto takes a GPU where there is one. Refuses one that does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: choose one of auto, cpu, cuda, mps")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no NVIDIA GPU here; leave the flag out or take cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except Exception as error:  # what a build without that device raises differs from version to version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {name} does not work here: {reason}") from None
    return device


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, IndexError):  # only Linux has this file, and names a processor there
        return Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    return platform.processor() or platform.machine()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively; else float16 on GPUs, and on CPUs float32 by the fast path.

    An explicit float32 means all of its bits. MINI_NO_BF16=1 makes auto behave as on hardware without bfloat16.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not every version of PyTorch has both
        native = any(getattr(torch.cpu, name, bool)() for name in checks)
    if name == "auto":
        torch.set_float32_matmul_precision("high")
        if native and not os.environ.get("MINI_NO_BF16"):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """While active, matrix products are made in dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def can_compile(device: torch.device, say: Callable) -> bool:
    """Whether torch.compile works on this machine, which needs a C++ compiler, or Triton on a GPU; says if not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"torch.compile does not work here, going on without it ({reason})")
        return False
    torch._dynamo.config.suppress_errors = True  # whatever else cannot be compiled runs as it is
    return True


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of returning it to the system.

    Otherwise every large activation is fresh memory that the system first fills with zeros, page by page: a
    training step on a CPU then takes about a quarter longer. Elsewhere (macOS, musl) this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        if mallopt(M_MMAP_THRESHOLD, 2**30):  # old versions refuse; the others alone would not help
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(M_TOP_PAD, 2**28)


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held since the last call, in MB; of a GPU, what tensors take there."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e6
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        return int(status.split("VmHWM:")[1].split()[0]) / 1000
    except (OSError, IndexError):  # not Linux: the peak since the process began
        import resource  # which Windows has not

        unit = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def progress_bar(iterable: Iterable | None = None, **options) -> tqdm:
    """A bar that is drawn ten times a second on a terminal, and twice a minute in a log file."""
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 30, dynamic_ncols=True, **options)
