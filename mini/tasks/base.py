"""What a task is: something to learn, with its examples, its losses and the figures that judge it.

A task is one file of this folder and one line of TASKS in __init__.py; nothing else lists tasks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mini.model.config import ModelConfig
from mini.model.transformer import Model

IGNORE = -100  # a target that is not predicted


@dataclass
class Batch:
    """What a model computes on, and what the sums of losses are divided by."""

    inputs: dict[str, Tensor]
    counts: dict[
        str, int
    ]  # for each loss, over how many predictions it is summed; one that is missing: over all tokens
    n_tokens: int  # real tokens that go through the model
    n_bytes: int = 0  # of the text that is predicted, where bits per byte are asked for

    def to(self, device: torch.device) -> "Batch":
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.counts, self.n_tokens, self.n_bytes)


class Task:
    """Something to learn. Made as cls(train, valid, tokenizer, max_len, seed, batch_size, options).

    train, valid: TokenFiles of running text for a task that pretrains, else the names of two files.
    """

    Config: type | None = None  # its own settings, which are flags of this task only
    kinds: tuple[str, ...] = ()  # the kinds of models that can learn it
    pretrains = False  # on running text (--data); others learn from the examples of --train and --valid
    files: tuple[
        str, ...
    ] = ()  # endings of those, or names of built-in sets; the first two without --train and --valid
    special_tokens: tuple[str, ...] = ()  # needed beside the model's own
    command = ""  # of `python -m mini`, that uses a run of it

    judged = ""  # the answers, and the loss of this name, that it is judged by
    loss_weights: ClassVar[dict[str, float]] = {}  # of its losses,
    default_weight = 1.0  # and of those that are not named there
    best: str | None = None  # the validation figure whose best weights are kept; None: the last ones
    fixed_shape = False  # whether every batch has the same shape, and next to no padding
    predicted = 1.0  # the share of the tokens that meet the vocabulary

    n: int  # training examples
    checksum: str  # of all examples
    labels: tuple[str, ...] | list[str] = ()  # of a classifier
    notes: list[str]  # what a person should know of the files

    @staticmethod
    def texts(path: str) -> Iterator[str]:
        """All texts of a training file, for a tokenizer to learn from."""
        raise NotImplementedError

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        """Whether a model with these heads has learnt it."""
        raise NotImplementedError

    @classmethod
    def published_options(cls, config: ModelConfig, folder: str):
        """The settings by which published weights with these heads are judged."""
        return cls.Config() if cls.Config else None

    def heads(self) -> dict[str, object]:
        """The heads it needs, as fields of ModelConfig."""
        return {}

    def batch(self, indices: np.ndarray) -> Batch:
        """The training examples of these numbers, a function of (seed, indices)."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        """Over how many predictions each loss of a batch is summed."""
        return batch.counts

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        """All validation examples, the same each time; those of the first `limit` tokens where it pretrains."""
        raise NotImplementedError

    def losses(self, answers: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: summed loss} of a model's answers: all are trained, each divided by its count in the whole batch."""
        raise NotImplementedError

    def loss(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.losses(model.answers(inputs), inputs)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Their weighted sum."""
        return sum(self.loss_weights.get(name, self.default_weight) * value for name, value in losses.items())

    def measure(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: tensor} of sums over a validation batch; the loop adds them up over all of them."""
        return self.loss(model, inputs)

    def metrics(self, sums: dict[str, Tensor]) -> dict:
        """Figures of what measure() gave: "val_loss" and others. sums also has count/NAME of all counts, and bytes."""
        raise NotImplementedError

    def beats_chance(self, figures: dict) -> bool:
        """Whether they are better than those of a guess."""
        raise NotImplementedError

    def summary(self, result: dict) -> list[str]:
        """Lines that tell a person what the final figures mean."""
        raise NotImplementedError

    def sample(self, model: Model) -> str | None:
        """A text that shows a person what the model can do."""
        return None

    def example(self) -> list[str]:
        """What to try the task's command with."""
        raise NotImplementedError
