"""Fine-tuning a part of a model: what stays, what begins to learn when, and how fast."""

import re
from dataclasses import dataclass

from mini.flags import Checked, UserError, option
from mini.model import int8, lora, sparse
from mini.model.transformer import Model


@dataclass
class PartConfig(Checked):
    """What of a model learns, and how fast, when it goes on from --init."""

    freeze: str = option("none", "what stays: 0.5: half of the layers, from below; or as names begin: stack.blocks.0")
    unfreeze: float = option(0.0, "share of the steps in which layer after layer begins, the head first", low=0, high=1)
    layer_decay: float = option(1.0, "a layer's learning rate as a share of that of the layer above", low=0, high=1)
    lora_rank: int = option(0, "low-rank adapters learn in the place of the blocks' matrices; 0: none", low=0)
    lora_alpha: float = option(0.0, "their weight, over the rank; 0: twice the rank", low=0)


def depth(model: Model, name: str) -> int:
    """Of a parameter: 0 of the embeddings, 1 .. of the layers, one more of what stands behind the last."""
    layers = model.config.n_layers
    if found := re.search(r"\bblocks[./](\d+)\b", name):
        return int(found[1]) + 1
    behind = not name.startswith("stack.") or (name.startswith("stack.norm.") and model.config.norm_place == "pre")
    return layers + 1 if behind else 0


def choose_part(model: Model, options: PartConfig, source: str) -> list["Unfreezing"]:
    """Prepares a model to learn in part; returns what acts while it does.

    Raises UserError where nothing would learn, or nothing has such a name.
    """
    if options.lora_rank and (int8.is_prepared(model) or sparse.masks_of(model)):
        raise UserError(f"--lora_rank: {source} is pruned or int8, which its matrices would not stay with adapters")
    if options.lora_alpha and not options.lora_rank:
        raise UserError("--lora_alpha: without --lora_rank there are no adapters that it could weigh")
    if options.freeze not in ("none", ""):
        freeze(model, options.freeze)
    if options.lora_rank:
        lora.adapt(model, options.lora_rank, options.lora_alpha or 2 * options.lora_rank)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze {options.freeze}: nothing is left that learns")
    for name, parameter in model.named_parameters():
        parameter.rate = options.layer_decay ** (model.config.n_layers + 1 - depth(model, name))
    return [Unfreezing(model, options.unfreeze)] if options.unfreeze else []


def freeze(model: Model, what: str) -> None:
    """A share of the layers with the embeddings below them, or all parameters whose names begin so."""
    try:
        share = float(what)
    except ValueError:
        share, names = None, [name.strip() for name in what.split(",")]
    if share is not None:
        if not 0 <= share <= 1:
            raise UserError(f"--freeze {what}: a share of the layers is 0 to 1")
        below = round(share * model.config.n_layers)
        frozen = {name for name, _ in model.named_parameters() if depth(model, name) <= below}
    else:
        frozen = set()
        for begin in names:
            found = {name for name, _ in model.named_parameters() if f"{name}.".startswith(f"{begin}.")}
            if not found:
                known = ", ".join(name for name, _ in model.named_parameters())
                raise UserError(f"--freeze {begin}: no parameter's name begins so; they are {known[:200]} ..")
            frozen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


class Unfreezing:
    """Layer after layer begins to learn, from the head down to the embeddings (Howard & Ruder 2018, "ULMFiT", §3.3).

    Until then a parameter has no gradient; so neither momentum nor weight decay touch it.
    """

    def __init__(self, model: Model, share: float):
        self.model, self.share = model, share

    def after_backward(self, done: int, steps: int) -> None:
        layers = self.model.config.n_layers
        reached = (layers + 1) * (1 - done / (self.share * steps))  # this depth, and all behind it
        for name, parameter in self.model.named_parameters():
            if depth(self.model, name) < reached - 1e-9:
                parameter.grad = None

    def after_step(self, done: int, steps: int) -> None:
        pass
