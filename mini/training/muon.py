"""Muon: momentum, orthogonalised. Over several processes each does its share of that, and all get what it gives."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mini.tensors import held, share_of
from mini.training.ranks import World


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Drives the singular values of each matrix of G (n, rows, cols) towards 1, keeping its singular vectors.

    Newton-Schulz iteration X <- QX, Q = aI + bA + cA², A = XXᵀ; its coefficients trade exactness for speed: singular
    values of 0.01 and more end between about 0.7 and 1.2 (Jordan et al. 2024, "Muon"; here they are scaled by ‖GGᵀ‖^½,
    nearer to the largest of them than ‖G‖). Only A, of the smaller side m, and the product P of all Q are iterated,
    A <- QAQ, for everything in it commutes; G is multiplied once, at the end. This asks for all bits of float32: small
    singular values are squared in A.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    tall = G.size(-2) > G.size(-1)
    G = G.float() / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    A = G.mT @ G if tall else G @ G.mT  # (n, m, m)
    size = A.norm(dim=(-2, -1), keepdim=True) + 1e-14  # at least the largest singular value's square, to be 1
    A, P = A / size, None
    for i in range(steps):
        Q = torch.baddbmm(A, A, A, beta=b, alpha=c)
        Q.diagonal(dim1=-2, dim2=-1).add_(a)
        P = Q if P is None else Q @ P
        A = Q @ A @ Q if i + 1 < steps else A
    P = P / size.sqrt()
    out = G @ P if tall else P @ G  # (n, rows, cols)
    torch.set_float32_matmul_precision(precision)
    return out


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: the step of every hidden matrix has full rank (Jordan et al. 2024).

    Orthogonalising every matrix at every step would take a third of a float32 step on a CPU. So they take turns: each
    is stepped once in `turns` steps, with so many times the rate; its momentum goes on all the time (docs/log.md).
    """

    def __init__(self, params, lr: float, momentum: float, weight_decay: float, turns: int, parts: dict,
                 world: World | None = None):  # fmt: skip
        super().__init__(params, dict(lr=lr, peak_lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.turns = turns
        self.parts = parts  # {id of a weight: the rows of each matrix in it}, such as those of Q, K and V
        self.rank, self.size, self.sharded = (world.rank, world.size, world.sharded) if world else (0, 1, False)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"momentum": torch.zeros_like(p), "step": torch.tensor(0)}
            learn = [p for p in params if p.grad is not None]
            if learn:
                momenta = [held(self.state[p]["momentum"]).tensor for p in learn]
                torch._foreach_lerp_(momenta, [held(p.grad).tensor for p in learn], 1 - group["momentum"])
            rate = min(group["lr"] * self.turns, 1e36)  # times a scale, still a number in float32
            turn = int(self.state[params[0]]["step"])  # all have counted as far
            due, ahead = [], []
            for i, p in enumerate(params):
                self.state[p]["step"] = self.state[p]["step"].cpu() + 1  # a checkpoint's may lie on the device
                if (i + turn) % self.turns or p.grad is None:
                    continue
                gradient, momentum = held(p.grad).tensor, held(self.state[p]["momentum"]).tensor
                due.append(p)
                ahead.append(torch.lerp(gradient, momentum, group["momentum"]))  # Nesterov: look one step ahead
            for p, step in zip(due, self.orthogonalized(due, ahead), strict=True):
                held(p).tensor.mul_(1 - rate * group["weight_decay"]).add_(step, alpha=-rate)

    def orthogonalized(self, params: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """The step of each parameter, for a rate of one; as much of it as this process holds of the update."""
        if self.size == 1 or not params:
            return self.steps(params, updates)
        order = sorted(range(len(params)), key=lambda i: -params[i].numel())
        dealt = [order[rank :: self.size] for rank in range(self.size)]  # which of them each process does
        mine, shapes = dealt[self.rank], [p.shape for p in params]
        if self.sharded:  # the rows of a matrix come from all processes, and go back to them
            rows = [[share_of(len(params[i]), rank, self.size) for i in mine] for rank in range(self.size)]
            sizes = [[(b - a, shapes[i][1]) for i, (a, b) in zip(mine, of, strict=True)] for of in rows]
            come = exchange([[updates[i] for i in those] for those in dealt], sizes, updates[0])
            updates_here = [torch.cat(pieces) for pieces in zip(*come, strict=True)]
            steps = self.steps([params[i] for i in mine], updates_here)
            sent = [[step[a:b] for step, (a, b) in zip(steps, of, strict=True)] for of in rows]
        else:  # all have all updates, and want all steps
            sent = [self.steps([params[i] for i in mine], [updates[i] for i in mine])] * self.size
        found = exchange(sent, [[updates[i].shape for i in those] for those in dealt], updates[0])
        steps = {i: step for those, of in zip(dealt, found, strict=True) for i, step in zip(those, of, strict=True)}
        return [steps[i] for i in range(len(params))]

    def steps(self, params: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Of whole updates. Fused matrices are cut into their parts, each of which is orthogonalised alone.

        Those of equal shape are one batch: with small matrices the time goes into calls.
        """
        steps = [torch.empty_like(update) for update in updates]
        shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, update, step in zip(params, updates, steps, strict=True):
            rows = self.parts.get(id(p), [len(update)])
            for target, part in zip(step.split(rows), update.split(rows), strict=True):
                shapes.setdefault(part.shape, []).append((target, part))
        for (rows, cols), pairs in shapes.items():
            scale = max(1.0, rows / cols) ** 0.5  # the same change of a unit input's norm for every shape
            found = orthogonalize(torch.stack([part for _, part in pairs])) * scale  # (n, rows, cols)
            torch._foreach_copy_([target for target, _ in pairs], list(found.unbind()))
        return steps


def exchange(sent: list[list[Tensor]], shapes: list[list[tuple]], like: Tensor) -> list[list[Tensor]]:
    """sent[r] goes to process r. Returns what each process has sent here, which is of these shapes."""
    flat = torch.cat([like.new_empty(0), *(tensor.flatten() for to in sent for tensor in to)])
    sizes = [sum(map(math.prod, those)) for those in shapes]
    found = flat.new_empty(sum(sizes))
    dist.all_to_all_single(found, flat, sizes, [sum(tensor.numel() for tensor in to) for to in sent])
    parts = zip(found.split(sizes), shapes, strict=True)
    return [[x.view(shape) for x, shape in zip(of.split([*map(math.prod, those)]), those, strict=True)]
            for of, those in parts]  # fmt: skip
