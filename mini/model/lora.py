"""Low-rank adapters: matrices stay, and beside each learns a product of two thin ones (Hu et al. 2021, "LoRA", §4.1).

They live in model.learning; where weights are served, or opened, they are merged: W + (α / r) B A.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from mini.errors import UserError
from mini.model.layers import Linear
from mini.model.transformer import Model, draw

PREFIX = "learning.lora."


class Adapter(nn.Module):
    """(α / r) B A x, A (r, in) random and B (out, r) zero, so that the model begins as it was."""

    role = "hidden"  # of its matrices, to an optimizer

    def __init__(self, layer: Linear, name: str, rank: int, alpha: float):
        super().__init__()
        if rank > min(layer.in_features, layer.out_features):
            raise UserError(f"--lora_rank {rank}: {name} is {layer.out_features} x {layer.in_features}; give less")
        self.A, self.B = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        draw(self.A.weight, f"{PREFIX}{name}.A.weight", torch.initial_seed(), layer.in_features**-0.5)
        nn.init.zeros_(self.B.weight)
        self.register_buffer("scale", torch.tensor(alpha / rank))
        self.hook = layer.register_forward_hook(self.beside)

    def beside(self, layer: Linear, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return output + self.scale * self.B(self.A(arguments[0]))  # (.., in) -> (.., r) -> (.., out)


class Adapters(nn.ModuleDict):
    """{name of a matrix, with / for dots: its adapter}"""

    @torch.no_grad()
    def end_learning(self, model: Model) -> None:
        """What they have learnt goes into the matrices."""
        for adapter in self.values():
            adapter.hook.remove()
        tensors = merged(dict(model.named_parameters()) | dict(model.named_buffers()), "the model")
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def adapt(model: Model, rank: int, alpha: float) -> None:
    """Gives the matrices of the blocks that are not frozen adapters, of which Q, K and V share one.

    These learn in the place of the whole stack and of what gives tokens their scores.
    """
    adapters, vocabulary = Adapters(), model.vocabulary_weights()
    for name, layer in model.stack.blocks.named_modules(prefix="stack.blocks"):
        if isinstance(layer, Linear) and layer.weight.requires_grad:
            adapters[name.replace(".", "/")] = Adapter(layer, name, rank, alpha)
    for name, parameter in model.named_parameters():
        if name.startswith("stack.") or parameter in vocabulary:
            parameter.requires_grad_(False)
    model.learning["lora"] = adapters


def merged(tensors: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """A model's weights with what its adapters have learnt in them; of one without any the same."""
    tensors = dict(tensors)
    for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(".A.weight")]:
        adapter = key.removesuffix("A.weight")
        name = adapter.removeprefix(PREFIX).replace("/", ".") + "weight"
        try:
            change = tensors[f"{adapter}scale"] * (tensors[f"{adapter}B.weight"] @ tensors[key])
            tensors[name] = tensors[name] + change.view_as(tensors[name]).to(tensors[name].dtype)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{where}: {key} does not fit its matrix ({str(error).splitlines()[0]})") from None
    return tensors
