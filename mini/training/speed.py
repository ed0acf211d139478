"""How fast a training is, held against this very device; and a picture of its losses."""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mini.training.ranks import World

SLOW = 2e10  # FLOP/s


@functools.cache  # once for a process, which may train several times
def matmul_speed(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """FLOP/s of a large square matrix product on this very device: the peak that utilisation is held against."""
    # Large ones would take minutes where a CPU has no units for a dtype: there a small one says enough.
    if not size and device.type == "cpu" and (speed := matmul_speed(device, dtype, 256)) < SLOW:
        return speed
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = call_times(lambda: a @ a, 7, device)[2:]  # the first two warm up
    return 2 * size**3 / statistics.median(times)


class Speedometer:
    """Tokens per second of training alone, without evaluation, samples and checkpoints; and the share of the
    device's own matmul speed that the model's arithmetic amounts to (MFU), for tasks whose batches are full."""

    def __init__(self, model: nn.Module, predicted: float, dtype: torch.dtype, world: World, state: dict):
        """predicted: the share of the tokens that meet the vocabulary; 0 for batches that are not full."""
        self.work = 3 * model.flops(model.config.max_len, predicted) if predicted else 0  # forward + backward
        self.peak = world.size * matmul_speed(world.device, dtype) if predicted else 0
        self.last = dict(state)

    def since_last(self, state: dict) -> dict:
        last, self.last = self.last, dict(state)
        return self.figures(state["tokens"] - last["tokens"], state["train_seconds"] - last["train_seconds"])

    def overall(self, state: dict) -> dict:
        return self.figures(state["tokens"], state["train_seconds"]) if state["tokens"] else {}

    def figures(self, tokens: int, seconds: float) -> dict:
        rate = tokens / max(seconds, 1e-9)  # of a clock that stands still, too
        return {"tokens_per_s": rate} | ({"mfu": rate * self.work / self.peak} if self.work else {})


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was asked, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_times(call: Callable, n: int, device: torch.device) -> list[float]:
    """The seconds that each of n calls takes."""
    times = []
    for _ in range(n):
        synchronize(device)
        begun = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return times


def load_pyplot():
    """matplotlib's pyplot, which draws into files, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_metrics(rows: list[dict], path: Path) -> None:
    """Draws training and validation loss over the steps, where matplotlib is installed."""
    pyplot = load_pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=1, label="training")
    valid = [r for r in rows if "val_loss" in r]
    for name in (name for name in (valid or [{}])[0] if name.endswith("_loss")):  # of parts and guesses too
        axes.plot([r["step"] for r in valid], [r.get(name) for r in valid], "o-", label=name)
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
