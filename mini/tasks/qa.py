"""Question answering: find the answer to a question in a text, its first and its last token."""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini.model.config import ModelConfig
from mini.model.transformer import Model
from mini.tasks.base import Batch, Task
from mini.tasks.order import Grouped
from mini.tasks.squad import QAConfig, best_spans, collate, collect, cut_windows, judge, read_squad, squad_texts
from mini.text.tokenizer import Tokenizer


class QuestionAnswering(Task):
    """Questions on texts as windows, each with the answer's first and last token as targets.

    questions: those of validation; train, valid: windows. Both files may be "python-docs", which knows its two parts.
    """

    Config, kinds, command, judged = QAConfig, ("bert",), "answer", "qa"
    best = "f1"
    files = (".json", "python-docs")

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int, batch_size: int,
                 options: QAConfig):  # fmt: skip
        self.tokenizer, self.options = tokenizer, options
        self.notes: list[str] = []
        questions = read_squad(train, self.notes, "train")
        self.questions = read_squad(valid, self.notes, "valid")
        self.has_impossible = any(not question.answers for question in questions)
        self.train = cut_windows(questions, tokenizer, max_len, options, self.notes)
        self.valid = cut_windows(self.questions, tokenizer, max_len, options, self.notes)
        self.n = len(self.train)
        self.order = Grouped(np.array([len(window.ids) for window in self.train]), seed, batch_size)
        digest = hashlib.sha256()
        for w in [*self.train, *self.valid]:
            digest.update(np.int32([len(w.ids), w.begin, w.first, w.last]).tobytes() + w.ids.tobytes())
        self.checksum = digest.hexdigest()

    @staticmethod
    def texts(path: str) -> Iterator[str]:
        return squad_texts(path)

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return config.spans

    def heads(self) -> dict[str, object]:
        return dict(spans=True)

    def batch(self, indices: np.ndarray) -> Batch:
        return collate([self.train[i] for i in self.order(indices)], self.tokenizer)

    def validation(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        order = sorted(range(len(self.valid)), key=lambda i: len(self.valid[i].ids))  # alike lengths: less padding
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield collate([self.valid[i] for i in rows], self.tokenizer, rows)

    # ------------------------------------------------------------ losses and figures
    def losses(self, answers: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropies of the first token and of the last, over the window's tokens."""
        first, last = answers["qa"].unbind(1)  # (B, T) each
        sides = ((first, inputs["starts"]), (last, inputs["ends"]))
        return {"qa": sum(F.cross_entropy(logits, targets, reduction="sum") for logits, targets in sides)}

    def measure(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, and the best spans of these windows at their rows of a table: the sum over batches fills it."""
        answers, options = model.answers(inputs), self.options
        spans = best_spans(*answers["qa"].unbind(1), inputs["context"], options.n_best, options.max_answer)
        table = torch.zeros(len(self.valid), spans.size(1), dtype=torch.float64)
        table[inputs["rows"].cpu()] = spans.cpu().double()
        return self.losses(answers, inputs) | {"spans": table}

    def metrics(self, sums: dict[str, Tensor]) -> dict:
        answers = collect(self.valid, sums["spans"].cpu())
        figures = judge(self.questions, answers, self.has_impossible)
        return {"val_loss": float(sums["qa"] / sums["count/qa"]), **figures}

    def beats_chance(self, figures: dict) -> bool:
        return figures["val_loss"] < 0.99 * np.mean([math.log(len(window.ids)) for window in self.valid])

    def summary(self, result: dict) -> list[str]:
        n = len(self.questions)
        line = f"Exact match {result['exact_match']:.4f}, F1 {result['f1']:.4f} of {n:,} questions"
        lines = [line + f" (validation loss {result['val_loss']:.4f} nats)"]
        if "null_threshold" in result:
            threshold = f"{result['null_threshold']:.2f}"
            lines.append(f"No answer is given where (score of no answer - score of the best span) is over {threshold}")
            if "has_answer_f1" in result:
                lines.append(f"F1 of the questions with an answer: {result['has_answer_f1']:.4f}")
            if "no_answer_accuracy" in result:
                lines.append(f"Questions without an answer that get none: {result['no_answer_accuracy']:.4f}")
        return lines

    def example(self) -> list[str]:
        question = self.questions[0]
        return ["--question", question.question, "--context", question.context]
