"""AdamW for vectors and embeddings, Muon for hidden matrices, and the shapes of the learning rate.

Each parameter group carries its own peak in "peak_lr"; the loop sets lr = peak_lr · schedule(step).
"""

import math

import torch
from torch import Tensor, nn

from mini.config import OptimConfig


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


def make_optimizers(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay acts on matrices and embeddings, never on biases and norms. dtype: of Muon's matrix products.
    """
    muon = config.optimizer == "muon"
    embed_lr = config.embed_lr or (config.lr / 2 if muon else config.lr)
    head_lr = config.head_lr or (config.lr / 4 if muon else config.lr)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden, groups = [], {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".blocks." in f".{name}" and parameter.ndim == 2:
            if muon:
                hidden.append(parameter)
                continue
            lr = config.lr
        else:
            lr = embed_lr if id(parameter) in embeddings else head_lr
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    adamw = torch.optim.AdamW(
        [dict(params=p, peak_lr=lr, lr=lr, weight_decay=decay) for (lr, decay), p in groups.items()],
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    if not hidden:
        return [adamw]
    return [adamw, Muon(hidden, config.lr, config.momentum, config.weight_decay, qkv_rows(model), dtype)]


def qkv_rows(model: nn.Module) -> dict[int, list[int]]:
    """{id of a fused QKV weight: rows of Q, K and V}: Muon orthogonalises each third on its own."""
    splits = {}
    for module in model.modules():
        if hasattr(module, "qkv"):
            q, kv = module.n_heads * module.head_size, module.n_kv_heads * module.head_size
            splits[id(module.qkv.weight)] = [q, kv, kv]
    return splits


def orthogonalize(G: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """Drives the singular values of each matrix of G (n, rows, cols) towards 1, keeping its singular vectors.

    Newton-Schulz iteration X <- aX + (bA + cA²)X, A = XXᵀ; its coefficients trade exactness for speed, so
    singular values end between about 0.7 and 1.2 (Jordan et al. 2024, "Muon"). bfloat16 is precise enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:  # the smaller side makes the cheaper A
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the iteration needs singular values of at most 1
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # bA + cA²
        X = torch.baddbmm(X, B, X, beta=a)  # aX + BX
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: the step of every hidden matrix has full rank (Jordan et al. 2024).

    Matrices of equal shape are orthogonalised as one batch: with small matrices the time goes into calls.
    """

    def __init__(self, params, lr: float, momentum: float, weight_decay: float, splits: dict, dtype: torch.dtype):
        super().__init__(params, dict(lr=lr, peak_lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.splits = splits  # {id of a fused weight: the rows of its parts}
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            grads = [p.grad for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov: look one step ahead
            # Cut fused matrices into their parts and group all parts by shape.
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p, update in zip(params, updates, strict=True):
                rows = self.splits.get(id(p), [p.size(0)])
                for target, part in zip(p.split(rows), update.split(rows), strict=True):
                    shapes.setdefault(part.shape, []).append((target, part))
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for (rows, cols), pairs in shapes.items():
                steps = orthogonalize(torch.stack([part for _, part in pairs]), self.dtype)  # (n, rows, cols)
                scale = max(1.0, rows / cols) ** 0.5  # the same change of a unit input's norm for every shape
                torch._foreach_add_([t for t, _ in pairs], list(steps.unbind()), alpha=-group["lr"] * scale)
