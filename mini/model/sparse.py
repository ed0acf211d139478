"""Sparse models: masks that keep weights at zero, and files that hold only the weights that stay.

A mask alone makes nothing faster and no file smaller: masked weights are zeros in dense matrices. Files hold one bit
for each weight and the weights that stay (`pack`). Which weights go is chosen in compression/prune.py.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mini.errors import UserError
from mini.model.layers import Embedding, Linear


class Masks(nn.Module):
    """For each pruned matrix a mask of its shape, True where a weight stays. A model has them as `model.masks`."""

    def __init__(self, masks: dict[str, Tensor]):
        super().__init__()
        for name, mask in masks.items():  # the names of buffers have no dots
            self.register_buffer(name.replace(".", "/"), mask)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((name.replace("/", "."), mask) for name, mask in self.named_buffers())


def mask_key(name: str) -> str:
    """The name, in checkpoints and in state_dict(), of a weight's mask."""
    return "masks." + name.replace(".", "/")


def mask_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name of a weight: its mask} of what `weights` gives, or a checkpoint holds."""
    prefix = mask_key("")
    return {k.removeprefix(prefix).replace("/", "."): t for k, t in tensors.items() if k.startswith(prefix)}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """{name of a weight: its mask} of a pruned model; empty for any other."""
    masks = getattr(model, "masks", None)
    return dict(masks.items()) if masks is not None else {}


@torch.no_grad()
def hold(model: nn.Module) -> None:
    """Sets masked weights to zero."""
    for name, mask in masks_of(model).items():
        model.get_parameter(name).mul_(mask)


class HoldMasks:
    """What a model with masks needs while it learns."""

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.no_grad()
    def after_backward(self, done: int, steps: int) -> None:
        """Gradients of masked weights are zero before their norm is taken: those that stay are clipped by their own."""
        for name, mask in masks_of(self.model).items():
            if (gradient := self.model.get_parameter(name).grad) is not None:
                gradient.mul_(mask)

    def after_step(self, done: int, steps: int) -> None:
        """Masked weights are zero again: an optimizer's momentum and Muon's mixing revive them."""
        hold(self.model)


def set_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    model.masks = Masks(masks)
    hold(model)


def prunable(model: nn.Module) -> dict[str, Linear | Embedding]:
    """{name of a weight: its layer} for the matrices that are pruned: all but positions, segments and small heads.

    A matrix with two places (a tied head) stands here once, with the name that files give it.
    """
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    return {name: layers[name] for name, _ in model.named_parameters() if name in layers}


def sparsity(model: nn.Module) -> float:
    """The share of the weights that are masked, in the matrices that have masks."""
    masks = masks_of(model).values()
    return sum(int((~mask).sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each masked weight as NAME.bits, one bit for each weight, and NAME.kept, those that stay, row by row."""
    packed = {name: tensor for name, tensor in tensors.items() if not name.startswith("masks.")}
    for name, mask in mask_tensors(tensors).items():
        packed[f"{name}.bits"] = torch.from_numpy(np.packbits(mask.cpu().numpy()))
        packed[f"{name}.kept"] = packed.pop(name)[mask]
    return packed


def unpack(tensors: dict[str, Tensor], wanted: Callable[[], dict[str, Tensor]], where) -> dict[str, Tensor]:
    """The inverse; wanted() are the weights of the model that the tensors are for, asked for their shapes alone."""
    tensors, packed = dict(tensors), [name for name in tensors if name.endswith(".bits")]
    wanted = wanted() if packed else {}
    for name in packed:
        weight = name.removesuffix(".bits")
        if weight not in wanted or f"{weight}.kept" not in tensors:
            raise UserError(f"{where}: {name} belongs to no weight of this model")
        shape, bits, kept = wanted[weight].shape, tensors.pop(name), tensors.pop(f"{weight}.kept")
        if bits.dtype != torch.uint8 or bits.ndim != 1 or kept.ndim != 1 or len(bits) != -(-shape.numel() // 8):
            raise UserError(f"{where}: {name} does not fit {weight} {list(shape)}: the file is damaged")
        mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel())).bool()
        if int(mask.sum()) != len(kept):
            raise UserError(f"{where}: {name} does not fit {weight} {list(shape)}: the file is damaged")
        tensors[weight] = torch.zeros(shape.numel(), dtype=kept.dtype).masked_scatter(mask, kept).view(shape)
        tensors[mask_key(weight)] = mask.view(shape)
    return tensors


def take_masks(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives a model the masks that tensors speak of."""
    if masks := {name: mask.clone() for name, mask in mask_tensors(tensors).items()}:
        model.masks = Masks(masks)
