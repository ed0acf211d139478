"""Prompts and answers: predict the answer to a prompt, and judge the answers that the model gives."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mini.flags import Checked, UserError, option
from mini.model.config import ModelConfig
from mini.model.transformer import Model
from mini.tasks.base import IGNORE, Batch, FileTask
from mini.tasks.inputs import cut_note, cuts, pad
from mini.tasks.lm import NextToken
from mini.tasks.metrics import overlap, overlap_figures
from mini.text import python_docs
from mini.text.rows import read_rows, rows_checksum
from mini.text.tokenizer import Tokenizer


@dataclass
class PairsConfig(Checked):
    """Prompts and answers, of which some are generated and judged by ROUGE and BLEU."""

    n_judged: int = option(100, "validation prompts whose answers are judged, at each evaluation; 0: none", low=0)
    max_answer: int = option(64, "longest answer that is generated, in tokens", low=1)


class PromptAnswers(NextToken, FileTask):
    """prompt answer <eot>, where only the answer and its <eot> are to be predicted.

    Beside the loss stand ROUGE and BLEU of greedy answers to some of the validation's prompts, evenly chosen, and
    (copied_..) those of the prompts' first sentences. "python-docs": docstrings' bodies and their first lines.
    """

    Config, best, writes = PairsConfig, "val_loss", True
    files = (".jsonl", ".tsv", ".csv", "python-docs")

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int, batch_size: int,
                 options: PairsConfig | None = None):  # fmt: skip
        if tokenizer.eot is None:
            raise UserError("the tokenizer has no <|endoftext|>, which ends answers: use another one")
        self.tokenizer, self.max_len, self.options = tokenizer, max_len, options or PairsConfig()
        self.notes, self.cut = [], {}
        rows, valid_rows = self.read_both(train, valid, read_pairs, lambda row: row[1])
        valid = valid or f"{train}, held out"
        n = min(self.options.n_judged, len(valid_rows))
        judged = {i * len(valid_rows) // n: k for k, i in enumerate(range(n))}  # {row: its number among them}
        self.golds = [valid_rows[row][2] for row in judged]
        self.prompts = [valid_rows[row][1] for row in judged]
        self.train = self.encode(rows, train, "train", {})
        self.valid = self.encode(valid_rows, valid, "valid", judged)
        self.group(seed, batch_size)
        self.checksum = rows_checksum([e[:2] for e in self.train], [e[:2] for e in self.valid])
        self.longest = min(self.options.max_answer, max_len // 2)  # the rest of max_len is for the prompt
        if n_long := sum(len(ids) - begin > self.longest for ids, begin, number in self.valid if number >= 0):
            self.notes.append(f"{valid}: {n_long} of {n} answers to judge have more than the {self.longest} tokens "
                              "that are generated (--max_answer, and half of --max_len)")  # fmt: skip

    @staticmethod
    def texts(path: str) -> Iterator[str]:
        for _, prompt, answer in read_pairs(path, "train"):
            yield from (prompt, answer)

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return False  # from its heads a model is told to be of language modelling

    def encode(
        self, rows: list[tuple[str, str, str]], path: str, split: str, judged: dict[int, int]
    ) -> list[tuple[list[int], int, int]]:
        """(ids, number of ids before the answer, its number in golds or -1) of each row.

        Long prompts lose their beginning, as is noted.
        """
        encoded, lengths, rooms = [], [], []
        for row, (place, prompt, answer) in enumerate(rows):
            answer_ids, ids = [*self.tokenizer.encode(answer), self.tokenizer.eot], self.tokenizer.encode(prompt)
            if not ids or len(answer_ids) < 2:
                raise UserError(f"{place}: the {'answer' if ids else 'prompt'} is empty")
            room = self.max_len + 1 - len(answer_ids)  # for the prompt; the last token is a target only
            if room < 1:
                raise UserError(f"{place}: the answer has {len(answer_ids)} tokens, --max_len is {self.max_len}: "
                                "give a larger one")  # fmt: skip
            lengths.append(len(ids))
            rooms.append(room)
            ids = ids[-room:]
            encoded.append((ids + answer_ids, len(ids), judged.get(row, -1)))
        self.cut[split] = cuts(lengths, rooms)
        what = f"prompts lose their beginning, as with the answer they are longer than --max_len {self.max_len}"
        self.notes += cut_note(path, what, self.cut[split])
        return encoded

    def collate(self, examples: list[tuple[list[int], int, int]]) -> Batch:
        """tokens and targets (B, T), padded at the right; targets IGNORE up to the answer; begins, numbers (B,)."""
        targets = [[IGNORE] * (begin - 1) + ids[begin:] for ids, begin, _ in examples]
        tokens = pad([ids[:-1] for ids, _, _ in examples], self.tokenizer.eot, self.max_len)
        _, begins, numbers = zip(*examples, strict=True)
        inputs = {"tokens": tokens, "targets": pad(targets, IGNORE, self.max_len)}
        inputs |= {"begins": torch.tensor(begins), "numbers": torch.tensor(numbers)}
        answers = [ids[begin:] for ids, begin, _ in examples]
        n_bytes = sum(int(self.tokenizer.byte_lengths[ids].sum()) for ids in answers)
        return Batch(inputs, {"lm": sum(map(len, answers))}, sum(len(ids) - 1 for ids, _, _ in examples), n_bytes)

    def measure(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, and what greedy answers to this batch's chosen prompts have in common with the true ones."""
        losses, sums = self.loss(model, inputs), np.zeros(len(overlap("", "")))
        prompts, numbers = [], []
        for row, begin, number in zip(
            *(inputs[name].tolist() for name in ("tokens", "begins", "numbers")), strict=True
        ):
            if number >= 0:
                prompts.append(row[max(0, begin - self.max_len + self.longest) : begin])
                numbers.append(number)
        if prompts and bool(torch.isfinite(losses["lm"])):  # else the run has diverged, as the loop will say
            written = [self.tokenizer.decode(ids) for ids in self.write(model, prompts, self.longest)]
            sums = np.sum([overlap(text, self.golds[i]) for text, i in zip(written, numbers, strict=True)], axis=0)
        return losses | {"overlap": torch.from_numpy(sums)}

    def metrics(self, sums: dict[str, Tensor]) -> dict:
        figures, found = super().metrics(sums), sums["overlap"].tolist()
        if not found[0]:
            return figures
        pairs = zip(map(first_sentence, self.prompts), self.golds, strict=True)
        copied = overlap_figures(np.sum([overlap(*pair) for pair in pairs], axis=0).tolist())
        return figures | overlap_figures(found) | {f"copied_{name}": value for name, value in copied.items()}

    def summary(self, result: dict) -> list[str]:
        names = [name.removeprefix("copied_") for name in result if name.startswith("copied_")]
        mine, copied = (", ".join(f"{n} {result[mark + n]:.4f}" for n in names) for mark in ("", "copied_"))
        judged = f"{len(self.golds)} answers: {mine} (copying the prompt's first sentence: {copied})"
        return super().summary(result) + ([judged] if names else [])

    def sample(self, model: Model) -> str:
        ids, begin, _ = self.valid[0]
        (written,) = self.write(model, [ids[:begin]], 40)
        return f"{self.tokenizer.decode(ids[:begin])}\n-> {self.tokenizer.decode(written)}"

    def example(self) -> list[str]:
        ids, begin, _ = self.valid[0]
        return [self.tokenizer.decode(ids[:begin])]


def read_pairs(path: str, split: str) -> list[tuple[str, str, str]]:
    """(place, prompt, answer) of each row of a file, or of a split of "python-docs"."""
    if str(path) == "python-docs":
        return [(place, f"{body}\n\nFirst line:", f" {line}") for place, body, line in python_docs.summaries(split)]
    return [(place, row["prompt"], row["answer"]) for place, row in read_rows(path, ["prompt", "answer"])]


def first_sentence(text: str) -> str:
    """A hundred words of it at the most, for texts without sentences."""
    sentence = re.split(r"(?<=[.!?])\s+(?=\W?[A-Z0-9])|\n\s*\n", text.strip(), maxsplit=1)[0]
    return " ".join(sentence.split()[:100])
