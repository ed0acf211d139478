"""Hidden states: stay near what the original computes, the measure of encoders that are published without a head."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mini.flags import Checked, UserError, option
from mini.model.bert import Bert
from mini.model.config import ModelConfig
from mini.model.transformer import Model
from mini.tasks.base import Batch, Task
from mini.tasks.order import shuffled
from mini.text.tokenizer import Tokenizer
from mini.text.tokens import TokenFile


@dataclass
class HiddenConfig(Checked):
    """Hidden states that are to be those of an original."""

    original: str = option("", "the folder with published weights that are the measure")


class HiddenStates(Task):
    """[CLS] text [SEP], whose hidden states h are held against those of the original, h₀: Σ ‖h - h₀‖² / ‖h₀‖²."""

    Config, kinds, command, judged = HiddenConfig, ("bert",), "embed", "hidden"
    pretrains, fixed_shape, teaches = True, True, False

    unit = "windows"

    def __init__(self, train: TokenFile | None, valid: TokenFile, tokenizer: Tokenizer, max_len: int, seed: int,
                 batch_size: int, options: HiddenConfig):  # fmt: skip
        if not options.original:
            raise UserError("--task hidden: name the weights whose hidden states are the measure with --original")
        self.original = Bert.from_published(options.original).requires_grad_(False)
        if tokenizer.vocab_size > self.original.config.vocab_size or max_len > self.original.config.max_len:
            raise UserError(f"{options.original}: it knows fewer tokens, or shorter texts, than are asked for")
        train = train or valid
        self.options, self.tokenizer, self.seed, self.notes = options, tokenizer, seed, []
        self.checksum = f"{train.sha256}-{valid.sha256}"
        self.train, self.valid, self.room = train.tokens, valid.tokens, max_len - 2
        self.n, self.n_valid = (len(text) // self.room for text in (self.train, self.valid))
        if not self.n or len(self.valid) < self.room:
            raise UserError(f"the text is shorter than --max_len {max_len}: give more, or a smaller --max_len")

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return not (config.causal or config.n_classes or config.spans or config.mlm)

    @classmethod
    def published_options(cls, config: ModelConfig, folder: str) -> HiddenConfig:
        return HiddenConfig(str(Path(folder).resolve()))

    def check(self, model: Model) -> None:
        theirs = self.original.config.d_model
        if model.config.d_model != theirs:
            raise UserError(f"{self.options.original}: its width is {theirs}, the model's {model.config.d_model}")

    def batch(self, indices: np.ndarray) -> Batch:
        return self.make(self.train, shuffled(indices, self.n, self.seed))

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        n = min(limit or len(self.valid), len(self.valid)) // self.room
        for first in range(0, max(n, 1), batch_size):
            yield self.make(self.valid, np.arange(first, min(first + batch_size, max(n, 1))))

    def make(self, text: np.ndarray, windows: np.ndarray) -> Batch:
        """tokens (B, T) and lengths (B,) of these windows of a text."""
        tokens = text[windows[:, None] * self.room + np.arange(self.room)].astype(np.int64)  # (B, T - 2)
        tokens = np.pad(tokens, ((0, 0), (1, 1)), constant_values=((0, 0), (self.tokenizer.cls, self.tokenizer.sep)))
        inputs = {"tokens": torch.from_numpy(tokens), "lengths": torch.full((len(tokens),), tokens.shape[1])}
        return Batch(inputs, {"hidden": tokens.size}, tokens.size)

    def losses(self, answers: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = answers["hidden"].float()  # (B, T, C)
        with torch.no_grad():
            theirs = self.original.to(hidden.device).answer(inputs).float()
        return {"hidden": ((hidden - theirs).square().sum(-1) / theirs.square().sum(-1)).sum()}

    def metrics(self, sums: dict[str, Tensor]) -> dict:
        return {"val_loss": float(sums["hidden"] / sums["count/hidden"])}

    def beats_chance(self, figures: dict) -> bool:
        return figures["val_loss"] < 1

    def summary(self, result: dict) -> list[str]:
        return [f"Hidden states are {result['val_loss']:.4%} off those of {self.options.original} (squared, relative)"]

    def example(self) -> list[str]:
        return ["texts.txt"]
