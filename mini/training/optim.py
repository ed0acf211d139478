"""What steps which parameter, AdamW or Muon, and the shapes of the learning rate.

Each parameter group carries its own peak in "peak_lr"; the loop sets lr = peak_lr · schedule(step).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from mini.flags import Checked, option
from mini.model.layers import Linear
from mini.training.muon import Muon
from mini.training.ranks import World


@dataclass
class OptimConfig(Checked):
    """The optimizer and its schedule."""

    optimizer: str = option("muon", "Muon for the hidden matrices and AdamW for the rest, or AdamW", ("muon", "adamw"))
    lr: float | None = option(None, "peak rate, with Muon that of hidden matrices; None: Muon 0.02, AdamW 0.001", low=0)
    embed_lr: float = option(0.0, "AdamW's for embeddings; 0: lr, with Muon lr / 2", low=0)
    head_lr: float = option(0.0, "AdamW's for an untied head, norms and biases; 0: lr, with Muon lr / 4", low=0)
    schedule: str = option("trapezoidal", "shape after the warm-up", ("trapezoidal", "cosine", "linear", "constant"))
    warmup: float = option(0.02, "warm-up: share of the steps, or their number if 1 or more", low=0)
    cooldown: float = option(0.5, "share of the steps in which a trapezoidal schedule falls", low=0, high=1)
    min_lr: float = option(0.0, "learning rate at the end, as a share of the peak", low=0, high=1)
    weight_decay: float = option(0.0, "decoupled weight decay of matrices and embeddings", low=0)
    beta1: float = option(0.9, "AdamW's first-moment decay", low=0, high=0.999999)
    beta2: float = option(0.95, "AdamW's second-moment decay", low=0, high=0.999999)
    momentum: float = option(0.95, "Muon's momentum", low=0, high=0.999999)
    turns: int = option(10, "Muon: in so many steps each matrix has its turn, with so many times the rate", low=1)
    clip: float = option(1.0, "largest gradient norm; 0: no clipping", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.lr is None:
            self.lr = 0.02 if self.optimizer == "muon" else 0.001


def schedule(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step 0..steps-1 as a share of the peak: warm-up, then the chosen shape."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (steps - step) / max(1.0, steps - warmup)  # 1 at the end of the warm-up, towards 0 at the last step
    if config.schedule == "constant":
        fall = 1.0
    elif config.schedule == "linear":
        fall = left
    elif config.schedule == "cosine":  # Loshchilov & Hutter 2017
        fall = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    else:  # trapezoidal: flat, then straight down in the last `cooldown` of all steps (Zhai et al. 2022)
        fall = min(1.0, (steps - step) / max(1.0, config.cooldown * steps))
    return config.min_lr + (1 - config.min_lr) * fall


def roles(model: nn.Module) -> dict[str, str]:
    """What each parameter that learns is to an optimizer: "hidden", "embedding", "head" or "vector".

    A matrix is what the innermost module around it says with its attribute `role`; all others are vectors.
    """
    said = {name: module.role for name, module in model.named_modules() if hasattr(module, "role")}

    def role(name: str, parameter: nn.Parameter) -> str:
        if parameter.ndim < 2:
            return "vector"
        around = name
        while around not in said:
            around = around.rpartition(".")[0]
        return said[around]

    return {name: role(name, p) for name, p in model.named_parameters() if p.requires_grad}


def make_optimizers(model: nn.Module, config: OptimConfig, world: World | None = None) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the hidden matrices and AdamW for the rest.

    Weight decay acts on matrices and embeddings, never on biases and norms. world: the processes that share the work.
    """
    muon = config.optimizer == "muon"
    embed_lr = config.embed_lr or (config.lr / 2 if muon else config.lr)
    head_lr = config.head_lr or (config.lr / 4 if muon else config.lr)
    rates = {"hidden": config.lr, "embedding": embed_lr, "head": head_lr, "vector": head_lr}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}  # (role, share of its rate) -> parameters
    for name, role in roles(model).items():
        if role not in rates:
            raise ValueError(f"{name} has the role {role!r}; a module's role is one of {', '.join(rates)}")
        groups.setdefault((role, model.rates.get(name, 1.0)), []).append(model.get_parameter(name))
    adamw, hidden = [], []
    for (role, share), params in groups.items():
        rate, decay = rates[role] * share, 0.0 if role == "vector" else config.weight_decay
        group = dict(params=params, lr=rate, peak_lr=rate, weight_decay=decay)
        (hidden if muon and role == "hidden" else adamw).append(group)
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=(config.beta1, config.beta2), fused=True))
    if hidden:
        parts = {id(m.weight): m.parts for m in model.modules() if isinstance(m, Linear)}
        optimizers.append(Muon(hidden, config.lr, config.momentum, config.weight_decay, config.turns, parts, world))
    mine = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(mine) == sorted(id(p) for p in model.parameters() if p.requires_grad), "each parameter has one group"
    return optimizers
