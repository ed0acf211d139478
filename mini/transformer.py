"""The heart: attention, MLP, norms, positions, Block, and the stack of them that GPT and BERT share.

Letters of the shapes: B batch, T time (queries), S time (keys), C channels = d_model, H heads, K key/value
heads, D head size, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_later

from mini.config import ModelConfig

ACTIVATIONS = {
    "gelu": F.gelu,  # BERT: x Φ(x), with the exact erf (Hendrycks & Gimpel 2016)
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2: its tanh approximation
    "relu2": lambda x: F.relu(x) * F.relu(x),  # So et al. 2021, "Primer", §4
}


SMALL_HEADS = ("nsp", "classifier", "spans")  # names of heads with a few outputs, which are never compressed


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016), or RMSNorm: no mean, no bias (Zhang & Sennrich 2019)."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout (Srivastava et al. 2014): each value is zero with probability p, else times 1 / (1 - p).

    That factor is rounded to x's dtype, as in F.dropout. On a CPU, F.dropout takes most of its time for random numbers,
    one for each value. Here four values share one number of 64 bits: a quarter of the time (docs/log.md).
    """
    if p == 0.0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p) if p else x
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # each of -2^15 .. 2^15 - 1 equally likely
    return x * (bits >= round(p * 2**16) - 2**15).to(x.dtype).div_(1 - p)


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


# ---------------------------------------------------------------- positions
def sinusoids(length: int, channels: int) -> Tensor:
    """(length, channels) fixed position embeddings: sines, then cosines (Vaswani et al. 2017, §3.5)."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(0, channels, 2) / channels)
    angles = torch.arange(length)[:, None] * frequencies  # (length, channels / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :channels]


def rope_table(length: int, size: int, base: float) -> Tensor:
    """(2, length, D): for each position the cosines and the signed sines that rotate() uses (Su et al. 2021)."""
    frequencies = base ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(length)[:, None] * frequencies  # (length, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + D/2}) of x (B, T, H, D) by its position's angle; rope (2, 1 or B, T, 1, D).

    (a, b) -> (a cos - b sin, b cos + a sin), so that q·k depends on the distance of two positions only. With
    D = 4: (x0, x1, x2, x3) * (c0, c1, c0, c1) + (x2, x3, x0, x1) * (-s0, -s1, s0, s1).
    """
    cos, sin = rope.to(x.dtype)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


# ---------------------------------------------------------------- attention
def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """softmax(QKᵀ/√d + mask) V, as written (Vaswani et al. 2017, eq. 1).

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). mask: bool, broadcast to (B, H, T, S), True where a
    query may look; causal: query t looks at keys up to t. Use one or the other.
    """
    T, S = q.size(-2), k.size(-2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None:  # added, not filled in: 0 where allowed, -inf elsewhere, and a cheaper backward pass
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, float("-inf"))
    weights = drop(scores.softmax(dim=-1), dropout)  # (B, H, T, S), rows sum to 1
    return weights.to(v.dtype) @ v


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """The same in one call that never stores the (T, S) scores (FlashAttention, Dao et al. 2022)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)


def attend_fastest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """Whichever of the two is faster here.

    The fused call's CPU kernel gains nothing from bfloat16 units: forward and backward of (8, 6, 256, 64) take
    17 ms fused and 7 ms written out on two AVX512-BF16 cores (docs/log.md). Long texts would need to store too
    many scores.
    """
    bf16 = q.dtype == torch.bfloat16 or torch.is_autocast_enabled(q.device.type)
    small_on_cpu = q.device.type == "cpu" and bf16 and q.size(-2) * k.size(-2) <= 512 * 512
    return (attend_reference if small_on_cpu else attend_fused)(q, k, v, mask, causal, dropout)


ATTENTION = {"reference": attend_reference, "fused": attend_fused, "auto": attend_fastest}


class KVCache:
    """The keys and values of all tokens so far, so that a new token costs one token's work.

    keys, values: for each layer (B, K, S, D). Row b's token at position p lies in slot p; slots past a row's
    position hold nothing of use and are masked.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        heads = [config.n_kv_heads or h for h in config.layers("n_heads")]
        shapes = [(batch, h, length, config.head_size) for h in heads]
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.length = length  # slots that attention looks at; generate() keeps it as short as it can

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, K, T, D) of the tokens at positions (B, T); returns all slots in use."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]  # (B, 1)
        keys, values = self.keys[layer], self.values[layer]
        keys[rows, :, positions] = k.transpose(1, 2).to(keys.dtype)  # (B, T, K, D) at (row, :, position)
        values[rows, :, positions] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, : self.length], values[:, :, : self.length]


class Linear(nn.Linear):
    """y = xWᵀ + b. In a compiled CPU step of a single token, written as a sum that is fused with its surroundings.

    The library is slow at one bfloat16 row: with this, a 14 M model's step takes 1.1 ms instead of 1.8 (docs/log.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.size(-1):
            y = (self.weight.float() * x.float().flatten()).sum(dim=-1)  # (out, in) * (in) -> (out)
            y = y if self.bias is None else y + self.bias.float()
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention; with n_kv_heads, grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_heads = config.layers("n_heads")[layer]
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        self.head_size = config.head_size
        self.causal = config.causal
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout
        self.attend = ATTENTION[config.attention]
        width = (self.n_heads + 2 * self.n_kv_heads) * self.head_size
        self.qkv = Linear(config.d_model, width, bias=config.bias)  # rows: queries, keys, values
        self.out = Linear(self.n_heads * self.head_size, config.d_model, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rope: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, x are the tokens at positions (B, T), mask (B, 1, T, S)."""
        B, T, _ = x.shape
        H, K, D = self.n_heads, self.n_kv_heads, self.head_size
        qk, v = self.qkv(x).split([(H + K) * D, K * D], dim=-1)
        qk = qk.view(B, T, H + K, D)  # queries and keys are treated alike until their product
        if self.qk_norm:  # Henry et al. 2020, here without learned scales
            qk = F.rms_norm(qk, (D,))
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.transpose(1, 2).split([H, K], dim=1)  # (B, H, T, D), (B, K, T, D)
        v = v.view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)  # (B, K, S, D)
        if K < H:  # each key/value head serves H / K query heads
            k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)  # (B, H, S, D)
        causal = self.causal and mask is None
        y = self.attend(q, k, v, mask, causal, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


class MLP(nn.Module):
    """W₂ f(W₁ x + b₁) + b₂; SwiGLU: W₂ (silu(W_g x) · W₁ x) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        d_ff = config.ff_sizes[layer]
        self.gate = Linear(config.d_model, d_ff, bias=config.bias) if config.activation == "swiglu" else None
        self.up = Linear(config.d_model, d_ff, bias=config.bias)
        self.down = Linear(d_ff, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS.get(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)  # (B, T, d_ff)
        h = F.silu(self.gate(x)) * h if self.gate is not None else self.activation(h)
        return self.down(h)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.pre_norm = config.norm_place == "pre"
        self.attention = Attention(config, layer)
        self.norm1 = make_norm(config)
        self.mlp = MLP(config, layer)
        self.norm2 = make_norm(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rope: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); the rest as Attention takes it."""
        if self.pre_norm:  # GPT-2: a clean residual path from embedding to head
            x = x + self.dropout(self.attention(self.norm1(x), mask, rope, positions, cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        # BERT and the original Transformer: the norm stands on the residual path
        x = self.norm1(x + self.dropout(self.attention(x, mask, rope, positions, cache)))
        return self.norm2(x + self.dropout(self.mlp(x)))


# ---------------------------------------------------------------- the stack
class Transformer(nn.Module):
    """Tokens in, hidden states out: embeddings, blocks, and with pre-norm a last norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, m = config.d_model, config.vocab_multiple
        self.tokens = nn.Embedding((config.vocab_size + m - 1) // m * m, C)
        self.positions = nn.Embedding(config.max_len, C) if config.positions == "learned" else None
        self.segments = nn.Embedding(config.n_segments, C) if config.n_segments else None
        if config.positions == "sinusoidal":
            self.register_buffer("sinusoids", sinusoids(config.max_len, C), persistent=False)
        if config.positions == "rope":
            table = rope_table(config.max_len, config.head_size, config.rope_base)
            self.register_buffer("rope", table, persistent=False)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        # Post-norm normalises the embedding instead, since its blocks end in a norm.
        self.norm = make_norm(config)
        self.checkpoint_activations = False
        self.apply(init_weights)
        # GPT-2 keeps the variance of its residual stream independent of depth; BERT's norms do that for it.
        scale = (2 * config.n_layers) ** -0.5 if config.norm_place == "pre" else 1.0
        for block in self.blocks:
            for linear in (block.attention.out, block.mlp.down):
                with torch.no_grad():
                    linear.weight.mul_(0.0 if config.zero_init else scale)

    def forward(self, tokens: Tensor, padding: Tensor | None = None, positions: Tensor | None = None,
                cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:  # fmt: skip
        """tokens (B, T) int64 -> (B, T, C).

        segments (B, T): the text each token belongs to, 0 for all if it is not given.
        padding (B, T): True where a token is real; a decoder pads at the right, where no real token looks.
        positions (B, T) and cache: the tokens' places and the ones before them, for generation.
        """
        T = tokens.size(1)
        if T > self.config.max_len:
            raise ValueError(f"{T} tokens are more than the model's max_len of {self.config.max_len}")
        x = self.tokens(tokens)  # (B, T, C)
        places = slice(T) if positions is None else positions
        if self.positions is not None:
            x = x + self.positions.weight[places]
        elif self.config.positions == "sinusoidal":
            x = x + self.sinusoids[places].to(x.dtype)
        if self.segments is not None:
            x = x + (self.segments.weight[0] if segments is None else self.segments(segments))
        if self.config.norm_place == "post":
            x = self.norm(x)
        x = self.dropout(x)

        rope = None
        if self.config.positions == "rope":
            rope = self.rope[:, places].unsqueeze(-2)  # (2, T, 1, D) or (2, B, T, 1, D)
        mask = None
        if cache is not None:  # (B, 1, T, S): a token sees the slots up to its own
            slots = torch.arange(cache.length, device=tokens.device)
            mask = (slots <= positions[:, :, None])[:, None]
        elif padding is not None and not self.config.causal:
            mask = padding[:, None, None, :]  # (B, 1, 1, S): nobody looks at padding
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = recompute_later(block, x, mask, rope, positions, cache, use_reentrant=False)
            else:
                x = block(x, mask, rope, positions, cache)
        return self.norm(x) if self.config.norm_place == "pre" else x


def vocabulary_logits(scores: Tensor, config: ModelConfig) -> Tensor:
    """(..., rows of the embedding) -> (..., V): without the rows of vocab_multiple; capped if so configured."""
    scores = scores[..., : config.vocab_size]
    return config.logit_softcap * torch.tanh(scores / config.logit_softcap) if config.logit_softcap else scores


def init_weights(module: nn.Module) -> None:
    """N(0, 0.02), biases zero (Radford et al. 2018; Devlin et al. 2019)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
