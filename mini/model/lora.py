"""Low-rank adapters: matrices stay, and beside each learns a product of two thin ones (Hu et al. 2021, "LoRA", §4.1).

They live in model.learning; where weights are served, or opened, they are merged: W + (α / r) B A.
"""

import torch
from torch import Tensor, nn

from mini.model.layers import Linear
from mini.model.transformer import Model, draw

PREFIX = "learning.lora."


class Adapter(nn.Module):
    """(α / r) B A x, A (r, in) random and B (out, r) zero, so that the model begins as it was."""

    role = "hidden"  # of its matrices, to an optimizer

    def __init__(self, layer: Linear, name: str, rank: int, alpha: float):
        super().__init__()
        self.A, self.B = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        draw(self.A.weight, f"{PREFIX}{name}.A.weight", torch.initial_seed(), layer.in_features**-0.5)
        nn.init.zeros_(self.B.weight)
        self.register_buffer("scale", torch.tensor(alpha / rank))
        self.hook = layer.register_forward_hook(self.beside)

    def beside(self, layer: Linear, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return output + self.scale * self.B(self.A(arguments[0]))  # (.., in) -> (.., r) -> (.., out)


def adapt(model: Model, rank: int, alpha: float) -> None:
    """Gives all matrices of the blocks adapters, of which Q, K and V share one; these learn in the stack's place."""
    adapters = nn.ModuleDict()
    for name, layer in model.stack.blocks.named_modules(prefix="stack.blocks"):
        if isinstance(layer, Linear):
            adapters[name.replace(".", "/")] = Adapter(layer, name, rank, alpha)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not name.startswith(("stack.", "head.")))
    model.learning["lora"] = adapters


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights with what its adapters have learnt in them; of one without any the same."""
    tensors = dict(tensors)
    for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(".A.weight")]:
        adapter = key.removesuffix("A.weight")
        name = adapter.removeprefix(PREFIX).replace("/", ".") + "weight"
        change = tensors[f"{adapter}scale"] * (tensors[f"{adapter}B.weight"] @ tensors[key])
        tensors[name] = tensors[name] + change.to(tensors[name].dtype)
    return tensors


def settle(model: Model) -> None:
    """What was there for learning goes; what adapters have learnt stays."""
    if "lora" in model.learning:
        for adapter in model.learning["lora"].values():
            adapter.hook.remove()
        tensors = merged(dict(model.named_parameters()) | dict(model.named_buffers()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])
    model.learning = nn.ModuleDict()
