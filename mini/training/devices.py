"""What a training runs on: a device, its number format, compiler and memory."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from mini.errors import UserError


def pick_device(name: str, index: int = 0) -> torch.device:
    """The device of a --device flag; auto takes a GPU where there is one. Refuses one that does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: choose one of auto, cpu, cuda, mps")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no NVIDIA GPU here; leave the flag out or take cpu")
    try:
        device = torch.device(f"cuda:{index}" if name == "cuda" else name)
        if device.type == "cuda":
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


def keep_memory(keep: bool = True) -> None:
    """Tells glibc to keep freed memory for the next step instead of returning it to the system; or to return it.

    Returned, every large activation is fresh memory that the system first fills with zeros, page by page: a training
    step on a CPU then takes about a quarter longer. Kept, it has gaps: what FSDP2 gathers and frees then takes two to
    three times its room. Elsewhere (macOS, musl) this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        if not keep:
            mallopt(M_MMAP_THRESHOLD, 2**16)
        elif mallopt(M_MMAP_THRESHOLD, 2**30):  # old versions refuse; the others alone would not help
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(M_TOP_PAD, 2**28)


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held since the last call, in MB; of a GPU, what tensors take there."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
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
