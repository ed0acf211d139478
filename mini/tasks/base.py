"""What a task is: something to learn, with its examples, its losses and the figures that judge it.

A task is one file of this folder and one line of TASKS in __init__.py; nothing else lists tasks.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mini.errors import UserError
from mini.model.config import ModelConfig
from mini.model.scores import IGNORE as IGNORE  # for all tasks
from mini.model.transformer import Model
from mini.tasks.order import Grouped
from mini.text.tokenizer import Tokenizer


@dataclass
class Batch:
    """What a model computes on, and what the sums of losses are divided by."""

    inputs: dict[str, Tensor]
    counts: dict[str, int]  # for each loss, over how many predictions it is summed; if missing, over all tokens
    n_tokens: int  # real tokens that go through the model
    n_bytes: int = 0  # of the text that is predicted, where bits per byte are asked for

    def to(self, device: torch.device) -> "Batch":
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.counts, self.n_tokens, self.n_bytes)

    def pin(self) -> "Batch":
        """In memory from which a GPU fetches while the processor goes on."""
        inputs = {name: tensor.contiguous().pin_memory() for name, tensor in self.inputs.items()}
        return Batch(inputs, self.counts, self.n_tokens, self.n_bytes)


class Task:
    """Something to learn. Made as cls(train, valid, tokenizer, max_len, seed, batch_size, options).

    train, valid: TokenFiles of running text for a task that pretrains, else the names of two files. Without train
    (None) there is nothing to learn, but something to judge a model by that has.

    A task has, beside what follows,
        n, checksum, notes          the number of training examples; of all examples; what a person should know of them
        n_valid                     the number of validation examples
        cut                         {"train" or "valid": what max_len takes from its texts, as inputs.cuts() tells it}
        batch(indices)              the training examples of these numbers, a function of (seed, indices)
        validation(batch_size, limit)   all validation examples, always the same; of text the first `limit` tokens
        losses(answers, inputs)     {name: summed loss} of a model's answers: all of these are trained
        metrics(sums)               figures, "val_loss" among them, of what measure() gave, count/NAME and bytes
        beats_chance(figures)       whether they are better than those of a guess
        summary(result), example()  lines that tell a person what they mean; what to try `command` with
        fits(config)                classmethod: whether a model with these heads has learnt it
    """

    Config: type | None = None  # its own settings, which are flags of this task only
    kinds: tuple[str, ...] = ()  # the kinds of models that can learn it
    pretrains = False  # on running text (--data); others learn from the examples of --train and --valid
    reads_text = True  # whether it learns from text at all; else train and valid are None
    files: tuple[str, ...] = ()  # endings of those, or the name of a set that is there without them
    special_tokens: tuple[str, ...] = ()  # needed beside the model's own
    command = ""  # of `python -m mini`, that uses a run of it
    joint = ""  # between a prompt and what a model writes
    judged = ""  # the answers, and the loss of this name, that it is judged by
    loss_weights: ClassVar[dict[str, float]] = {}  # of its losses,
    default_weight = 1.0  # and of those that are not named there
    best: str | None = None  # the validation figure whose best weights are kept; None: the last ones
    teaches = True  # whether its answers are probabilities, from which a student can learn
    fixed_shape = False  # whether every batch has the same shape, and next to no padding
    in_parts = False  # whether losses() is content with Unscored logits, as token_loss() is; else it gets them all
    predicted = 1.0  # the share of the tokens that meet the vocabulary
    unit = "examples"  # what n_valid counts
    writes = False  # whether measure() lets the model write, each text as long as it becomes
    additive = True  # whether metrics() can judge the sums of a part of the validation examples
    labels: tuple[str, ...] | list[str] = ()  # of a classifier
    cut: ClassVar[dict[str, dict[str, int]]] = {}  # of running text, which is tiled, nothing

    @classmethod
    def published_options(cls, config: ModelConfig, folder: str):
        """The settings by which published weights with these heads are judged."""
        return cls.Config() if cls.Config else None

    @classmethod
    def judging(cls, options):
        """These settings, as far as a model can be judged by them on any file."""
        return options

    @staticmethod
    def ask(tokenizer: Tokenizer, prompt: str) -> list[int]:
        """What a model that writes goes on from; what it writes is shown behind `joint`."""
        return tokenizer.encode(prompt)

    @staticmethod
    def texts(path: str) -> Iterable[str]:
        """All texts of a file, for a tokenizer to learn from."""
        raise UserError("this task has no texts that a tokenizer could learn from: give --tokenizer bytes, or another")

    def check(self, model: Model) -> None:
        """Raises UserError for a model that cannot learn it."""

    def settle(self, result: dict) -> None:
        """Takes over what learning has settled, of a run that ended in these figures."""

    def heads(self) -> dict[str, object]:
        """The heads it needs, as fields of ModelConfig."""
        return {}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Over how many predictions each loss of a batch is summed."""
        return batch.counts

    def loss(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        answers = model.answers(inputs, in_parts=True) if self.in_parts else model.answers(inputs)
        return self.losses(answers, inputs)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Their weighted sum."""
        return sum(self.loss_weights.get(name, self.default_weight) * value for name, value in losses.items())

    def measure(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: tensor} of sums over a validation batch; the loop adds them up over all of them."""
        return self.loss(model, inputs)

    def sample(self, model: Model) -> str | None:
        """A text that shows a person what the model can do."""
        return None


class FileTask(Task):
    """A task whose examples are those of two files: lists train and valid, of which collate(examples) makes a Batch."""

    notes: list[str]

    def read_both(self, train: str | None, valid: str | None, read: Callable[[str, str], list],
                  text: Callable[[object], str]) -> tuple[list, list]:  # fmt: skip
        """What read(path, split) finds in both files.

        Without valid a tenth of train is held out, chosen by a hash of text(row): the same rows whatever else is in the
        file, and copies of a text on one side.
        """
        if train is None:
            return [], read(valid, "valid")
        rows = read(train, "train")
        if valid is not None:
            return rows, read(valid, "valid")
        sides: tuple[list, list] = [], []
        for row in rows:
            sides[hashlib.sha256(text(row).encode()).digest()[0] < 26].append(row)
        if not all(sides):
            raise UserError(f"{train}: {len(rows)} are too few to hold some out for validation; give --valid FILE")
        self.notes.append(f"{train}: {len(sides[1]):,} of {len(rows):,} are held out for validation, always the same")
        return sides

    def group(self, seed: int, batch_size: int) -> None:
        """To be called when the examples are there: those of a batch will have similar lengths, so little padding."""
        self.n, self.n_valid = len(self.train), len(self.valid)
        self.order = Grouped(np.array([*map(self.length, self.train)]), seed, batch_size)

    @staticmethod
    def length(example: tuple) -> int:
        return len(example[0])  # in tokens

    def batch(self, indices: np.ndarray) -> Batch:
        return self.collate([self.train[i] for i in self.order(indices)])

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        ordered = sorted(self.valid, key=self.length)
        for first in range(0, len(ordered), batch_size):
            yield self.collate(ordered[first : first + batch_size])
