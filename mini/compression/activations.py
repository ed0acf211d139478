"""What a model computes on the way: the inputs and outputs of its modules, hidden states, queries, keys and values."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mini.model.attention import View
from mini.model.transformer import Block, Model
from mini.tasks.base import Batch, Task
from mini.training.devices import progress_bar


@dataclass
class Activations:
    """Of one forward pass."""

    real: Tensor | None = None  # (B, T), True where a token is real
    views: list[View] = field(default_factory=list)  # of each block, who saw whom
    hidden: list[Tensor] = field(default_factory=list)  # L + 1 of (B, T, C): what enters the blocks, what leaves each
    final: Tensor | None = None  # (B, T, C): what leaves the last, with pre-norm normed
    attention: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # of each block q, k, v (B, H, T, D)


@contextlib.contextmanager
def recording(model: Model) -> Iterator[Activations]:
    """While active, a forward pass leaves there what it computes on the way."""
    seen, stack = Activations(), model.stack

    def enter(block: nn.Module, arguments: tuple) -> None:
        seen.hidden.append(arguments[0])

    def leave(block: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen.hidden.append(output)

    def end(stack: nn.Module, arguments: tuple, named: dict, output: Tensor) -> None:
        real = named.get("real")
        seen.real = torch.ones_like(arguments[0], dtype=torch.bool) if real is None else real
        seen.final = output

    def noting(attend: Callable) -> Callable:
        def call(q: Tensor, k: Tensor, v: Tensor, view: View, dropout: float) -> Tensor:
            seen.views.append(view)
            seen.attention.append((q, k, v))
            return attend(q, k, v, view, dropout)

        return call

    with contextlib.ExitStack() as hooks:  # removed together, whatever happens
        hooks.enter_context(stack.blocks[0].register_forward_pre_hook(enter))
        hooks.enter_context(stack.register_forward_hook(end, with_kwargs=True))
        for block in stack.blocks:
            hooks.enter_context(block.register_forward_hook(leave))
            if isinstance(block, Block):
                hooks.callback(setattr, block.attention, "attend", block.attention.attend)
                block.attention.attend = noting(block.attention.attend)
        yield seen


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

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(model.stack.register_forward_pre_hook(begin, with_kwargs=True))
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(note(name)))
        yield


@dataclass
class Examples:
    """Training examples that a model is looked at with, and the task that they belong to."""

    task: Task
    batches: list[Batch]

    def inputs(self, model: Model) -> Iterator[dict[str, Tensor]]:
        """Of each batch, where the model is, with a progress bar; the model is in eval mode."""
        model.eval()
        for batch in progress_bar(self.batches, desc="looking at examples", unit="batch", delay=2, leave=False):
            yield batch.to(next(model.parameters()).device).inputs

    @torch.no_grad()
    def run(self, model: Model) -> None:
        """A forward pass of the task for each batch."""
        for inputs in self.inputs(model):
            self.task.loss(model, inputs)
