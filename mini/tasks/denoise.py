"""Denoising: write a text out of a damaged copy of it, the autoencoder's way (Lewis et al. 2020, "BART", §2.2)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mini.flags import Checked, UserError, option
from mini.model.config import ModelConfig
from mini.model.transformer import Model
from mini.tasks.base import IGNORE, Batch
from mini.tasks.inputs import masked_ids, pad
from mini.tasks.lm import NextToken
from mini.tasks.order import mix, shuffled, uniform
from mini.text.tokenizer import Tokenizer
from mini.text.tokens import TokenFile
from mini.text.words import parse_steps

NOISE = ("delete", "mask", "replace", "shuffle")
FAR = 3  # places that a shuffled token moves at the most


@dataclass
class DenoiseConfig(Checked):
    """How texts are damaged."""

    noise: str = option("all", "any of delete,mask,replace,shuffle, or all")
    noise_rate: float = option(0.15, "share of the tokens deleted, masked or replaced; all are shuffled", low=0, high=1)
    n_judged: int = option(100, "validation texts that are repaired at each evaluation, token by token; 0: none", low=0)


class Denoising(NextToken):
    """damaged [SEP] text <eot>, where only the text and its <eot> are to be predicted; padded to one length.

    The texts tile the corpus, so that documents may begin in them. Damage depends on (seed, index), in validation on
    the text's number alone. What is shuffled moves no further than FAR (Lample et al. 2018, §2.3).
    """

    Config, pretrains, fixed_shape, writes, unit = DenoiseConfig, True, True, True, "texts"
    special_tokens = ("[MASK]", "[SEP]")
    teaches, joint = False, "\n-> "

    def __init__(self, train: TokenFile | None, valid: TokenFile, tokenizer: Tokenizer, max_len: int, seed: int,
                 batch_size: int = 1, options: DenoiseConfig | None = None):  # fmt: skip
        if None in (tokenizer.eot, tokenizer.mask, tokenizer.sep):
            raise UserError(
                "the tokenizer lacks <|endoftext|>, [MASK] or [SEP]: use another; with --init, a run of this task"
            )
        if max_len < 9:
            raise UserError(f"--max_len {max_len}: too short for a text and its damaged copy; give at least 9")
        judging, train = train is None, train or valid
        self.train, self.valid, self.seed, self.tokenizer = train.tokens, valid.tokens, seed, tokenizer
        self.options, self.notes = options or DenoiseConfig(), []
        self.noise = parse_steps("noise", self.options.noise, NOISE)
        self.checksum = f"{train.sha256}-{valid.sha256}"
        self.size = (max_len - 1) // 2  # tokens of a text
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special.values()))
        self.n, self.n_valid = len(self.train) // self.size, len(self.valid) // self.size
        if not self.n_valid or (self.n < 1 and not judging):
            raise UserError(f"too little text: one takes {self.size} tokens; give more, or a smaller --max_len")

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return False  # from its heads a model is told to be of language modelling

    @staticmethod
    def ask(tokenizer: Tokenizer, prompt: str) -> list[int]:
        return [*masked_ids(tokenizer, prompt), tokenizer.sep]

    def batch(self, indices: np.ndarray) -> Batch:
        texts = self.texts_of(self.train, shuffled(indices, self.n, self.seed))
        return self.collate(texts, self.damaged(texts, np.asarray(indices), mix(self.seed, 6)))

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        n = min(self.n_valid, max(1, limit // self.size)) if limit else self.n_valid
        for numbers in np.array_split(np.arange(n), -(-n // batch_size)):
            texts = self.texts_of(self.valid, numbers)
            # Judged are some all over the text, as many at each evaluation.
            judged = numbers * self.options.n_judged // n < (numbers + 1) * self.options.n_judged // n
            yield self.collate(texts, self.damaged(texts, numbers, mix(0, 6)), judged)

    def texts_of(self, tokens: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(B, n) the tokens of these texts."""
        return tokens[numbers[:, None] * self.size + np.arange(self.size)].astype(np.int64)

    def damaged(self, texts: np.ndarray, indices: np.ndarray, key: int) -> list[list[int]]:
        """texts (B, n) with what --noise says done to them."""
        hit, which, other, far = (uniform(mix(key, i), indices, texts.shape[1]) for i in range(4))  # (B, n) each
        harms = [name for name in self.noise if name != "shuffle"]
        harm = np.where(hit < self.options.noise_rate, (which * len(harms)).astype(int), -1)
        rows = []
        for b, text in enumerate(texts.copy()):
            for number, name in enumerate(harms):
                here = harm[b] == number
                if name == "mask":
                    text[here] = self.tokenizer.mask
                elif name == "replace":
                    text[here] = self.ordinary[(other[b, here] * len(self.ordinary)).astype(int)]
            kept = harm[b] != harms.index("delete") if "delete" in harms else np.ones(len(text), dtype=bool)
            text, moved = text[kept], far[b, kept]
            if "shuffle" in self.noise:
                text = text[np.argsort(np.arange(len(text)) + moved * (FAR + 1), kind="stable")]
            rows.append(text.tolist())
        return rows

    def collate(self, texts: np.ndarray, damaged: list[list[int]], judged: np.ndarray | None = None) -> Batch:
        """tokens, targets (B, T), padded at the right; targets IGNORE up to the text; begins, judged (B,)."""
        eot, sep = self.tokenizer.eot, self.tokenizer.sep
        rows = [[*copy, sep, *text] for copy, text in zip(damaged, texts.tolist(), strict=True)]
        targets = [[IGNORE] * len(copy) + [*text, eot] for copy, text in zip(damaged, texts.tolist(), strict=True)]
        width = 2 * self.size + 1
        inputs = {"tokens": pad([row + [eot] * (width - len(row)) for row in rows], eot)}
        inputs["targets"] = pad([row + [IGNORE] * (width - len(row)) for row in targets], IGNORE)
        inputs["begins"] = torch.tensor([len(copy) + 1 for copy in damaged])
        inputs["judged"] = torch.zeros(len(rows)) if judged is None else torch.from_numpy(judged)
        return Batch(inputs, {"lm": texts.size + len(rows)}, sum(map(len, rows)))

    def measure(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, how many tokens are the likeliest, and how many of the judged texts come back whole."""
        answers, targets = model.answers(inputs), inputs["targets"]
        losses = self.losses(answers, inputs)
        right = (answers["lm"].argmax(dim=-1) == targets).sum()
        exact = copied = 0
        columns = (inputs[name].tolist() for name in ("tokens", "begins", "judged"))  # of which some are to be judged
        rows = [(row[:begin], row[begin : begin + self.size]) for row, begin, one in zip(*columns, strict=True) if one]
        if rows and bool(torch.isfinite(losses["lm"])):  # else the run has diverged, as the loop will say
            written = self.write(model, [prompt for prompt, _ in rows], self.size, stop=False)
            exact = sum(mine == text for mine, (_, text) in zip(written, rows, strict=True))
            copied = sum(prompt[:-1] == text for prompt, text in rows)
        return losses | {"right": right, "exact": torch.tensor([float(exact), copied, len(rows)])}

    def metrics(self, sums: dict[str, Tensor]) -> dict:
        exact, copied, judged = sums["exact"].tolist()
        figures = {"val_loss": float(sums["lm"] / sums["count/lm"])}
        figures["token_accuracy"] = float(sums["right"] / sums["count/lm"])
        return figures | ({"exact": exact / judged, "copied_exact": copied / judged} if judged else {})

    def summary(self, result: dict) -> list[str]:
        line = f"Of a text's tokens, after those before it, {result['token_accuracy']:.4f} are the likeliest"
        lines = [*super().summary(result), line]
        if "exact" in result:
            lines.append(
                f"Of whole texts, {result['exact']:.4f} come back ({result['copied_exact']:.4f} were not damaged)"
            )
        return lines

    def sample(self, model: Model) -> str:
        texts = self.texts_of(self.valid, np.arange(1))
        (prompt,) = self.damaged(texts, np.arange(1), mix(0, 6))
        (written,) = self.write(model, [[*prompt, self.tokenizer.sep]], self.size + 1)
        return f"{self.tokenizer.decode(prompt)}\n-> {self.tokenizer.decode(written)}"

    def example(self) -> list[str]:
        return ["Return the [MASK] of the list."]
