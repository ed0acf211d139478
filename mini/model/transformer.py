"""The heart: positions, attention, MLP, Block, and the stack of them that GPT and BERT share.

Shapes: B batch, T time (queries), S time (keys), C channels, H heads, K key/value heads, D head size, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_later

from mini.model.attention import ATTENTION, KVCache, View
from mini.model.config import ModelConfig
from mini.model.layers import Dropout, Embedding, Linear, linear_flops, make_norm, residual_std
from mini.model.lstm import LSTM
from mini.model.scores import Unscored, capped

# A function, or a class of modules for one with parameters of its own.
ACTIVATIONS = {
    "gelu": F.gelu,  # BERT: x Φ(x), with the exact erf (Hendrycks & Gimpel 2016)
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2: its tanh approximation
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, "Primer", §4
    "swiglu": F.silu,  # of the gate (Shazeer 2020)
    "geglu": F.gelu,  # the same
}


def make_activation(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    found = ACTIVATIONS[config.activation]
    return found() if isinstance(found, type) else found


def draw(weight: nn.Parameter, name: str, seed: int, std: float) -> None:
    """N(0, std) from (seed, name)."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    nn.init.normal_(weight, std=std, generator=generator)


# ---------------------------------------------------------------- positions
def sinusoids(length: int, channels: int) -> Tensor:
    """(length, channels) fixed position embeddings: sines, then cosines (Vaswani et al. 2017, §3.5)."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(0, channels, 2) / channels)
    angles = torch.arange(length)[:, None] * frequencies  # (length, channels / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :channels]


def rope_at(positions: Tensor, size: int, base: float) -> Tensor:
    """(..) places -> (2, .., D): the cosines and the signed sines that rotate() uses (Su et al. 2021)."""
    frequencies = base ** (-torch.arange(0, size, 2, device=positions.device) / size)
    angles = positions[..., None] * frequencies  # (.., D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + D/2}) of x (B, T, H, D) by its position's angle; rope (2, 1 or B, T, 1, D).

    (a, b) -> (a cos - b sin, b cos + a sin), so that q·k depends on the distance of two positions only. With
    D = 4: (x0, x1, x2, x3) * (c0, c1, c0, c1) + (x2, x3, x0, x1) * (-s0, -s1, s0, s1).
    """
    cos, sin = rope.to(x.dtype)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


# ---------------------------------------------------------------- the parts of a block
class Attention(nn.Module):
    """Multi-head self-attention; with n_kv_heads, grouped-query attention (Ainslie et al. 2023)."""

    joint = "out"  # where what its heads compute is joined

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_heads = config.layers("n_heads")[layer]
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        self.head_size = config.head_size
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout
        self.attend = ATTENTION[config.attention]
        self.causal, self.window, self.n_global = config.causal, config.layers("window")[layer], config.n_global
        self.rope_base = config.layers("rope_base")[layer] if config.positions == "rope" else None
        rows = [heads * self.head_size for heads in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
        self.qkv = Linear(config.d_model, sum(rows), bias=config.bias, parts=rows)  # queries, keys, values
        self.out = Linear(self.n_heads * self.head_size, config.d_model, bias=config.bias, std=residual_std(config))
        self.values = Embedding(config.n_rows, rows[2]) if config.value_embeddings else None

    def forward(self, x: Tensor, tokens: Tensor, view: View, rope: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, C), the states of tokens (B, T) -> (B, T, C). With a cache, they are prompts, or at view.places."""
        B, T, _ = x.shape
        H, K, D = self.n_heads, self.n_kv_heads, self.head_size
        qk, v = self.qkv(x).split([(H + K) * D, K * D], dim=-1)
        qk = qk.view(B, T, H + K, D)  # queries and keys are treated alike until their product
        if self.qk_norm:  # Henry et al. 2020, here without learned scales
            qk = F.rms_norm(qk, (D,))
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.transpose(1, 2).split([H, K], dim=1)  # (B, H, T, D), (B, K, T, D)
        if self.values is not None:  # parameters without arithmetic (Zhou et al. 2024; Jordan et al. 2024, NanoGPT)
            v = v + self.values(tokens).to(v.dtype)  # (B, T, K D)
        v = v.view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
        if cache is not None and view.places is None:
            cache.fill(self.layer, view.real.sum(dim=1), k, v)
        elif cache is not None:
            k, v = cache.update(self.layer, view.places, k, v)  # (B, K, S, D)
        if K < H:  # each key/value head serves H / K query heads
            k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)  # (B, H, S, D)
        y = self.attend(q, k, v, view, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))

    def flops(self, length: int) -> float:
        """Beside its linear layers: QKᵀ, and the weighted sum of V, of the keys that a query sees."""
        near = self.window * (1 if self.causal else 2) + 1 + self.n_global if self.window else length
        return 4.0 * min(near, length) * self.n_heads * self.head_size

    def units(self) -> dict[str, tuple[int, Tensor]]:
        """What belongs to each head: {name of a tensor: (dimension, (H, n) places in it)}, all that H decides."""
        D, H = self.head_size, self.n_heads
        if self.n_kv_heads != H:
            raise ValueError("these heads share keys and values: none can go alone")
        places = torch.arange(H * D).view(H, D)
        rows = torch.cat([places, places + H * D, places + 2 * H * D], dim=1)  # of queries, keys and values
        columns = dict.fromkeys(("out.weight", "values.weight"), (1, places))
        return {"qkv.weight": (0, rows), "qkv.bias": (0, rows), **columns}


class MLP(nn.Module):
    """W₂ f(W₁ x + b₁) + b₂; with a gate W₂ (f(W_g x) · W₁ x) (Shazeer 2020)."""

    joint = "down"

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        d_ff = config.layers("d_ff")[layer]
        self.gate = Linear(config.d_model, d_ff, bias=config.bias) if config.gated else None
        self.up = Linear(config.d_model, d_ff, bias=config.bias)
        self.down = Linear(d_ff, config.d_model, bias=config.bias, std=residual_std(config))
        self.activation = make_activation(config)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)  # (B, T, d_ff)
        h = self.activation(self.gate(x)) * h if self.gate is not None else self.activation(h)
        return self.down(h)

    def units(self) -> dict[str, tuple[int, Tensor]]:
        """What belongs to each neuron, as Attention.units() says it of heads."""
        places = torch.arange(self.up.out_features)[:, None]
        rows = {f"{linear}.{name}": (0, places) for linear in ("up", "gate") for name in ("weight", "bias")}
        return rows | {"down.weight": (1, places)}


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    role = "hidden"  # of its matrices, to an optimizer

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.pre_norm = config.norm_place == "pre"
        self.attention = Attention(config, layer)
        self.norm1 = nn.Identity() if config.embed_norm and layer == 0 else make_norm(config)
        self.mlp = MLP(config, layer)
        self.norm2 = make_norm(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, tokens: Tensor, view: View, rope: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C); the rest as Attention takes it."""
        if self.pre_norm:  # GPT-2: a clean residual path from embedding to head
            x = x + self.dropout(self.attention(self.norm1(x), tokens, view, rope, cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        # BERT and the original Transformer: the norm stands on the residual path
        x = self.norm1(x + self.dropout(self.attention(x, tokens, view, rope, cache)))
        return self.norm2(x + self.dropout(self.mlp(x)))

    @property
    def window(self) -> int:
        return self.attention.window

    @property
    def rope_base(self) -> float | None:
        return self.attention.rope_base

    def flops(self, length: int) -> float:
        """Forward, for one token among `length`: of linear layers, and of modules that have arithmetic beside them."""
        own = [module.flops for module in self.modules() if module is not self and hasattr(module, "flops")]
        return linear_flops(self) + sum(flops(length) for flops in own)


BLOCKS = {"transformer": Block, "lstm": LSTM}


# ---------------------------------------------------------------- the stack
class Transformer(nn.Module):
    """Tokens in, hidden states out: embeddings, blocks, and with pre-norm a last norm."""

    role = "embedding"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C = config.d_model
        self.tokens = Embedding(config.n_rows, C)
        self.positions = nn.Embedding(config.max_len, C) if config.positions == "learned" else None
        self.segments = nn.Embedding(config.n_segments, C) if config.n_segments else None
        if config.positions == "sinusoidal":
            self.register_buffer("sinusoids", sinusoids(config.max_len, C), persistent=False)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(BLOCKS[config.block](config, layer) for layer in range(config.n_layers))
        # Post-norm normalises the embedding instead, since its blocks end in a norm; ModernBERT both.
        self.norm = make_norm(config)
        self.embed_norm = make_norm(config) if config.embed_norm else None
        self.checkpoint_activations = False

    def forward(self, tokens: Tensor, real: Tensor | None = None, segments: Tensor | None = None,
                documents: Tensor | None = None, cache: KVCache | None = None,
                places: Tensor | None = None) -> Tensor:  # fmt: skip
        """tokens (B, T) int64 -> (B, T, C).

        real (B, T): True where a token is real; a decoder pads at the right.
        segments (B, T): the text each token belongs to, 0 for all if it is not given.
        documents (B, T): the number of the document each token is of; none looks into another, or counts from there.
        cache: keeps what the tokens are to those that follow: prompts first; then one token each, at places (B, 1).
        """
        c, T = self.config, tokens.size(1)
        if T > c.max_len and not c.endless:
            raise ValueError(f"{T} tokens are more than the model's max_len of {c.max_len}")
        at = torch.arange(T, device=tokens.device) if places is None else places  # (T,) or (B, 1)
        if documents is not None:  # positions begin anew in each
            begins = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0  # (B, T)
            at = at - torch.where(begins, at, 0).cummax(dim=1).values  # (B, T)
        x = self.tokens(tokens).to(self.norm.weight.dtype)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[at]
        elif c.positions == "sinusoidal":
            x = x + self.sinusoids[at].to(x.dtype)
        if self.segments is not None:
            x = x + (self.segments.weight[0] if segments is None else self.segments(segments))
        if c.norm_place == "post":
            x = self.norm(x)
        elif self.embed_norm is not None:
            x = self.embed_norm(x)
        x = self.dropout(x)

        twice = self.checkpoint_activations and self.training
        keeps = not (twice and torch.compiler.is_compiling())
        views, ropes = {}, {None: None}  # layers of one kind share theirs
        for block in self.blocks:
            if block.window not in views:
                views[block.window] = View(c.causal, real, block.window, c.n_global, documents, places, keeps=keeps)
            if block.rope_base not in ropes:
                ropes[block.rope_base] = rope_at(at, c.head_size, block.rope_base).unsqueeze(-2)  # (2, [B,] T, 1, D)
        for block in self.blocks:
            rest = tokens, views[block.window], ropes[block.rope_base], cache
            if twice:
                x = recompute_later(block, x, *rest, use_reentrant=False)
            else:
                x = block(x, *rest)
        return self.norm(x) if c.norm_place == "pre" else x

    def flops(self, length: int) -> float:
        """Multiply-adds × 2 of a forward pass for one token among `length`.

        The causal half of the attention is not taken off (Chowdhery et al. 2022, "PaLM", appendix B).
        """
        return sum(block.flops(length) for block in self.blocks)


class Model(nn.Module):
    """What a GPT and a BERT share beside the stack; fresh weights follow torch.manual_seed and their names. Each has

    answers(inputs, in_parts)   {name: logits (.., V)} of its heads for a batch's inputs, first those it is judged by;
                                in_parts: those over a vocabulary may be Unscored, for token_loss() alone
    flops(length, predicted)    of a forward pass for one token of `length`, of which a share meets the vocabulary
    """

    kind: str  # the name of its kind in run folders
    special_tokens: tuple[str, ...] = ()  # that it needs beside text
    role = "head"
    loss_weights: ClassVar[dict[str, float]] = {}  # of its extra_losses(); 1 for others

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.stack = Transformer(config)
        self.learning = nn.ModuleDict()  # what exists only while it learns: in checkpoints, but never served
        self.rates: dict[str, float] = {}  # what share of its learning rate a parameter has, if not all

    def initialise(self) -> None:
        """Matrices N(0, 0.02) unless they say otherwise, biases zero (Radford et al. 2018; Devlin et al. 2019).

        A weight's values are drawn from (seed, its name) alone: one layer or head more leaves all others as they were,
        so that two arms of an ablation differ in nothing else.
        """
        done = set()  # a tied matrix has the name, and the values, of its first place
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.is_meta:
                continue
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if module.weight not in done:
                done.add(module.weight)
                draw(module.weight, f"{name}.weight", torch.initial_seed(), getattr(module, "std", 0.02))

    def end_learning(self) -> None:
        """What existed only while it learnt goes, once what it has learnt for the model is in the model."""
        for module in self.learning.values():
            if hasattr(module, "end_learning"):
                module.end_learning(self)
        self.learning = nn.ModuleDict()

    def freeze_unused(self) -> None:
        """Parameters on which no answer depends do not learn: ranks would wait for their gradients."""

    def extra_losses(self) -> dict[str, Tensor]:
        """{name: sum over real tokens} of what modules ask for in the last forward pass, whatever the task."""
        return {}

    def answer(self, inputs: dict[str, Tensor]) -> Tensor:
        """The logits that its task is judged by."""
        return next(iter(self.answers(inputs).values()))

    def vocabulary(self, scores: Tensor) -> Tensor:
        """(..., rows of the embedding) -> logits (..., V): without the rows of vocab_multiple; capped if configured."""
        return capped(scores[..., : self.config.vocab_size], self.config.logit_softcap)

    def unscored(self, hidden: Tensor, head: Linear) -> Tensor | Unscored:
        """hidden (.., C) -> logits (.., V), yet to be computed.

        They are, where the head has arithmetic of its own (int8), or a hook looks at what it is given.
        """
        if type(head) is not Linear or head._forward_hooks or head._forward_pre_hooks:
            return self.vocabulary(head(hidden))
        return Unscored(hidden, head, self.config.vocab_size, self.config.logit_softcap)

    def store(self, dtype: torch.dtype) -> Self:
        """Matrices and tables in dtype, while all else, and all arithmetic, stays as it is.

        Worth it for single tokens, compiled: what takes their time is to read the weights, of which bfloat16 has half.
        """
        for module in self.modules():
            if isinstance(module, Linear | Embedding):
                module.weight.data = module.weight.data.to(dtype)
        return self

    def vocabulary_weights(self) -> set[nn.Parameter]:
        """The parameters that have a row for each token."""
        return {module.weight for module in self.modules() if getattr(module, "by_token", False)}

    def num_params(self) -> int:
        """Parameters that are served, without the rows that vocab_multiple adds."""
        total = sum(p.numel() for name, p in self.named_parameters() if not name.startswith("learning."))
        return total - sum((len(p) - self.config.vocab_size) * p.shape[1:].numel() for p in self.vocabulary_weights())


def real_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """(B, T): True up to a row's length, False in the padding behind it."""
    return torch.arange(tokens.size(1), device=tokens.device) < lengths[:, None]


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """(B, T, C) and positions (B, M) -> (B, M, C)."""
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.size(-1)))
