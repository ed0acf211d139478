"""Look at what flows through a model: the inputs of its layers, without padding."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm


class RealTokens:
    """Knows which tokens of the current forward pass are real, and picks them out of an activation."""

    def __init__(self, stack: nn.Module):
        self.padding: Tensor | None = None  # (B, T), True where a token is real; None: all are
        self.handle = stack.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, stack: nn.Module, arguments: tuple, named: dict) -> None:
        self.padding = named.get("padding")

    def __call__(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (N, C), the N real tokens; what has no time any more, or only chosen places, as it is."""
        if self.padding is not None and x.ndim == 3 and x.shape[:2] == self.padding.shape:
            return x[self.padding]
        return x.reshape(-1, x.size(-1))


@contextlib.contextmanager
def watching(model: nn.Module, modules: dict[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator:
    """While active, each forward pass of a module calls see(its name, input, output), both (N, C) of real tokens."""
    real = RealTokens(model.stack)

    def note(name: str) -> Callable:
        return lambda module, arguments, output: see(name, real(arguments[0].detach()), real(output.detach()))

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in [*handles, real.handle]:
            handle.remove()


def looking_at(batches: list) -> tqdm:
    """The batches, with a progress bar."""
    return tqdm(batches, desc="looking at examples", unit="batch", delay=2, leave=False, dynamic_ncols=True)


@torch.no_grad()
def run_all(task, model: nn.Module, batches: list) -> None:
    """A forward pass of the task for each batch, in eval mode."""
    model.eval()
    for batch in looking_at(batches):
        task.loss(model, batch.to(next(model.parameters()).device).inputs)
