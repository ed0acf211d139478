"""The loss of scores over a vocabulary, without keeping all of them: no other tensor of a training is as large.

Shapes: N tokens, C channels, V vocabulary, R rows of the head's matrix: V, or more by vocab_multiple.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # a target that is not predicted


@dataclass
class Unscored:
    """The logits cap(x Wᵀ + b) of hidden states x (.., C), yet to be computed: what tasks with in_parts are given."""

    hidden: Tensor
    head: nn.Linear
    vocab_size: int
    cap: float  # logits are cap · tanh(scores / cap); 0: the scores


def capped(scores: Tensor, cap: float) -> Tensor:
    """Scores that stay within ± cap (Gemma Team 2024, "Gemma 2", §2); 0: as they are."""
    return cap * torch.tanh(scores / cap) if cap else scores


def rows_at_once(device: str) -> int:
    """Tokens whose scores are there at one time; a GPU's kernels ask for more (not measured)."""
    return 2048 if device == "cuda" else 512


def token_loss(logits: Tensor | Unscored, targets: Tensor) -> Tensor:
    """The summed cross-entropy in nats of logits (.., V) and targets (..), of which IGNORE does not count."""
    if isinstance(logits, Unscored):
        x, weights = logits.hidden.flatten(0, -2), [logits.head.weight, logits.head.bias]  # (N, C)
        if not torch.is_grad_enabled():  # else parameters would seem to need theirs
            weights = [None if weight is None else weight.detach() for weight in weights]
        return loss_in_parts(x, *weights, targets.flatten(), logits.vocab_size, logits.cap)
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORE)


@torch.compiler.disable  # in one graph, all parts' products by which W learns would be there until the last
def loss_in_parts(*arguments) -> Tensor:
    return LossInParts.apply(*arguments)


class LossInParts(torch.autograd.Function):
    """Cross-entropy and its gradient, a few rows at a time: the plain way's products, and little of its memory.

    The loss is a sum, whose gradient by each score s is softmax(s) - [s is the target's], times 1 - tanh² where scores
    are capped: it is known as soon as the scores are, and goes on into x and W before the next rows' take their place.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, V: int, cap: float) -> Tensor:
        """x (N, C), weight (R, C), bias (R,), targets (N,) -> the sum over all targets but IGNORE, ()."""
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        small = 8 if dtype == torch.float16 else 1  # sums over 2,048 rows then stay in float16 if |x| < 256
        n = rows_at_once(x.device.type)
        W = weight.to(dtype)
        total = x.new_zeros((), dtype=torch.float32)
        to_x = []
        to_weight = torch.zeros_like(weight) if needs_weight else None
        to_bias = torch.zeros_like(bias) if needs_bias else None
        for part, target in zip(x.split(n), targets.split(n), strict=True):
            part = part.to(dtype)
            scores = F.linear(part, W, None if bias is None else bias.to(dtype))  # (n, R)
            logits = capped(scores[:, :V].float(), cap)
            counts, target = (target != IGNORE)[:, None], target.where(target != IGNORE, 0)[:, None]  # (n, 1)
            log_p = logits.log_softmax(dim=-1)  # (n, V)
            total -= log_p.gather(1, target).where(counts, 0.0).sum()
            if not (needs_x or needs_weight or needs_bias):
                continue
            slope = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=log_p.dtype))  # (n, V)
            if cap:
                slope *= 1 - (logits / cap).square()
            if small > 1:
                slope /= small
            slope = F.pad(slope.to(dtype), (0, len(W) - V)) if len(W) > V else slope.to(dtype)  # (n, R)
            # What does not count is taken out of the small factors: another pass over the scores would take longer.
            if needs_x:
                to_x.append((slope @ W).to(x.dtype).masked_fill_(~counts, 0.0) * small)
            if needs_weight:
                to_weight.add_(slope.T @ part.masked_fill(~counts, 0.0), alpha=small)
            if needs_bias:
                to_bias.add_((counts.T.to(dtype) @ slope)[0], alpha=small)
        ctx.save_for_backward(torch.cat(to_x) if needs_x else None, to_weight, to_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor) -> tuple:
        """slope: of what the loss became a part of, by the loss."""
        return *(None if found is None else found * slope for found in ctx.saved_tensors), None, None, None
