"""Who sees whom, and the ways to compute it: as written, in one fused call, and near by, at a cost linear in the text.

Shapes: B batch, H heads, K key/value heads, T time (queries), S time (keys), D head size; N blocks of W queries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mini.model.config import ModelConfig

BLOCK = 64  # queries that are looked at together: fewer waste the processor, more look at more keys than they see


# ---------------------------------------------------------------- who sees whom
@dataclass
class View:
    """What each query of a layer may look at: decided in sees(), for every attention and whatever compares two."""

    causal: bool
    real: Tensor | None = None  # (B, T): True where a token is real; None: all are. A decoder pads at the right
    window: int = 0  # a query sees as many tokens to each side, if causal back; 0: all
    n_global: int = 0  # the first tokens of a row see all, and all see them (Beltagy et al. 2020, "Longformer", §3.1)
    documents: Tensor | None = None  # (B, T): the number of a token's document, beyond which it does not look
    places: Tensor | None = None  # (B, 1): with a cache, the place of each row's one query
    masks: dict = field(default_factory=dict)  # of this pass, each made once
    keeps: bool = True  # masks; a compiled block that is computed twice may change nothing outside

    def sees(self, t: Tensor, s: Tensor, length: int) -> Tensor:
        """Places of queries t (.., T) and keys s (.., S) in rows of a length -> (1 or B, .., T, S): whether t sees s.

        Everything sees itself, so that padding, whose output nobody uses, has something to look at.
        """
        t, s = t[..., :, None], s[..., None, :]
        seen = (s >= 0) & (s <= t) if self.causal else (s >= 0) & (s < length)
        if self.window:
            near = (t - s).abs() <= self.window
            seen = seen & (near | (t < self.n_global) | (s < self.n_global))
        if self.documents is None and (self.real is None or self.causal):  # no causal query looks at padding behind it
            return ((s == t) | seen)[None]
        inside_t, inside_s = t.clamp(0, length - 1), s.clamp(0, length - 1)
        if self.documents is not None:
            seen = seen & (self.documents[:, inside_t] == self.documents[:, inside_s])
        if self.real is not None and not self.causal:
            seen = seen & self.real[:, inside_s]
        return (s == t) | seen

    def only_causal(self, T: int) -> bool:
        """Whether a query sees just the keys up to itself: what the fused call does without a mask."""
        return self.causal and self.places is None and self.documents is None and not self.is_local(T)

    def is_local(self, T: int) -> bool:
        return 0 < self.window < T - 1

    @property
    def neighbours(self) -> tuple[int, int]:
        """How many blocks before a query's own, and behind it, have keys in its window."""
        n = -(-self.window // BLOCK)
        return n, 0 if self.causal else n

    def pays_in_blocks(self, T: int, S: int) -> bool:
        """Whether a block's queries are held against so few keys that it is worth the copies (docs/log.md)."""
        near = (1 + sum(self.neighbours)) * BLOCK + self.n_global
        return T == S and self.is_local(T) and 2 * near <= T

    def mask(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """sees() of whole rows, (1 or B, 1, 1 or T, S); None where all see all. With a cache the keys are its slots."""

        def make() -> Tensor | None:
            if self.places is not None:  # slot j of S holds the newest token whose place is j modulo S
                s = self.places - (self.places - torch.arange(S, device=device)) % S  # (B, S); below 0: nothing yet
                return self.sees(self.places, s, S)[0][:, None]  # (B, 1, S) -> (B, 1, 1, S)
            if self.causal or self.documents is not None or self.is_local(T):
                return self.sees(torch.arange(T, device=device), torch.arange(S, device=device), S)[:, None]
            return None if self.real is None else self.real[:, None, None, :]  # nobody looks at padding

        return self.once((T, S), make)

    def near_mask(self, T: int, device: torch.device) -> Tensor:
        """sees() of N blocks of W queries, each of the global keys and those of the blocks it looks at:
        (1 or B, N, W, n_global + S). A key that is global and near counts as global alone."""

        def make() -> Tensor:
            W, g, (before, after) = BLOCK, min(self.n_global, T), self.neighbours
            N = -(-T // W)
            places = torch.arange(N * W, device=device).view(N, W)
            near = places[:, :1] - before * W + torch.arange((before + 1 + after) * W, device=device)  # (N, S)
            first = torch.arange(g, device=device).expand(N, g)
            seen = self.sees(places, near, T) & (near >= g)[:, None]  # (1 or B, N, W, S)
            return torch.cat([self.sees(places, first, T), seen], dim=-1)

        return self.once(("near", T), make)

    def once(self, name: tuple, make: Callable[[], Tensor | None]) -> Tensor | None:
        """The mask of this name, for all layers."""
        if name in self.masks:
            return self.masks[name]
        mask = make()
        if self.keeps:
            self.masks[name] = mask
        return mask


# ---------------------------------------------------------------- as written, and fused
def drop(x: Tensor, p: float) -> Tensor:
    """Dropout (Srivastava et al. 2014): each value is zero with probability p, else times 1 / (1 - p).

    F.dropout takes most of its time on a CPU for random numbers; here four values share one of 64 bits (docs/log.md).
    """
    if p == 0.0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p) if p else x
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # each of -2^15 .. 2^15 - 1 equally likely
    return x * (bits >= round(p * 2**16) - 2**15).to(x.dtype).div_(1 - p)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, view: View, dropout: float) -> Tensor:
    """softmax(QKᵀ/√d + mask) V, as written (Vaswani et al. 2017, eq. 1): q (B, H, T, D), k, v (B, H, S, D) -> as q."""
    return written(q, k, v, view.mask(q.size(-2), k.size(-2), q.device), dropout)


def written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)  # (B, H, T, S)
    if mask is not None:  # added, not filled in: 0 where allowed, -inf elsewhere, and a cheaper backward pass
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, float("-inf"))
    weights = drop(scores.softmax(dim=-1), dropout)  # (B, H, T, S), rows sum to 1
    return weights.to(v.dtype) @ v


def attend_fused(q: Tensor, k: Tensor, v: Tensor, view: View, dropout: float) -> Tensor:
    """The same in one call that never stores the (T, S) scores (FlashAttention, Dao et al. 2022).

    A local layer goes in blocks, each in whichever way is faster. A layer that sees all of several documents holds a
    mask of (T, S) truth values.
    """
    if view.pays_in_blocks(q.size(-2), k.size(-2)):
        return attend_local(q, k, v, view, dropout)
    causal = view.only_causal(q.size(-2))
    mask = None if causal else view.mask(q.size(-2), k.size(-2), q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)


def attend_fastest(q: Tensor, k: Tensor, v: Tensor, view: View, dropout: float) -> Tensor:
    """Whichever of these is faster here."""
    written_out = written_is_faster(q, k) and not view.pays_in_blocks(q.size(-2), k.size(-2))
    return (attend_reference if written_out else attend_fused)(q, k, v, view, dropout)


def written_is_faster(q: Tensor, k: Tensor) -> bool:
    """The fused call's CPU kernel gains nothing from bfloat16 units (docs/log.md); but it stores no scores."""
    bf16 = q.dtype == torch.bfloat16 or torch.is_autocast_enabled(q.device.type)
    return q.device.type == "cpu" and bf16 and q.size(-2) * k.size(-2) <= 512 * 512


ATTENTION = {"reference": attend_reference, "fused": attend_fused, "auto": attend_fastest}


# ---------------------------------------------------------------- near by
def attend_local(q: Tensor, k: Tensor, v: Tensor, view: View, dropout: float) -> Tensor:
    """Blocks of W queries, each against the blocks of keys that its window reaches, and the global ones.

    No tensor is as large as (T, T): cost and memory grow as T (window + n_global).
    """
    B, H, T, D = q.shape
    W, g, (before, after) = BLOCK, min(view.n_global, T), view.neighbours
    N, S = -(-T // W), (before + 1 + after) * W
    mask = view.near_mask(T, q.device).expand(B, N, W, g + S).reshape(B * N, 1, W, g + S)
    n = before + N + after  # blocks of a row and head, those of padding at both ends included
    row, block = torch.arange(B * H, device=q.device), torch.arange(n, device=q.device)
    looked_at = row.view(B, 1, H, 1) * n + block[:N, None, None] + block[: S // W]  # (B, N, H, S / W): their numbers

    def blocks(x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, N, H, S, D): for each block the keys that it is held against, the global ones first."""
        table = F.pad(x, (0, 0, before * W, (N + after) * W - T)).view(B * H * n, W * D)
        found = F.embedding(looked_at, table).view(B, N, H, S, D)  # backward: whole blocks added up
        return torch.cat([x[:, None, :, :g].expand(B, N, H, g, D), found], dim=3) if g else found

    queries = F.pad(q, (0, 0, 0, N * W - T)).view(B, H, N, W, D).transpose(1, 2)  # (B, N, H, W, D)
    queries, keys, values = (x.reshape(B * N, H, -1, D) for x in (queries, blocks(k), blocks(v)))
    y = masked(queries, keys, values, mask, dropout).view(B, N, H, W, D)
    y = y.transpose(1, 2).reshape(B, H, N * W, D)[:, :, :T]
    if g:
        places = torch.arange(T, device=q.device)
        mask = view.sees(places[:g], places, T)[:, None]  # (1 or B, 1, g, T)
        y = torch.cat([masked(q[:, :, :g], k, v, mask, dropout), y[:, :, g:]], dim=2)
    return y


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    if written_is_faster(q, k):
        return written(q, k, v, mask, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


# ---------------------------------------------------------------- with the tokens before kept
class KVCache:
    """The keys and values of earlier tokens, so that a new token costs one token's work.

    keys, values: for each layer (B, K, S, D). Row b's token at place p lies in slot p modulo S, where S is, with a
    window, no more than a query sees: so that a token costs the same however long the text has become. Of an LSTM they
    are its h and c.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        heads = [config.n_kv_heads or h for h in config.layers("n_heads")]
        slots = [min(length, window + 1 if window else length) for window in config.layers("window")]
        shapes = [(batch, h, n, config.head_size) for h, n in zip(heads, slots, strict=True)]
        if config.block == "lstm":
            shapes = [(batch, 1, 1, config.d_model)] * config.n_layers
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.length = length  # slots that attention looks at, at most; generate() keeps it as short as it can

    def update(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, K, 1, D) of the tokens at places (B, 1); returns what they may look at."""
        keys, values = self.keys[layer], self.values[layer]
        rows, slots = torch.arange(k.size(0), device=k.device)[:, None], places % keys.size(2)  # (B, 1)
        keys[rows, :, slots] = k.transpose(1, 2).to(keys.dtype)  # (B, 1, K, D) at (row, :, slot)
        values[rows, :, slots] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, : self.length], values[:, :, : self.length]

    def fill(self, layer: int, ends: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k, v (B, K, T, D) of prompts that end at ends (B,): as many of the last tokens as there are slots."""
        keys, values = self.keys[layer], self.values[layer]
        n, T = keys.size(2), k.size(2)
        first = (ends - n).clamp(min=0)[:, None]
        places = first + torch.arange(min(n, T), device=k.device)  # (B, min(S, T))
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        keys[rows, :, places % n] = k.transpose(1, 2)[rows, places].to(keys.dtype)
        values[rows, :, places % n] = v.transpose(1, 2)[rows, places].to(values.dtype)
