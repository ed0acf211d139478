"""Language modelling: predict the next token of running text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mini.flags import Checked, UserError, option
from mini.model.config import ModelConfig
from mini.model.scores import token_loss
from mini.model.transformer import Model
from mini.tasks.base import IGNORE, Batch, Task
from mini.tasks.inputs import check_documents, document_numbers, pad
from mini.tasks.metrics import bits_per_byte
from mini.tasks.order import shuffled
from mini.text.tokenizer import Tokenizer
from mini.text.tokens import TokenFile


class NextToken(Task):
    """What language modelling and answers to prompts share."""

    kinds, judged, command, in_parts = ("gpt",), "lm", "sample", True
    tokenizer: Tokenizer

    def losses(self, answers: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy in nats; targets (B, T), IGNORE where nothing is to be predicted."""
        return {"lm": token_loss(answers["lm"], inputs["targets"])}

    def metrics(self, sums: dict[str, Tensor]) -> dict:
        loss, count, n_bytes = (float(sums[name]) for name in ("lm", "count/lm", "bytes"))
        figures = {"val_loss": loss / count}
        return figures | {"val_bpb": bits_per_byte(loss, n_bytes)} if self.tokenizer.lossless and n_bytes else figures

    def write(self, model: Model, prompts: list[list[int]], most: int, stop: bool = True) -> list[list[int]]:
        """The greedy continuations of prompts, of `most` tokens; stop: they end before the first <|endoftext|>."""
        eot, device = self.tokenizer.eot, next(model.parameters()).device
        tokens, lengths = pad(prompts, eot), [len(prompt) for prompt in prompts]
        options = dict(lengths=torch.tensor(lengths, device=device), stop=[eot] * stop)
        out = model.generate(tokens.to(device), most, **options)
        n = out.size(1) - tokens.size(1)  # fewer than `most` where all have ended
        new = (row[length : length + n] for row, length in zip(out.tolist(), lengths, strict=True))
        return [ids[: ids.index(eot)] if stop and eot in ids else ids for ids in new]

    def beats_chance(self, figures: dict) -> bool:
        return figures["val_loss"] < 0.99 * math.log(self.tokenizer.vocab_size)  # which rounding alone does not reach

    def summary(self, result: dict) -> list[str]:
        perplexity = math.exp(min(result["val_loss"], 99))
        line = f"Validation loss {result['val_loss']:.4f} nats per token (perplexity {perplexity:.4g})"
        return [line + (f", {result['val_bpb']:.4f} bits per byte" if "val_bpb" in result else "")]


@dataclass
class LMConfig(Checked):
    """Language modelling."""

    document_mask: bool = option(False, "a token sees nothing of the documents before its own in a window")


class LanguageModelling(NextToken):
    """Windows of max_len tokens that tile the corpus, each with the tokens that follow as targets."""

    Config, pretrains, fixed_shape = LMConfig, True, True

    unit = "windows"

    def __init__(self, train: TokenFile | None, valid: TokenFile, tokenizer: Tokenizer, max_len: int, seed: int,
                 batch_size: int = 1, options: LMConfig | None = None):  # fmt: skip
        judging, train = train is None, train or valid
        self.train, self.valid, self.max_len, self.seed = train.tokens, valid.tokens, max_len, seed
        self.documents = (train.documents, valid.documents) if options and options.document_mask else None
        if self.documents and not judging:
            check_documents(train)
        self.checksum = f"{train.sha256}-{valid.sha256}"
        self.tokenizer, self.notes = tokenizer, []
        self.n = (len(self.train) - 1) // max_len
        self.n_valid = -(-(len(self.valid) - 1) // max_len)
        if self.n < 1 and not judging:
            few = f"the training text has {len(self.train):,} tokens, but a window takes {max_len + 1}"
            raise UserError(f"{few}: give more text or a smaller --max_len")
        if len(self.valid) < 2:
            raise UserError("the validation text has fewer than 2 tokens: give more text or a larger --valid_fraction")

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return config.causal and not config.n_classes

    def check(self, model: Model) -> None:
        if self.documents and model.config.block == "lstm":
            raise UserError("--document_mask: an LSTM carries its state over from document to document; leave it out")

    def batch(self, indices: np.ndarray) -> Batch:
        """The windows of these example numbers: tokens and targets (B, T)."""
        starts = shuffled(indices, self.n, self.seed) * self.max_len
        places = starts[:, None] + np.arange(self.max_len + 1)  # (B, T + 1)
        rows = torch.from_numpy(self.train[places].astype(np.int64))
        size = rows.numel() - len(rows)
        inputs = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
        return Batch(inputs | self.numbers(0, places[:, :-1]), {"lm": size}, size)

    def numbers(self, split: int, places: np.ndarray) -> dict[str, Tensor]:
        """The documents in which places (B, T) of the training text (0) or the other (1) lie, if that matters."""
        if not self.documents:
            return {}
        return {"documents": torch.from_numpy(document_numbers(self.documents[split], places))}

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        """Every token of the validation text once (or of its first `limit` tokens), the last window too."""
        end = min(len(self.valid), limit + 1) if limit else len(self.valid)
        T = self.max_len
        for start in range(0, end - 1, T * batch_size):
            flat = self.valid[start : min(start + T * batch_size + 1, end)].astype(np.int64)
            n = len(flat) - 1  # predictions
            B = -(-n // T)
            inputs, targets = np.zeros(B * T, dtype=np.int64), np.full(B * T, IGNORE, dtype=np.int64)
            inputs[:n], targets[:n] = flat[:-1], flat[1:]
            pair = {"tokens": torch.from_numpy(inputs).view(B, T), "targets": torch.from_numpy(targets).view(B, T)}
            pair |= self.numbers(1, start + np.arange(B * T).reshape(B, T))
            yield Batch(pair, {"lm": n}, n, n_bytes=int(self.tokenizer.byte_lengths[flat[1:]].sum()))

    def sample(self, model: Model) -> str:
        """The beginning of a new document."""
        if self.tokenizer.eot is None:
            return "(no sample: the tokenizer has no <|endoftext|> to begin with)"
        prompt = torch.tensor([[self.tokenizer.eot]], device=next(model.parameters()).device)
        generator = torch.Generator(prompt.device).manual_seed(0)  # the same draw each time: only the model changes
        options = dict(temperature=0.8, top_p=0.95, stop=[self.tokenizer.eot], generator=generator)
        new = model.generate(prompt, min(100, model.config.max_len), **options)[0, 1:].tolist()
        return self.tokenizer.decode([i for i in new if i != self.tokenizer.eot]).strip()

    def example(self) -> list[str]:
        """A prompt to try: the first words of the validation text."""
        words = self.tokenizer.decode(self.valid[1:60].tolist()).split()
        return [" ".join(words[:3])]
