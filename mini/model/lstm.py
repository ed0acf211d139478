"""What the transformer replaced: a long short-term memory in the place of a block's attention and MLP."""

import contextlib

import torch
from torch import Tensor, nn

from mini.model.attention import KVCache, View
from mini.model.config import ModelConfig
from mini.model.layers import Dropout, Linear, linear_flops, make_norm


class LSTM(nn.Module):
    """A layer with d_model memory cells (Hochreiter & Schmidhuber 1997; with forget gates, Gers et al. 2000):

        i, f, g, o = split(W x_t + b + R h_{t-1})
        c_t = σ(f + 1) c_{t-1} + σ(i) tanh(g)
        h_t = σ(o) tanh(c_t)

    h_0 = c_0 = 0; with f + 1 it begins by remembering (Jozefowicz et al. 2015, §2.2). Its norm and residual connection
    are those of Block, so that it trains as well when it is deep.
    """

    role = "hidden"  # of its matrices, to an optimizer
    window, rope_base = 0, None  # it looks at nothing

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C = config.d_model
        self.layer = layer
        self.pre_norm = config.norm_place == "pre"
        self.norm = nn.Identity() if config.embed_norm and layer == 0 else make_norm(config)
        options = dict(parts=[C] * 4, std=(3 * C) ** -0.5)  # of U(-C^-½, C^-½), which is usual
        self.read = Linear(C, 4 * C, bias=config.bias, **options)  # W, b
        self.recur = Linear(C, 4 * C, bias=False, **options)  # R
        self.dropout = Dropout(config.dropout)
        self.register_buffer("remember", torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(C), persistent=False)

    def forward(self, x: Tensor, tokens: Tensor, view: View, rope: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, they are prompts, which view.real ends, or one more token each."""
        y = self.norm(x) if self.pre_norm else x
        y = self.fused(y) if cache is None and self.can_fuse() else self.written(y, view, cache)
        y = x + self.dropout(y)
        return y if self.pre_norm else self.norm(y)

    def written(self, x: Tensor, view: View, cache: KVCache | None) -> Tensor:
        """As above, step by step."""
        B, T, C = x.shape
        read = self.read(x) + self.remember  # (B, T, 4 C)
        h = c = x.new_zeros(B, C)
        if cache is not None and view.places is not None:
            h, c = (kept[self.layer][:, 0, 0].to(x.dtype) for kept in (cache.keys, cache.values))
        states = []
        for t in range(T):
            i, f, g, o = (read[:, t] + self.recur(h)).chunk(4, dim=-1)  # (B, C) each
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new_h = o.sigmoid() * new_c.tanh()
            states.append(new_h)
            if cache is not None and view.places is None:  # a prompt's state is that of its last real token
                going_on = view.real[:, t, None]
                new_h, new_c = torch.where(going_on, new_h, h), torch.where(going_on, new_c, c)
            h, c = new_h, new_c
        if cache is not None:
            cache.keys[self.layer][:, 0, 0], cache.values[self.layer][:, 0, 0] = h, c
        return torch.stack(states, dim=1)

    def can_fuse(self) -> bool:
        """Not where its matrices are int8, or watched: these want to be called."""
        return all(type(m) is Linear and not m._forward_hooks for m in (self.read, self.recur))

    @torch.compiler.disable  # compiled, its steps would be written out one by one
    def fused(self, x: Tensor) -> Tensor:
        """The same in one call, which autocast on a GPU would make float16, whatever its dtype."""
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        zeros = x.new_zeros(1, len(x), x.size(-1))
        bias = self.remember if self.read.bias is None else self.read.bias + self.remember
        weights = [w.to(x.dtype) for w in (self.read.weight, self.recur.weight, bias, torch.zeros_like(bias))]
        with torch.autocast("cuda", enabled=False) if x.is_cuda else contextlib.nullcontext():
            return torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)[0]

    def flops(self, length: int) -> float:
        """Forward, for one token."""
        return linear_flops(self)
