"""The layers that everything is built of: norms, dropout, matrices and tables."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini.model.attention import drop
from mini.model.config import ModelConfig


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016), or RMSNorm: no mean, no bias (Zhang & Sennrich 2019)."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class LayerNorm(nn.LayerNorm):
    """Its gain and bias may be shorter than what it normalises, as where shard.py gathers them in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else as_long(self.bias, x)
        return F.layer_norm(x, self.normalized_shape, as_long(self.weight, x), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """So may this one's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, as_long(self.weight, x), self.eps)


def as_long(parameter: Tensor, x: Tensor) -> Tensor:
    """In a dtype that holds both."""
    return parameter.to(torch.promote_types(parameter.dtype, x.dtype))


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


class Linear(nn.Linear):
    """y = xWᵀ + b, for all matrices that compression and Muon treat. (A head with a few outputs is an nn.Linear.)

    parts: the rows of each of several matrices that are stored as one. std: of the first values.
    In a compiled CPU step of a single token the product is written as a sum that is fused with its surroundings, as
    the library is slow at one bfloat16 row (docs/log.md).
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, parts: list[int] | None = None,
                 std: float = 0.02, **options):  # fmt: skip
        super().__init__(inputs, outputs, bias, **options)
        self.parts, self.std = parts or [outputs], std

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.size(-1):
            y = (self.weight.float() * x.float().flatten()).sum(dim=-1)  # (out, in) * (in) -> (out)
            y = y if self.bias is None else y + self.bias.float()
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        stored_short = self.weight.dtype == torch.bfloat16 and x.dtype == torch.float32  # by Model.store
        return F.linear(x, self.weight.float(), self.bias) if stored_short else super().forward(x)


class Embedding(nn.Embedding):
    """A table looked up by token, which compression treats like a matrix. (Positions and segments: nn.Embedding.)"""

    role = "embedding"
    by_token = True


def linear_flops(module: nn.Module) -> float:
    """Multiply-adds × 2 of all linear layers in a module, for one token."""
    return sum(2.0 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def residual_std(config: ModelConfig) -> float:
    """Of a matrix that adds to the residual stream: GPT-2 keeps its variance independent of depth, BERT's norms do."""
    if config.zero_init:
        return 0.0
    return 0.02 * (2 * config.n_layers) ** -0.5 if config.norm_place == "pre" else 0.02
