"""What a model computes on the way: the inputs and outputs of its modules, hidden states, queries, keys and values."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mini.model.transformer import Model, View
from mini.tasks.base import Batch, Task
from mini.training.devices import progress_bar


@dataclass
class QKV:
    q: Tensor  # each (B, H, T, D), as they enter the attention
    k: Tensor
    v: Tensor


@dataclass
class Activations:
    """Of one forward pass."""

    real: Tensor | None = None  # (B, T), True where a token is real
    view: View | None = None  # who saw whom
    hidden: list[Tensor] = field(default_factory=list)  # L + 1 of (B, T, C): what enters the blocks, what leaves each
    final: Tensor | None = None  # (B, T, C): what leaves the last, with pre-norm normed
    attention: list[QKV] = field(default_factory=list)  # of each block


@contextlib.contextmanager
def recording(model: Model) -> Iterator[Activations]:
    """While active, a forward pass leaves there what it computes on the way."""
    seen, stack = Activations(), model.stack
    blocks = list(stack.blocks)

    def begin(module: nn.Module, arguments: tuple, named: dict) -> None:
        real = named.get("real")
        seen.real = torch.ones_like(arguments[0], dtype=torch.bool) if real is None else real
        seen.hidden, seen.attention = [], []

    def end(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen.final = output

    def leave(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen.hidden.append(output)

    handles = [
        stack.register_forward_pre_hook(begin, with_kwargs=True),
        blocks[0].register_forward_pre_hook(lambda module, arguments: seen.hidden.append(arguments[0])),
        *(block.register_forward_hook(leave) for block in blocks),
        stack.register_forward_hook(end),
    ]
    originals = [block.attention.attend for block in blocks]

    def noting(attend: Callable) -> Callable:
        def call(q: Tensor, k: Tensor, v: Tensor, view: View, dropout: float) -> Tensor:
            seen.view = view
            seen.attention.append(QKV(q, k, v))
            return attend(q, k, v, view, dropout)

        return call

    for block in blocks:
        block.attention.attend = noting(block.attention.attend)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for block, attend in zip(blocks, originals, strict=True):
            block.attention.attend = attend


@contextlib.contextmanager
def seeing(model: Model, modules: dict[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """While active, each forward pass of a module calls see(its name, input, output), both (N, C) of real tokens."""
    real: Tensor | None = None  # of the current pass, (B, T)

    def begin(stack: nn.Module, arguments: tuple, named: dict) -> None:
        nonlocal real
        real = named.get("real")

    def tokens(x: Tensor) -> Tensor:
        """(B, T, C) -> (N, C); what has no time any more, or only chosen positions, as it is."""
        if real is not None and x.ndim == 3 and x.shape[:2] == real.shape:
            return x[real]
        return x.reshape(-1, x.size(-1))

    def note(name: str) -> Callable:
        return lambda module, arguments, output: see(name, tokens(arguments[0].detach()), tokens(output.detach()))

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    handles.append(model.stack.register_forward_pre_hook(begin, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_examples(batches: list[Batch]) -> tqdm:
    """The batches, with a progress bar."""
    return progress_bar(batches, desc="looking at examples", unit="batch", delay=2, leave=False)


@torch.no_grad()
def run_all(task: Task, model: Model, batches: list[Batch]) -> None:
    """A forward pass of the task for each batch, in eval mode."""
    model.eval()
    for batch in on_examples(batches):
        task.loss(model, batch.to(next(model.parameters()).device).inputs)
