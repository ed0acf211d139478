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
from mini.tasks.metrics import OVERLAP, overlap, overlap_figures
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

    Config, best = PairsConfig, "val_loss"
    files = (".jsonl", ".tsv", ".csv", "python-docs")

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int, batch_size: int,
                 options: PairsConfig | None = None):  # fmt: skip
        if tokenizer.eot is None:
            raise UserError("the tokenizer has no <|endoftext|>, which ends answers: use another one")
        self.tokenizer, self.max_len, self.options = tokenizer, max_len, options or PairsConfig()
        self.notes, self.cut = [], {}
        rows, valid_rows = read_pairs(train, "train"), read_pairs(valid, "valid")
        self.train, self.valid = self.encode(rows, train, "train"), self.encode(valid_rows, valid, "valid")
        self.group(seed, batch_size)
        self.checksum = rows_checksum(self.train, self.valid)
        n = min(self.options.n_judged, len(valid_rows))
        judged = [i * len(valid_rows) // n for i in range(n)]
        self.golds = {i: valid_rows[i][2] for i in judged}
        copies = [overlap(first_sentence(valid_rows[i][1]), valid_rows[i][2]) for i in judged]
        self.copied = overlap_figures(np.sum(copies, axis=0).tolist()) if n else {}

    @staticmethod
    def texts(path: str) -> Iterator[str]:
        for _, prompt, answer in read_pairs(path, "train"):
            yield from (prompt, answer)

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return False  # from its heads a model is told to be of language modelling

    def encode(self, rows: list[tuple[str, str, str]], path: str, split: str) -> list[tuple[list[int], int, int]]:
        """(ids, number of ids before the answer, number of the row). Long prompts lose their beginning, as is noted."""
        encoded, lengths, rooms = [], [], []
        for number, (place, prompt, answer) in enumerate(rows):
            answer_ids, ids = [*self.tokenizer.encode(answer), self.tokenizer.eot], self.tokenizer.encode(prompt)
            if not ids or len(answer_ids) < 2:
                raise UserError(f"{place}: the {'answer' if ids else 'prompt'} is empty")
            room = self.max_len + 1 - len(answer_ids)  # for the prompt; the last token is a target only
            if room < 1:
                raise UserError(f"{place}: the answer has {len(answer_ids)} tokens, --max_len is {self.max_len}")
            lengths.append(len(ids))
            rooms.append(room)
            ids = ids[-room:]
            encoded.append((ids + answer_ids, len(ids), number))
        self.cut[split] = cuts(lengths, rooms)
        what = f"prompts lose their beginning, as with the answer they are longer than --max_len {self.max_len}"
        self.notes += cut_note(path, what, self.cut[split])
        return encoded

    def collate(self, examples: list[tuple[list[int], int, int]]) -> Batch:
        """tokens and targets (B, T), padded at the right; targets IGNORE up to the answer; begins, rows (B,)."""
        targets = [[IGNORE] * (begin - 1) + ids[begin:] for ids, begin, _ in examples]
        tokens = pad([ids[:-1] for ids, _, _ in examples], self.tokenizer.eot)
        inputs = {"tokens": tokens, "targets": pad(targets, IGNORE)}
        _, begins, rows = zip(*examples, strict=True)
        inputs |= {"begins": torch.tensor(begins), "rows": torch.tensor(rows)}
        answers = [ids[begin:] for ids, begin, _ in examples]
        n_bytes = sum(int(self.tokenizer.byte_lengths[ids].sum()) for ids in answers)
        return Batch(inputs, {"lm": sum(map(len, answers))}, sum(len(ids) - 1 for ids, _, _ in examples), n_bytes)

    def measure(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, and what the answers to this batch's chosen prompts have in common with the true ones."""
        chosen = [i for i, row in enumerate(inputs["rows"].tolist()) if row in self.golds]
        sums = torch.zeros(OVERLAP, dtype=torch.float64)
        if chosen:
            lengths = inputs["begins"][chosen]
            answers = self.answer(
                model, inputs["tokens"][chosen, : int(lengths.max())], lengths, self.options.max_answer
            )
            golds = [self.golds[row] for row in inputs["rows"][chosen].tolist()]
            sums += torch.tensor([overlap(*pair) for pair in zip(answers, golds, strict=True)]).sum(0)
        return self.loss(model, inputs) | {"overlap": sums}

    def metrics(self, sums: dict[str, Tensor]) -> dict:
        figures = super().metrics(sums)
        if not self.golds:
            return figures
        judged = overlap_figures(sums["overlap"].tolist())
        return figures | judged | {f"copied_{name}": value for name, value in self.copied.items()}

    def summary(self, result: dict) -> list[str]:
        lines = super().summary(result)
        if self.golds:
            copied = ", ".join(f"{name} {result[f'copied_{name}']:.4f}" for name in self.copied)
            mine = ", ".join(f"{name} {result[name]:.4f}" for name in self.copied)
            lines.append(f"{len(self.golds)} answers: {mine} (copying the prompt's first sentence: {copied})")
        return lines

    def answer(self, model: Model, prompts: Tensor, lengths: Tensor, most: int) -> list[str]:
        """The greedy answers to prompts (B, T) of these lengths (B,)."""
        out = model.generate(prompts, most, lengths=lengths, stop=[self.tokenizer.eot]).tolist()
        new = (row[begin : begin + most] for row, begin in zip(out, lengths.tolist(), strict=True))
        return [self.tokenizer.decode([i for i in ids if i != self.tokenizer.eot]) for ids in new]

    def sample(self, model: Model) -> str:
        ids, begin, _ = self.valid[0]
        prompt = torch.tensor([ids[:begin]], device=next(model.parameters()).device)
        (answer,) = self.answer(model, prompt, torch.tensor([begin], device=prompt.device), 40)
        return f"{self.tokenizer.decode(ids[:begin])}\n-> {answer}"

    def example(self) -> list[str]:
        ids, begin, _ = self.valid[0]
        return [self.tokenizer.decode(ids[:begin])]


def read_pairs(path: str, split: str) -> list[tuple[str, str, str]]:
    """(place, prompt, answer) of each row of a file, or of a split of "python-docs"."""
    if str(path) == "python-docs":
        return [(place, f"{body}\n\nFirst line:", f" {line}") for place, body, line in python_docs.summaries(split)]
    return [(place, row["prompt"], row["answer"]) for place, row in read_rows(path, ["prompt", "answer"])]


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip(), maxsplit=1)[0]
