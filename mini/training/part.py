"""Fine-tuning a part of a model: what stays, what begins to learn when, and how fast."""

import re
from dataclasses import dataclass

from mini.flags import Checked, UserError, option
from mini.model import int8, lora, sparse
from mini.model.transformer import Model


@dataclass
class PartConfig(Checked):
    """What of a model learns, and how fast, when it goes on from --init."""

    freeze: str = option("none", "what stays: 0.5: embeddings, half of the layers; or as names begin: stack.blocks.0")
    unfreeze: float = option(0.0, "share of the steps in which layer after layer begins, the head first", low=0, high=1)
    layer_decay: float = option(1.0, "a layer's learning rate as a share of that of the layer above", low=0.01, high=1)
    lora_rank: int = option(0, "low-rank adapters learn in the place of the blocks' matrices; 0: none", low=0)
    lora_alpha: float = option(0.0, "their weight, over the rank; 0: twice the rank", low=0)


def depth(model: Model, name: str) -> int:
    """Of a parameter: 0 of the embeddings, 1 .. of the layers, one more of what stands behind the last.

    There stands an embedding, too, that is the output head.
    """
    config = model.config
    if found := re.search(r"\bblocks[./](\d+)\b", name):
        return int(found[1]) + 1
    is_head = name == "stack.tokens.weight" and config.tied and not (config.n_classes or config.spans)
    is_last_norm = name.startswith("stack.norm.") and config.norm_place == "pre"
    return config.n_layers + 1 if is_head or is_last_norm or not name.startswith("stack.") else 0


def choose_part(model: Model, options: PartConfig, source: str) -> list["Unfreezing"]:
    """Prepares a model to learn in part; returns what acts while it does.

    Raises UserError where nothing would learn, or nothing has such a name.
    """
    if options.lora_rank and (int8.is_prepared(model) or sparse.masks_of(model)):
        raise UserError(f"--lora_rank: {source} is pruned or int8, which its matrices would not stay with adapters")
    if options.lora_alpha and not options.lora_rank:
        raise UserError("--lora_alpha: without --lora_rank there are no adapters that it could weigh")
    if options.freeze != "none":
        freeze(model, options.freeze)
    if options.lora_rank:
        lora.adapt(model, options.lora_rank, options.lora_alpha or 2 * options.lora_rank)
    model.freeze_unused()
    depths = {name: depth(model, name) for name, p in model.named_parameters() if p.requires_grad}
    if not depths:
        raise UserError(f"--freeze {options.freeze}: nothing is left that learns")
    if options.unfreeze and len(set(depths.values())) < 2:
        raise UserError("--unfreeze: what learns stands in one layer; there is nothing that could begin later")
    top = max(depths.values())
    model.rates = {name: options.layer_decay ** (top - d) for name, d in depths.items()}
    return [Unfreezing(model, depths, options.unfreeze)] if options.unfreeze else []


def freeze(model: Model, what: str) -> None:
    """A share of the layers with the embeddings below them, or all parameters whose names begin so."""
    names = [name for name, _ in model.named_parameters()]
    try:
        share = float(what)
    except ValueError:
        frozen = set()
        for begin in (part.strip(" .") for part in what.split(",")):
            found = {name for name in names if f"{name}.".startswith(f"{begin}.")}
            if not found:
                known = dict.fromkeys(re.match(r"stack\.blocks\.\d+|stack\.\w+|\w+", name)[0] for name in names)
                raise UserError(
                    f"--freeze {begin}: no parameter's name begins so, as with {', '.join(known)}"
                ) from None
            frozen |= found
    else:
        if not 0 <= share <= 1:
            raise UserError(f"--freeze {what}: a share of the layers is 0 to 1")
        below = int(share * model.config.n_layers + 0.5)
        frozen = {name for name in names if depth(model, name) <= below}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)


class Unfreezing:
    """Layer after layer begins to learn, from the head down to the embeddings (Howard & Ruder 2018, "ULMFiT", §3.3).

    depths: of what learns. Until its turn a parameter has no gradient; so neither momentum nor weight decay touch it.
    """

    def __init__(self, model: Model, depths: dict[str, int], share: float):
        self.model, self.share = model, share
        order = sorted(set(depths.values()), reverse=True)
        self.begins = {name: order.index(d) / (len(order) - 1) for name, d in depths.items()}  # 0 .. 1 of that share

    def after_backward(self, done: int, steps: int) -> None:
        for name, begin in self.begins.items():
            if done < round(begin * self.share * steps):
                self.model.get_parameter(name).grad = None

    def after_step(self, done: int, steps: int) -> None:
        pass
