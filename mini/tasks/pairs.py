"""Prompts and answers: predict the answer to a prompt."""

from collections.abc import Iterator

import torch

from mini.errors import UserError
from mini.model.config import ModelConfig
from mini.model.transformer import Model
from mini.tasks.base import IGNORE, Batch, FileTask
from mini.tasks.inputs import pad
from mini.tasks.lm import NextToken
from mini.text.rows import column_texts, read_rows, rows_checksum
from mini.text.tokenizer import Tokenizer


class PromptAnswers(NextToken, FileTask):
    """prompt answer <eot>, where only the answer and its <eot> are to be predicted."""

    best = "val_loss"
    files = (".jsonl", ".tsv", ".csv")

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int, batch_size: int,
                 options: None = None):  # fmt: skip
        if tokenizer.eot is None:
            raise UserError("the tokenizer has no <|endoftext|>, which ends answers: use another one")
        self.tokenizer, self.max_len, self.notes = tokenizer, max_len, []
        self.train, self.valid = self.encode(train), self.encode(valid)
        self.group(seed, batch_size)
        self.checksum = rows_checksum(self.train, self.valid)

    @staticmethod
    def texts(path: str) -> Iterator[str]:
        return column_texts(path, ["prompt", "answer"])

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return False  # from its heads a model is told to be of language modelling

    def encode(self, path: str) -> list[tuple[list[int], int]]:
        """(ids, number of ids before the answer) of each row. Long prompts lose their beginning, which is noted."""
        encoded, cut = [], []
        for place, row in read_rows(path, ["prompt", "answer"]):
            answer = [*self.tokenizer.encode(row["answer"]), self.tokenizer.eot]
            prompt = self.tokenizer.encode(row["prompt"])
            if not prompt or len(answer) < 2:
                raise UserError(f"{place}: the {'answer' if prompt else 'prompt'} is empty")
            room = self.max_len + 1 - len(answer)  # for the prompt; the last token is a target only
            if room < 1:
                raise UserError(f"{place}: the answer has {len(answer)} tokens, --max_len is {self.max_len}")
            if len(prompt) > room:
                cut.append(f"{place} loses {len(prompt) - room} of {len(prompt)} tokens")
                prompt = prompt[-room:]
            encoded.append((prompt + answer, len(prompt)))
        if cut:
            self.notes.append(
                f"{path}: {len(cut):,} of {len(encoded):,} prompts lose their beginning, as with the answer they are "
                f"longer than --max_len {self.max_len} (the first: {cut[0]})"
            )
        return encoded

    def collate(self, examples: list[tuple[list[int], int]]) -> Batch:
        """tokens and targets (B, T), padded at the right; targets IGNORE up to the answer."""
        targets = [[IGNORE] * (begin - 1) + ids[begin:] for ids, begin in examples]
        inputs = {"tokens": pad([ids[:-1] for ids, _ in examples], self.tokenizer.eot), "targets": pad(targets, IGNORE)}
        answers = [ids[begin:] for ids, begin in examples]
        n_bytes = sum(int(self.tokenizer.byte_lengths[ids].sum()) for ids in answers)
        return Batch(inputs, {"lm": sum(map(len, answers))}, sum(len(ids) - 1 for ids, _ in examples), n_bytes)

    def sample(self, model: Model) -> str:
        ids, begin = self.valid[0]
        prompt = torch.tensor([ids[:begin]], device=next(model.parameters()).device)
        new = model.generate(prompt, 40, stop=[self.tokenizer.eot])[0, begin:].tolist()
        answer = self.tokenizer.decode([i for i in new if i != self.tokenizer.eot])
        return f"{self.tokenizer.decode(ids[:begin])}\n-> {answer}"

    def example(self) -> list[str]:
        ids, begin = self.valid[0]
        return [self.tokenizer.decode(ids[:begin])]
