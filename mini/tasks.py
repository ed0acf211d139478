"""What a run learns: each task joins a data set, a loss of the model, and the figures that judge it.

A task has
    data                    batch(indices), validation(batch_size), and n, the number of training examples
    labels                  of a classifier, else none
    fixed_shape             whether every batch has the same shape, and next to no padding
    best                    the validation figure whose best weights are kept, or None to keep the last
    loss(model, inputs)     {name: summed loss}; the loop divides by Batch.counts[name]
    measure(model, inputs)  {name: tensor} of sums over a validation batch; the loop adds them up over all of them
    metrics(sums)           those sums and counts as figures
    beats_chance(figures)   whether they are better than those of a guess
    summary(result)         lines that tell a person what the final figures mean
    sample(model)           a text that shows a person what the model can do, or None
    command, example()      the command of `python -m mini` that uses the run, and what to try it with
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini.bert import real_tokens
from mini.data import LMWindows, MaskedSentences
from mini.labelled import LabelledTexts, PromptAnswers
from mini.metrics import bits_per_byte, classification_report, confusion_matrix
from mini.squad import QuestionAnswers, best_spans, collect, judge
from mini.tokenizer import Tokenizer


class LanguageModelling:
    """Predict the next token of running text."""

    fixed_shape, best, command = True, None, "sample"
    labels: tuple[str, ...] = ()

    def __init__(self, data: LMWindows | PromptAnswers, tokenizer: Tokenizer):
        self.data, self.tokenizer = data, tokenizer

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return model.loss(**inputs)

    measure = loss

    def metrics(self, sums: dict) -> dict:
        loss, count, n_bytes = (float(sums[name]) for name in ("loss", "count/loss", "count/bytes"))
        figures = {"val_loss": loss / count}
        return figures | {"val_bpb": bits_per_byte(loss, n_bytes)} if self.tokenizer.lossless else figures

    def beats_chance(self, figures: dict) -> bool:
        return figures["val_loss"] < 0.99 * math.log(self.tokenizer.vocab_size)  # which rounding alone does not reach

    def summary(self, result: dict) -> list[str]:
        perplexity = math.exp(min(result["val_loss"], 99))
        line = f"Validation loss {result['val_loss']:.4f} nats per token (perplexity {perplexity:.4g})"
        return [line + (f", {result['val_bpb']:.4f} bits per byte" if "val_bpb" in result else "")]

    def sample(self, model: nn.Module) -> str:
        """The beginning of a new document."""
        if self.tokenizer.eot is None:
            return "(no sample: the tokenizer has no <|endoftext|> to begin with)"
        start = torch.tensor([[self.tokenizer.eot]], device=next(model.parameters()).device)
        generator = torch.Generator(start.device).manual_seed(0)  # the same draw each time: only the model changes
        options = dict(temperature=0.8, top_p=0.95, stop=[self.tokenizer.eot], generator=generator)
        new = model.generate(start, min(100, model.config.max_len), **options)[0, 1:].tolist()
        return self.tokenizer.decode([i for i in new if i != self.tokenizer.eot]).strip()

    def example(self) -> list[str]:
        """A prompt to try: the first words of the validation text."""
        words = self.tokenizer.decode(self.data.valid[1:60].tolist()).split()
        return [" ".join(words[:3])]


class Answering(LanguageModelling):
    """Predict the answer to a prompt."""

    fixed_shape, best = False, "val_loss"

    def sample(self, model: nn.Module) -> str:
        ids, start = self.data.valid[0]
        prompt = torch.tensor([ids[:start]], device=next(model.parameters()).device)
        new = model.generate(prompt, 40, stop=[self.tokenizer.eot])[0, start:].tolist()
        answer = self.tokenizer.decode([i for i in new if i != self.tokenizer.eot])
        return f"{self.tokenizer.decode(ids[:start])}\n-> {answer}"

    def example(self) -> list[str]:
        ids, start = self.data.valid[0]
        return [self.tokenizer.decode(ids[:start])]


class MaskedLanguageModelling:
    """Fill masked tokens, and tell the next sentence from a random one.

    The figures stand beside those of guessing by frequency alone, without a look at the text: a loss that has not
    left this "unigram plateau" has learnt nothing from context.
    """

    fixed_shape, best, command = True, None, "fill"
    labels: tuple[str, ...] = ()

    def __init__(self, data: MaskedSentences, tokenizer: Tokenizer):
        self.data, self.tokenizer = data, tokenizer
        tokens = data.train.tokens
        some = tokens[:: max(1, len(tokens) // 10_000_000)]  # ten millions tell the frequencies
        counts = np.bincount(some, minlength=tokenizer.vocab_size) + 1.0  # none is impossible
        t = tokenizer
        counts[[i for i in (t.pad, t.cls, t.sep, t.mask, t.eot) if i is not None]] = 1e-9  # never masked, but [UNK] is
        self.log_frequency = torch.from_numpy(np.log(counts / counts.sum()))

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return model.loss(**inputs)

    def measure(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = dict(inputs)
        targets, unrelated = inputs.pop("targets"), inputs.pop("unrelated", None)
        mlm, nsp = model.predict(**inputs)
        chosen = targets >= 0
        logits, targets = mlm.float()[chosen], targets[chosen]  # (N, V), (N,)
        sums = {
            "mlm": F.cross_entropy(logits, targets, reduction="sum"),
            "mlm_hits": (logits.argmax(-1) == targets).sum(),
            "unigram": -self.log_frequency[targets.cpu()].sum(),
            "frequent_hits": (targets == int(self.log_frequency.argmax())).sum(),
        }
        if nsp is not None:
            sums["nsp"] = F.cross_entropy(nsp.float(), unrelated, reduction="sum")
            sums["nsp_hits"], sums["unrelated"] = (nsp.argmax(-1) == unrelated).sum(), unrelated.sum()
        return sums

    def metrics(self, sums: dict) -> dict:
        n = float(sums["count/mlm"])
        mlm, hits, unigram, frequent = (
            float(sums[name]) / n for name in ("mlm", "mlm_hits", "unigram", "frequent_hits")
        )
        figures = {"val_loss": mlm, "mlm_loss": mlm, "unigram_loss": unigram, "mlm_accuracy": hits}
        figures["unigram_accuracy"] = frequent
        if "nsp" in sums:
            n = float(sums["count/nsp"])
            nsp, hits, unrelated = (float(sums[name]) / n for name in ("nsp", "nsp_hits", "unrelated"))
            figures |= {"nsp_loss": nsp, "nsp_accuracy": hits, "nsp_chance": max(unrelated, 1 - unrelated)}
            figures["val_loss"] += nsp
        return figures

    def beats_chance(self, figures: dict) -> bool:
        return figures["mlm_loss"] < figures["unigram_loss"]

    def summary(self, result: dict) -> list[str]:
        lines = [
            f"Masked tokens: validation loss {result['mlm_loss']:.4f} nats (by frequency alone "
            f"{result['unigram_loss']:.4f}), accuracy {result['mlm_accuracy']:.4f} (always the most frequent token "
            f"{result['unigram_accuracy']:.4f})"
        ]
        if "nsp_loss" in result:
            lines.append(
                f"Next sentence: validation loss {result['nsp_loss']:.4f} nats (by chance {math.log(2):.4f}), "
                f"accuracy {result['nsp_accuracy']:.4f} (by chance {result['nsp_chance']:.4f})"
            )
        return lines

    @torch.no_grad()
    def sample(self, model: nn.Module, n: int = 4) -> str:
        """Of the first validation texts, one masked place each: what stood there, and the three likeliest tokens."""
        inputs = next(self.data.validation(n)).to(next(model.parameters()).device).inputs
        targets = inputs["targets"]
        mlm, _ = model.predict(inputs["tokens"], inputs["lengths"], inputs["places"], inputs.get("segments"))
        values, guesses = mlm.float().softmax(-1).topk(3)  # (B, M, 3)
        lines = []
        for row in range(len(targets)):
            shown = inputs["tokens"].gather(1, inputs["places"])[row] == self.tokenizer.mask  # (M,)
            at = int((shown & (targets[row] >= 0)).int().argmax())
            place, ids, chosen = int(inputs["places"][row, at]), inputs["tokens"][row].clone(), targets[row] >= 0
            ids[inputs["places"][row, chosen]] = targets[row, chosen]
            first, last = max(1, place - 12), min(int(inputs["lengths"][row]), place + 13)
            before, after = (self.readable(part) for part in (ids[first:place], ids[place + 1 : last]))
            likeliest = zip(guesses[row, at].tolist(), values[row, at].tolist(), strict=True)
            named = ", ".join(f"{show_token(self.tokenizer, token)} {p:.2f}" for token, p in likeliest)
            was = show_token(self.tokenizer, int(targets[row, at]))
            lines.append(f"{before} [MASK] {after}\n    {named}; it was {was}")
        return "\n".join(lines)

    def readable(self, ids: Tensor) -> str:
        return " ".join(self.tokenizer.decode([i for i in ids.tolist() if i != self.tokenizer.cls]).split())

    def example(self) -> list[str]:
        """The validation text's first words, one of them masked."""
        begin = int(self.data.valid.begin(np.zeros(1, np.int64), np.zeros(1, np.int64))[0])
        words = self.tokenizer.decode(self.data.valid.tokens[begin : begin + 60].tolist()).split()[:8]
        return [" ".join([*words[:2], "[MASK]", *words[3:]])]


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """A token as a person reads it: without spaces around it, but what cannot be seen in quotation marks."""
    text = tokenizer.decode([token]).strip(" ")
    return text if text and text.isprintable() else repr(text)


class Classification:
    """Tell the class of a text."""

    fixed_shape, best, command = False, "accuracy", "classify"

    def __init__(self, data: LabelledTexts):
        self.data, self.labels = data, data.labels

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = dict(inputs)
        labels, weights = inputs.pop("labels"), self.data.class_weights
        logits = model.classify(**inputs).float()
        weights = None if weights is None else weights.to(logits.device)
        return {"loss": F.cross_entropy(logits, labels, weights, reduction="sum")}

    def measure(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = model.classify(**inputs).float()  # (B, n_classes)
        confusion = confusion_matrix(labels.cpu().numpy(), logits.argmax(dim=-1).cpu().numpy(), logits.size(-1))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss, "confusion": torch.from_numpy(confusion).double()}

    def metrics(self, sums: dict) -> dict:
        confusion = np.rint(sums["confusion"].cpu().numpy()).astype(int)
        return {
            "val_loss": float(sums["loss"] / sums["count/loss"]),
            **classification_report(confusion, self.data.labels),
        }

    def beats_chance(self, figures: dict) -> bool:
        n = np.sum(figures["confusion"])
        return figures["mcc"] > 2 / math.sqrt(n)  # of n guesses the correlation has the standard deviation 1 / sqrt(n)

    def summary(self, result: dict) -> list[str]:
        lines = [
            f"Validation loss {result['val_loss']:.4f} nats, accuracy {result['accuracy']:.4f} (always the largest "
            f"class: {result['majority']:.4f}), F1 {result['f1']:.4f} macro and {result['weighted_f1']:.4f} weighted, "
            f"MCC {result['mcc']:.4f}",
            f"{'':16} precision  recall      F1  | predicted {', '.join(result['classes'])}",
        ]
        for (name, row), counts in zip(result["classes"].items(), result["confusion"], strict=True):
            rates = f"{row['precision']:9.4f} {row['recall']:7.4f} {row['f1']:7.4f}"
            lines.append(f"{name[:16]:16} {rates}  | {' '.join(map(str, counts))}")
        return lines

    def sample(self, model: nn.Module) -> None:
        return None

    def example(self) -> list[str]:
        return ["some text"]


class QuestionAnswering:
    """Find the answer to a question in a text: its first and its last token."""

    fixed_shape, best, command = False, "f1", "answer"
    labels: tuple[str, ...] = ()

    def __init__(self, data: QuestionAnswers):
        self.data = data

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of the two cross-entropies, over the window's tokens."""
        first, last = self.logits(model, inputs)
        first, last = (F.cross_entropy(a, inputs[b], reduction="sum") for a, b in ((first, "starts"), (last, "ends")))
        return {"loss": (first + last) / 2}

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, T) of the first token and of the last; padding cannot be either."""
        logits = model.find_spans(inputs["tokens"], inputs["lengths"], inputs["segments"])
        real = real_tokens(inputs["tokens"], inputs["lengths"])
        first, last = (side.float().masked_fill(~real, -1e9) for side in logits)
        return first, last

    def measure(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, and the best spans of these windows at their rows of a table: the sum over batches fills it."""
        options = self.data.options
        spans = best_spans(*self.logits(model, inputs), inputs["context"], options.n_best, options.max_answer)
        table = torch.zeros(len(self.data.valid), spans.size(1), dtype=torch.float64)
        table[inputs["rows"].cpu()] = spans.cpu().double()
        return self.loss(model, inputs) | {"spans": table}

    def metrics(self, sums: dict) -> dict:
        answers = collect(self.data.valid, sums["spans"].cpu())
        figures = judge(self.data.questions, answers, self.data.has_impossible)
        return {"val_loss": float(sums["loss"] / sums["count/loss"]), **figures}

    def beats_chance(self, figures: dict) -> bool:
        return figures["val_loss"] < 0.99 * np.mean([math.log(len(window.ids)) for window in self.data.valid])

    def summary(self, result: dict) -> list[str]:
        n = len(self.data.questions)
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

    def sample(self, model: nn.Module) -> None:
        return None

    def example(self) -> list[str]:
        question = self.data.questions[0]
        return ["--question", question.question, "--context", question.context]
