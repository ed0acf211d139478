"""What a run learns: each task joins a data set, a loss of the model, and the figures that judge it.

A task has
    data                    batch(indices), validation(batch_size), and n, the number of training examples
    fixed_shape             whether every batch has the same shape, full of real tokens
    best                    the validation figure whose best weights are kept, or None to keep the last
    loss(model, inputs)     {name: summed loss}; the loop divides by Batch.counts[name]
    measure(model, inputs)  {name: tensor} of sums over a validation batch; the loop adds them up over all of them
    metrics(sums)           those sums and counts as figures
    sample(model)           a text that shows a person what the model can do, or None
    example()               an input to try it with
"""

import numpy as np
import torch
from torch import Tensor, nn

from mini.data import LabelledTexts, LMWindows, PromptAnswers
from mini.metrics import bits_per_byte, classification_report, confusion_matrix
from mini.tokenizer import Tokenizer


class LanguageModelling:
    """Predict the next token of running text."""

    fixed_shape, best = True, None

    def __init__(self, data: LMWindows | PromptAnswers, tokenizer: Tokenizer):
        self.data, self.tokenizer = data, tokenizer

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return model.loss(**inputs)

    measure = loss

    def metrics(self, sums: dict) -> dict:
        loss, count, n_bytes = (float(sums[name]) for name in ("loss", "count/loss", "count/bytes"))
        return {"val_loss": loss / count, "val_bpb": bits_per_byte(loss, n_bytes)}

    def sample(self, model: nn.Module) -> str:
        """The beginning of a new document."""
        if self.tokenizer.eot is None:
            return "(no sample: the tokenizer has no <|endoftext|> to begin with)"
        start = torch.tensor([[self.tokenizer.eot]], device=next(model.parameters()).device)
        generator = torch.Generator(start.device).manual_seed(0)  # the same draw each time: only the model changes
        options = dict(temperature=0.8, top_p=0.95, stop=[self.tokenizer.eot], generator=generator)
        new = model.generate(start, min(100, model.config.max_len), **options)[0, 1:].tolist()
        return self.tokenizer.decode([i for i in new if i != self.tokenizer.eot]).strip()

    def example(self) -> str:
        """A prompt to try: the first words of the validation text."""
        words = self.tokenizer.decode(self.data.valid[1:60].tolist()).split()
        return " ".join(words[:3])


class Answering(LanguageModelling):
    """Predict the answer to a prompt."""

    fixed_shape, best = False, "val_loss"

    def sample(self, model: nn.Module) -> str:
        ids, start = self.data.valid[0]
        prompt = torch.tensor([ids[:start]], device=next(model.parameters()).device)
        new = model.generate(prompt, 40, stop=[self.tokenizer.eot])[0, start:].tolist()
        answer = self.tokenizer.decode([i for i in new if i != self.tokenizer.eot])
        return f"{self.tokenizer.decode(ids[:start])}\n-> {answer}"

    def example(self) -> str:
        ids, start = self.data.valid[0]
        return self.tokenizer.decode(ids[:start])


class Classification:
    """Tell the class of a text."""

    fixed_shape, best = False, "accuracy"

    def __init__(self, data: LabelledTexts):
        self.data = data

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return model.classification_loss(**inputs)

    def measure(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = model.classify(**inputs).float()  # (B, n_classes)
        confusion = confusion_matrix(labels.cpu().numpy(), logits.argmax(dim=-1).cpu().numpy(), logits.size(-1))
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss, "confusion": torch.from_numpy(confusion).double()}

    def metrics(self, sums: dict) -> dict:
        confusion = np.rint(sums["confusion"].cpu().numpy()).astype(int)
        return {
            "val_loss": float(sums["loss"] / sums["count/loss"]),
            **classification_report(confusion, self.data.labels),
        }

    def sample(self, model: nn.Module) -> None:
        return None

    def example(self) -> str:
        return "some text"
