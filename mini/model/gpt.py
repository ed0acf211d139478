"""GPT: the stack, a head that predicts the next token, and generation with a key/value cache."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini.errors import UserError
from mini.model.attention import KVCache
from mini.model.config import ModelConfig
from mini.model.layers import Linear, linear_flops
from mini.model.published import gpt2_config, gpt2_tensors
from mini.model.scores import Unscored
from mini.model.transformer import Model, at_positions, real_tokens
from mini.tensors import loaded


class GPT(Model):
    """Decoder-only language model (Radford et al. 2019); with n_classes, a classifier of texts as well."""

    kind = "gpt"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        # At zero every token is equally likely at first: the loss starts at ln V.
        self.head = Linear(config.d_model, config.n_rows, bias=False, std=0.0 if config.zero_init else 0.02)
        if config.tied:
            self.head.weight = self.stack.tokens.weight
        self.classifier = nn.Linear(config.d_model, config.n_classes) if config.n_classes else None
        self.initialise()

    def freeze_unused(self) -> None:
        if self.classifier is not None and not self.config.tied:
            self.head.requires_grad_(False)  # a classifier predicts no tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V): position t scores token t + 1."""
        return self.logits(self.stack(tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)"""
        return self.vocabulary(self.head(hidden))

    def classify(self, tokens: Tensor, lengths: Tensor, segments: Tensor | None = None) -> Tensor:
        """tokens (B, T) padded at the right to lengths (B,) -> class logits (B, n_classes).

        The last real token is the one that has seen the whole text (Radford et al. 2018, §3.2). segments are taken
        as by Bert.classify, and not looked at: the tokens between two texts tell a GPT where the second begins.
        """
        hidden = self.stack(tokens, real=real_tokens(tokens, lengths))  # (B, T, C)
        last = hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (B, C)
        return self.classifier(last)

    def answers(self, inputs: dict[str, Tensor], in_parts: bool = False) -> dict[str, Tensor | Unscored]:
        """The logits of classes, (B, n_classes), or of what follows each token, (B, T, V), or those at positions."""
        if self.classifier is not None:
            return {"classify": self.classify(inputs["tokens"], inputs["lengths"])}
        real = None
        if (targets := inputs.get("targets")) is not None:  # (B, T): real up to a row's last target
            real = (targets >= 0).int().flip(1).cummax(dim=1).values.flip(1).bool()
        hidden = self.stack(inputs["tokens"], real=real, documents=inputs.get("documents"))  # (B, T, C)
        hidden = at_positions(hidden, inputs["positions"]) if "positions" in inputs else hidden
        return {"lm": self.unscored(hidden, self.head) if in_parts else self.logits(hidden)}

    def generate(self, tokens: Tensor, max_new_tokens: int = 64, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, use_cache: bool = True, **options) -> Tensor:  # fmt: skip
        """(B, T) int64 -> (B, T + n) with up to max_new_tokens new ones; see stream() for the options.

        With lengths, row b is its prompt of lengths[b] tokens, then its new ones, then filling.
        """
        options |= dict(temperature=temperature, top_k=top_k, top_p=top_p, use_cache=use_cache)
        B, T = tokens.shape
        lengths = options.get("lengths")
        ends = torch.full((B,), T, device=tokens.device) if lengths is None else lengths.to(tokens.device)
        out = F.pad(tokens, (0, max_new_tokens))  # (B, T + max_new_tokens)
        rows, n = torch.arange(B, device=tokens.device), 0
        for n, new in enumerate(self.stream(tokens, max_new_tokens, **options), 1):
            out[rows, ends + n - 1] = new
        return out[:, : T + n]

    @torch.inference_mode()
    def stream(self, tokens: Tensor, max_new_tokens: int = 64, *, lengths: Tensor | None = None,
               temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, stop: Sequence[int] = (),
               use_cache: bool = True, generator: torch.Generator | None = None,
               compile: bool = False) -> Iterator[Tensor]:  # fmt: skip
        """Yields the next token of every row, (B,), until max_new_tokens or until all rows have stopped.

        Greedy and for one length of prompt, what it computes is

            for _ in range(max_new_tokens):
                tokens = cat([tokens, self(tokens[:, -max_len:])[:, -1].argmax(-1, keepdim=True)], dim=1)

        tokens (B, T): prompts; lengths (B,): their real lengths where they are padded at the right.
        temperature 0 is greedy. stop: tokens that end a row; it then repeats stop[0].
        use_cache=False recomputes everything for each token and gives the same tokens. Once a row is longer than
        max_len, the model sees its last max_len tokens; since that moves every token to another position, the
        cache no longer holds and each further token costs a whole forward pass. Not so where the config is endless.
        compile=True compiles the single-token step: worth its seconds from some thousands of tokens on.
        """
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise UserError("the prompt has no tokens: give at least one")
        B, device = len(tokens), tokens.device
        most = tokens.size(1) + max_new_tokens if self.config.endless else self.config.max_len
        if lengths is None:
            lengths = torch.full((B,), tokens.size(1), device=device)
        if int(lengths.min()) < 1:
            raise UserError(f"prompt {int(lengths.argmin())} has no tokens: give at least one")
        rows = torch.arange(B, device=device)
        text = F.pad(tokens, (0, max_new_tokens))  # each row: prompt, new tokens, filling
        ends, longest = lengths.clone(), int(lengths.max())
        stopped = torch.zeros(B, dtype=torch.bool, device=device)
        stops = torch.tensor(list(stop), dtype=torch.long, device=device)

        step, cache = self._step, None
        if use_cache and longest < most:
            slots = min(most, longest + max_new_tokens)
            cache = KVCache(self.config, B, slots, device, self.stack.norm.weight.dtype)
            if compile:  # one shape for all steps
                step = torch.compile(self._step)

        new = None
        for _ in range(max_new_tokens):
            if cache is not None and longest <= most:
                if new is None:  # the whole prompt at once
                    prompt = text[:, :longest]
                    hidden = self.stack(prompt, real=real_tokens(prompt, ends), cache=cache)  # (B, T, C)
                    logits = self.logits(hidden[rows, ends - 1])  # (B, V)
                else:
                    cache.length = slots if compile else longest
                    logits = step(new[:, None], ends[:, None] - 1, cache)
            else:
                logits = self._window(text, ends, most)
            new = choose(logits.float(), temperature, top_k, top_p, generator)  # (B,)
            if len(stops):
                new = torch.where(stopped, stops[0], new)
                stopped |= torch.isin(new, stops)
            text[rows, ends] = new
            ends += 1
            longest += 1
            yield new
            if len(stops) and bool(stopped.all()):
                return

    def _step(self, new: Tensor, places: Tensor, cache: KVCache) -> Tensor:
        """new (B, 1) at places (B, 1) -> logits (B, V) of what follows."""
        return self.logits(self.stack(new, places=places, cache=cache)[:, -1])

    def _window(self, text: Tensor, ends: Tensor, most: int) -> Tensor:
        """The logits (B, V) after each row's last tokens, at most so many, without a cache; text (B, T), ends (B,)."""
        starts = (ends - most).clamp(min=0)
        width = int((ends - starts).max())
        places = (starts[:, None] + torch.arange(width, device=text.device)).clamp(max=text.size(1) - 1)
        hidden = self.stack(text.gather(1, places))  # (B, width, C)
        return self.logits(hidden[torch.arange(len(text), device=text.device), ends - starts - 1])

    def flops(self, length: int, predicted: float = 1.0) -> float:
        return self.stack.flops(length) + predicted * linear_flops(self.head)

    def vocabulary_weights(self) -> set[nn.Parameter]:
        return super().vocabulary_weights() | {self.head.weight}

    @classmethod
    def from_published(cls, folder: str | Path) -> "GPT":
        """A GPT-2, in eval mode, from a folder with config.json and its weights, in GPT-2's names.

        The weights: model.safetensors or pytorch_model.bin.
        Raises UserError naming missing, extra and misshapen tensors, and settings that this GPT does not have.
        """
        config, tensors = gpt2_config(folder), gpt2_tensors(folder)
        if config.tied:  # some files hold the shared matrix twice
            tensors.pop("head.weight", None)
        return loaded(lambda: cls(config), tensors, folder).eval()


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """(B, V) -> (B,): the likeliest token, or one drawn from the softmax of logits / temperature.

    top_k keeps the k likeliest; top_p the fewest whose probabilities sum to p (Holtzman et al. 2020, §3.1).
    """
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's scores are no numbers: its weights are of no use")
    if temperature < 1e-6:  # to float32 the same
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # no overflow at low temperatures
    if top_k:
        values, kept = logits.topk(min(top_k, logits.size(-1)))  # (B, k)
        logits = torch.full_like(logits, float("-inf")).scatter(1, kept, values)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)  # (B, V)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # the mass of likelier tokens
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= max(top_p, 1e-9))
        logits = logits.masked_fill(dropped, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
