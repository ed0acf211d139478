"""Pruning: which single weights a model can do without.

    scores    how much a weight matters: |w| (Han et al. 2015), |w| times the norm of its input (Wanda, Sun et al.
              2023), or chance, the baseline of both
    masks     True where a weight stays: the least important s of all, of a matrix, or of each group (N:M)
    schedule  all at once, or ever more of them while training goes on (Zhu & Gupta 2017)

What a mask does to a model and its file is in model/sparse.py; heads, neurons and layers go in shrink.py.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mini.compression.activations import Examples, seeing
from mini.flags import Checked, UserError, option
from mini.model.layers import Linear
from mini.model.sparse import HoldMasks, masks_of, prunable, set_masks, sparsity
from mini.model.transformer import Model

METHODS = ("magnitude", "random", "wanda", "gradient")
RAMP = 2 / 3  # the share of the steps in which a cubic schedule prunes; in the rest the model recovers


@dataclass
class PruneConfig(Checked):
    """What is taken out of a model, and how it is chosen."""

    sparsity: float = option(0.5, "share of the weights, heads or neurons that goes", low=0)
    method: str = option("magnitude", "how they are judged; gradient: heads, neurons only", METHODS)
    scope: str = option("layer", "compared within a layer, or all with each other", ("layer", "global"))
    pattern: str = option("unstructured", "single weights; N:M, of M inputs N stay, such as 2:4; heads; neurons")
    schedule: str = option("oneshot", "all at once, or more and more of them while training", ("oneshot", "cubic"))
    calibrate: int = option(256, "training examples that wanda looks at, and gradient ten times", low=1)
    first: float = option(0.0, "the sparsity from which a cubic schedule begins", flag=False)

    def __post_init__(self):
        super().__post_init__()
        if self.sparsity >= 1:
            raise UserError(f"--sparsity {self.sparsity}: must be below 1, something has to stay")
        if not self.units and not self.n_of_m and self.pattern != "unstructured":
            raise UserError(f"--pattern {self.pattern}: choose one of unstructured, heads, neurons, or N:M such as 2:4")
        if self.n_of_m:
            n, m = self.n_of_m
            if not 0 < n < m:
                raise UserError(f"--pattern {self.pattern}: N of M weights stay, with 0 < N < M")
            self.sparsity = 1 - n / m
        cubic = "--schedule cubic" if self.schedule == "cubic" else ""
        single = "--method wanda" if self.method == "wanda" else cubic
        wide = "--scope global" if self.scope == "global" else cubic
        if self.units and single:
            raise UserError(f"{single}: for single weights; heads and neurons are taken out at once")
        if not self.units and self.method == "gradient":
            raise UserError("--method gradient: for --pattern heads or neurons")
        if self.method == "wanda" and wide:
            raise UserError(f"--method wanda with {wide}: it compares the inputs of one output, once")
        if self.n_of_m and wide:
            raise UserError(f"--pattern {self.pattern} with {wide}: it compares the weights of a group, once")

    @property
    def units(self) -> bool:
        """Whether heads or neurons go, rather than single weights."""
        return self.pattern in ("heads", "neurons")

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else None


# ---------------------------------------------------------------- which weights go
def scores(model: Model, method: str, seed: int, examples: Examples | None = None) -> dict[str, Tensor]:
    """The importance of every prunable weight, in matrices of their shapes. Masked weights get -1: they go first.

    Wanda's norms are those of the model as it is; the paper measures each block behind blocks that are pruned already.
    """
    layers = prunable(model)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        found = {n: torch.rand(m.weight.shape, generator=generator).to(m.weight.device) for n, m in layers.items()}
    else:
        found = {name: layer.weight.detach().abs().float() for name, layer in layers.items()}
    if method == "wanda":  # |W_ij| · ‖X_j‖₂ over the tokens of the batches; an embedding has no inputs to measure
        for name, norms in input_norms(model, examples).items():
            found[name] = found[name] * norms
    for name, mask in masks_of(model).items():
        found[name] = found[name].masked_fill(~mask, -1)
    return found


def input_norms(model: Model, examples: Examples) -> dict[str, Tensor]:
    """‖X_j‖₂ of each input j of every linear layer, over all real tokens: {name of the weight: (in,)}."""
    squares: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, output: Tensor) -> None:
        squares[name] = squares.get(name, 0) + x.float().square().sum(dim=0)

    layers = {name: layer for name, layer in prunable(model).items() if isinstance(layer, Linear)}
    with seeing(model, layers, add):
        examples.run(model)
    return {name: total.sqrt() for name, total in squares.items()}


def make_masks(scored: dict[str, Tensor], share: float, options: PruneConfig) -> dict[str, Tensor]:
    """The masks that take away the least important `share` of the weights, to the weight.

    Compared are all weights with each other (scope global), those of a matrix (layer), those of one output (Wanda), or
    those of a group of M inputs (N:M).
    """
    if options.scope == "global":
        flat = torch.cat([score.flatten() for score in scored.values()])
        kept = keep_highest(flat[None], [round(share * len(flat))])[0].split([s.numel() for s in scored.values()])
        return {name: part.view_as(score) for (name, score), part in zip(scored.items(), kept, strict=True)}
    masks = {}
    for name, score in scored.items():
        if options.n_of_m:
            n, m = options.n_of_m
            if score.size(1) % m:
                raise UserError(f"--pattern {options.pattern}: {name} has {score.size(1)} inputs, no multiple of {m}")
            rows = score.reshape(-1, m)  # (rows * in / M, M)
            gone = [m - n] * len(rows)
        else:
            rows = score if options.method == "wanda" else score.reshape(1, -1)
            ends = [round(share * rows.size(1) * (i + 1)) for i in range(len(rows))]  # in all share · n go, exactly
            gone = np.diff([0, *ends])
        masks[name] = keep_highest(rows, gone).view_as(score)
    return masks


def keep_highest(rows: Tensor, without: list[int]) -> Tensor:
    """True in each row (R, n) but for its without[r] lowest values; of equal ones the first go."""
    order = rows.argsort(dim=1, stable=True)  # a threshold would take all of several equal values, or none
    ranks = torch.arange(rows.size(1), device=rows.device)
    gone = ranks < torch.as_tensor(without, device=rows.device)[:, None]  # (R, n), in that order
    return torch.ones_like(rows, dtype=torch.bool).scatter(1, order, ~gone)


def prune(model: Model, options: PruneConfig, share: float, seed: int, examples: Examples | None = None) -> None:
    """Masks this share of the model's weights. Masked ones stay so: 0.5 twice is 0.5.

    More than this share goes where an older mask has taken more of a matrix, row or group than its part.
    """
    masks, older = make_masks(scores(model, options.method, seed, examples), share, options), masks_of(model)
    set_masks(model, {name: mask & older[name] if name in older else mask for name, mask in masks.items()})


# ---------------------------------------------------------------- ever more of them
def cubic(t: float, final: float, first: float = 0.0) -> float:
    """The sparsity at t, 0 to 1: s_f + (s_0 - s_f)(1 - t)³, fast at first and ever slower (Zhu & Gupta 2017, eq. 1)."""
    return final + (first - final) * (1 - min(t, 1.0)) ** 3


def ramp_end(steps: int) -> int:
    """The step after which a cubic schedule prunes nothing more."""
    return max(1, round(RAMP * steps))


class CubicPruning(HoldMasks):
    """Keeps zeros zero, and makes more and more of them until two thirds of the steps are done."""

    def __init__(self, model: Model, options: PruneConfig, seed: int):
        super().__init__(model)
        self.options, self.seed = options, seed

    def after_step(self, done: int, steps: int) -> bool:
        ramp = ramp_end(steps)
        if done <= ramp and (done % max(1, ramp // 50) == 0 or done == ramp):
            wanted = cubic(done / ramp, self.options.sparsity, self.options.first)
            prune(self.model, self.options, max(sparsity(self.model), wanted), self.seed)
        else:
            super().after_step(done, steps)
        return done >= ramp  # before that, no weights are the best
