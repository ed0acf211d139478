"""Question answering: find the answer to a question in a text, its first and its last token.

SQuAD's files, windows over long texts, the best spans, and how good they are. Data: Rajpurkar et al. 2016 (v1.1) and
2018 (v2.0, where some questions have no answer); the method is that of Devlin et al. 2019, §4.2 and §4.3. An answer's
text is always cut out of its context by characters, never decoded.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini.flags import Checked, UserError, of_type, option
from mini.model.bert import NEVER
from mini.model.config import ModelConfig
from mini.model.transformer import Model
from mini.storage import read_json
from mini.tasks.base import Batch, FileTask
from mini.tasks.inputs import cut_note, cuts, pad
from mini.tasks.metrics import answer_f1, exact_match, with_error
from mini.text import python_docs
from mini.text.tokenizer import Tokenizer


@dataclass
class QAConfig(Checked):
    """Answers as spans of a text (Devlin et al. 2019, §4.2)."""

    stride: int = option(64, "tokens between the starts of a long text's windows", low=1)
    max_question: int = option(64, "tokens of a question that are read", low=1)
    max_answer: int = option(30, "longest answer in tokens", low=1)
    n_best: int = option(20, "candidates that each window offers", low=1)


@dataclass
class Question:
    id: str
    question: str
    context: str
    answers: list[str]  # what people answered; nothing if the context does not tell
    starts: list[int]  # the character of the context at which each begins


@dataclass
class Window:
    """[CLS] question [SEP] a stretch of the context [SEP]."""

    number: int  # of the window
    question: int  # its number in the list of questions
    context: str
    ids: np.ndarray  # (T,) int32
    begin: int  # the place of the first token of the context
    spans: np.ndarray  # (tokens of the stretch, 2): each token's characters [start, end) of the context
    first: int  # the place of the answer's first token, and of its last;
    last: int  # 0 and 0, which is [CLS], if the answer is not wholly in this stretch


@dataclass
class Answer:
    text: str
    score: float
    start: int  # text == context[start:end]
    end: int


class QuestionAnswering(FileTask):
    """Windows over texts, each with the answer's first and last token as targets. "python-docs" knows its two parts."""

    Config, kinds, command, judged = QAConfig, ("bert",), "answer", "qa"
    best = "f1"
    files = (".json", "python-docs")
    unit, additive = "questions", False  # one whose windows are missing would count as unanswered
    threshold: float | None = None  # above which there is no answer; None: what is best for these questions

    def __init__(self, train: str, valid: str, tokenizer: Tokenizer, max_len: int, seed: int, batch_size: int,
                 options: QAConfig):  # fmt: skip
        self.tokenizer, self.options, self.max_len = tokenizer, options, max_len
        self.notes: list[str] = []
        questions, self.questions = self.read_both(
            train, valid, lambda path, split: read_squad(path, self.notes, split), lambda question: question.context
        )
        valid = valid or f"{train}, held out"
        self.has_impossible = any(not question.answers for question in questions)
        self.train, train_cut = cut_windows(questions, tokenizer, max_len, options)
        self.valid, valid_cut = cut_windows(self.questions, tokenizer, max_len, options)
        self.cut = {"train": train_cut, "valid": valid_cut}
        longest = longest_question(max_len, options)
        self.notes += questions_note(train, train_cut, longest) + questions_note(valid, valid_cut, longest)
        self.group(seed, batch_size)
        self.n_valid = len(self.questions)
        digest = hashlib.sha256()
        for w in [*self.train, *self.valid]:
            digest.update(np.int32([len(w.ids), w.begin, w.first, w.last]).tobytes() + w.ids.tobytes())
        self.checksum = digest.hexdigest()

    @staticmethod
    def texts(path: str) -> Iterator[str]:
        for question in read_squad(path, []):
            yield from (question.context, question.question)

    @classmethod
    def fits(cls, config: ModelConfig) -> bool:
        return config.spans

    def settle(self, result: dict) -> None:
        self.threshold = of_type(result.get("null_threshold"), float | None, "result.json: null_threshold")

    def heads(self) -> dict[str, object]:
        return dict(spans=True)

    @staticmethod
    def length(example: Window) -> int:
        return len(example.ids)

    def collate(self, examples: list[Window]) -> Batch:
        return collate(examples, self.tokenizer, self.max_len)

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
        figures = judge(self.questions, answers, self.has_impossible, self.threshold)
        if self.n:  # of a judgement alone the standard errors are told, too
            figures = {name: value for name, value in figures.items() if not name.endswith("_se")}
        return {"val_loss": float(sums["qa"] / sums["count/qa"]), **figures}

    def beats_chance(self, figures: dict) -> bool:
        return figures["val_loss"] < 0.99 * np.mean([math.log(len(window.ids)) for window in self.valid])

    def summary(self, result: dict) -> list[str]:
        n = len(self.questions)
        line = f"Exact match {result['exact_match']:.4f}, F1 {result['f1']:.4f} of {n:,} questions"
        lines = [line + f" (validation loss {result['val_loss']:.4f} nats)"]
        if "null_threshold" in result:
            lines.append(f"No answer where its score less that of the best span is over {result['null_threshold']:.2f}")
            if "has_answer_f1" in result:
                lines.append(f"F1 of the questions with an answer: {result['has_answer_f1']:.4f}")
            if "no_answer_accuracy" in result:
                lines.append(f"Questions without an answer that get none: {result['no_answer_accuracy']:.4f}")
        return lines

    def example(self) -> list[str]:
        question = self.questions[0]
        return ["--question", question.question, "--context", question.context]


# ---------------------------------------------------------------- files
def read_squad(path: str | Path, notes: list[str], split: str = "train") -> list[Question]:
    """The questions of a file in SQuAD's form, or of the split "train" or "valid" of "python-docs".

    What cannot be used is left out, and a line about it is added to notes. Raises UserError for a file that is
    not of that form, and if nothing is left.
    """
    content = python_docs.questions(split) if str(path) == "python-docs" else read_json(path)
    questions, skipped, n_wrong = [], {}, 0
    for place, context, qa in entries(content, path):
        question = member(qa, "question", str, place)
        # v2.0 gives an impossible question "plausible_answers" beside its empty "answers".
        answers = [] if qa.get("is_impossible") else member(qa, "answers", list, place)
        found = []
        for m, answer in enumerate(answers):
            text = member(answer, "text", str, f"{place}.answers[{m}]")
            start = member(answer, "answer_start", int, f"{place}.answers[{m}]")
            if text.strip() and start >= 0 and context.startswith(text, start):
                found.append((text, start))
        name = str(qa.get("id", place))
        if not question.strip():
            skipped.setdefault("they are empty", []).append(name)
        elif not context.strip():
            skipped.setdefault("their context is empty", []).append(name)
        elif answers and not found:
            skipped.setdefault("their answer is not at its place in the context", []).append(name)
        else:
            questions.append(Question(name, question, context, [text for text, _ in found], [at for _, at in found]))
            n_wrong += len(answers) - len(found)
    n = len(questions) + sum(map(len, skipped.values()))
    lines = [f"{path}: {len(ids)} of {n} questions skipped: {why} (first: {ids[0]})" for why, ids in skipped.items()]
    if n_wrong:
        lines.append(f"{path}: {n_wrong} answers of the other questions left out: not at their place in the context")
    if not questions:
        raise UserError(lines[0] if lines else f"{path}: no questions")
    notes += lines
    return questions


def entries(content: dict, path: str | Path) -> Iterator[tuple[str, str, dict]]:
    """(its place, for messages; its context; the entry) of each question."""
    for i, article in enumerate(member(content, "data", list, str(path))):
        for j, paragraph in enumerate(member(article, "paragraphs", list, f"{path}: data[{i}]")):
            place = f"{path}: data[{i}].paragraphs[{j}]"
            context = member(paragraph, "context", str, place)
            for k, qa in enumerate(member(paragraph, "qas", list, place)):
                yield f"{place}.qas[{k}]", context, qa


def member(node, name: str, kind: type, place: str):
    if not isinstance(node, dict) or name not in node:
        raise UserError(f"{place}: no {name!r}")
    if not isinstance(node[name], kind):
        raise UserError(f"{place}: {name!r} should be {kind.__name__}, not {type(node[name]).__name__}")
    return node[name]


# ---------------------------------------------------------------- questions -> windows
def cut_windows(
    questions: list[Question], tokenizer: Tokenizer, max_len: int, options: QAConfig
) -> tuple[list[Window], dict[str, int]]:
    """The windows of all questions, in their order: a context too long for one is covered by several.

    They begin options.stride tokens apart, less where a window has no room for so many. A question is cut to
    options.max_question tokens, and to half of max_len: of which cuts() is returned, too.
    Raises UserError if max_len leaves no room for a context.
    """
    if None in (tokenizer.cls, tokenizer.sep, tokenizer.pad):
        raise UserError("the tokenizer has no [CLS], [SEP] and [PAD], which questions need: use another one")
    windows, context, lengths = [], None, []
    longest = longest_question(max_len, options)
    for number, question in enumerate(questions):
        if question.context != context:  # several questions in a row share theirs
            context = question.context
            ids, spans = tokenizer.encode_with_offsets(context)
        asked = tokenizer.encode(question.question)
        lengths.append(len(asked))
        head = [tokenizer.cls, *asked[:longest], tokenizer.sep]
        room = max_len - len(head) - 1
        if room < 1:
            raise UserError(f"--max_len {max_len}: no room for a context beside a question; give a larger one")
        first, last = answer_tokens(question, spans)
        step = min(options.stride, room)
        for at in range(0, max(0, len(ids) - room) + step, step):
            row = np.concatenate([head, ids[at : at + room], [tokenizer.sep]]).astype(np.int32)
            inside = at <= first <= last < at + room
            places = (first - at + len(head), last - at + len(head)) if inside else (0, 0)
            windows.append(Window(len(windows), number, context, row, len(head), spans[at : at + room], *places))
    return windows, cuts(lengths, [longest] * len(lengths))


def longest_question(max_len: int, options: QAConfig) -> int:
    return min(options.max_question, max_len // 2)


def questions_note(where: str, cut: dict[str, int], longest: int) -> list[str]:
    return cut_note(where, f"questions are cut to {longest} tokens", cut)


def answer_tokens(question: Question, spans: np.ndarray) -> tuple[int, int]:
    """The first and the last token of the first answer, white space at its ends aside; (-1, -1) without an answer."""
    if not question.answers:
        return -1, -1
    text, start = question.answers[0], question.starts[0]
    start += len(text) - len(text.lstrip())
    end = start + len(text.strip())
    return int(np.searchsorted(spans[:, 1], start, "right")), int(np.searchsorted(spans[:, 0], end, "left")) - 1


def collate(windows: list[Window], tokenizer: Tokenizer, most: int) -> Batch:
    """tokens, segments (B, T) padded as pad() does it, lengths, starts, ends and the windows' numbers (rows), (B,).

    And context (B, T): True where an answer may lie.
    """
    tokens = pad([window.ids for window in windows], tokenizer.pad, most)
    figures = torch.tensor([(w.number, len(w.ids), w.begin, w.first, w.last) for w in windows])
    rows, lengths, begins, starts, ends = figures.T.contiguous()  # (B,) each
    places = torch.arange(tokens.size(1))
    second = (places >= begins[:, None]) & (places < lengths[:, None])  # (B, T): the context and its [SEP]
    context = second & (places < lengths[:, None] - 1)
    inputs = {"tokens": tokens, "segments": second.long(), "lengths": lengths, "starts": starts, "ends": ends}
    return Batch(inputs | {"rows": rows, "context": context}, {"qa": 2 * len(windows)}, int(lengths.sum()))


# ---------------------------------------------------------------- logits -> answers
def best_spans(start: Tensor, end: Tensor, context: Tensor, n_best: int, max_answer: int) -> Tensor:
    """The n_best spans of each window, by their score: the logit of the first token plus that of the last.

    start, end: logits (B, T); context (B, T): True where an answer may lie. Returns (B, 1 + 3 n_best): the score
    of no answer, which is that of [CLS], then for each span its score, first and last token, with
    first <= last < first + max_answer. Where a window has fewer spans, their score is NEVER.
    """
    # An infinity would outweigh NEVER, and a place outside of the context be chosen.
    start, end = (logits.float().nan_to_num().clamp(NEVER / 10, -NEVER / 10) for logits in (start, end))
    null = start[:, :1] + end[:, :1]  # (B, 1)
    reach = min(max_answer, start.size(1))
    start, end = start.masked_fill(~context, NEVER), end.masked_fill(~context, NEVER)
    ends = F.pad(end, (0, reach - 1), value=NEVER).unfold(1, reach, 1)  # (B, T, reach): ends[:, t, k] = end[:, t + k]
    scores = (start[:, :, None] + ends).flatten(1)  # (B, T * reach)
    scores, where = scores.topk(min(n_best, scores.size(1)))  # (B, n)
    first, more = where // reach, where % reach
    spans = torch.stack([scores, first, first + more], dim=-1)  # (B, n, 3)
    spans = torch.where(scores[:, :, None] > NEVER / 2, spans, spans.new_tensor([NEVER, 0, 0]))
    missing = spans.new_tensor([NEVER, 0, 0]).expand(len(spans), n_best - spans.size(1), 3)
    return torch.cat([null, torch.cat([spans, missing], dim=1).flatten(1)], dim=1)


def collect(windows: list[Window], predictions: np.ndarray | Tensor) -> list[tuple[float, list[Answer]]]:
    """From rows of `best_spans`, one per window: for each question the score of no answer, and its best answers.

    No answer scores what it scores in its worst window (Devlin's run_squad.py); of a stretch of text that several
    windows offer the best score counts. There are at most n_best answers, the best first.
    """
    rows = np.asarray(predictions, dtype=np.float64)
    nulls: dict[int, float] = {}
    found: dict[int, dict[tuple[int, int], Answer]] = {}
    for window, row in zip(windows, rows, strict=True):
        nulls[window.question] = min(float(row[0]), nulls.get(window.question, np.inf))
        answers = found.setdefault(window.question, {})
        for score, first, last in row[1:].reshape(-1, 3).tolist():
            if score <= NEVER / 2:
                continue
            start = int(window.spans[int(first) - window.begin, 0])
            text = window.context[start : int(window.spans[int(last) - window.begin, 1])]
            start += len(text) - len(text.lstrip())  # a token of a BPE may begin with a space
            text = text.strip()
            key = start, start + len(text)
            if text and (key not in answers or score > answers[key].score):
                answers[key] = Answer(text, score, *key)
    n_best = (rows.shape[1] - 1) // 3
    ordered = {q: sorted(a.values(), key=lambda a: (-a.score, a.start, a.end)) for q, a in found.items()}
    return [(nulls[q], ordered[q][:n_best]) for q in sorted(ordered)]


# ---------------------------------------------------------------- judgement
def judge(questions: list[Question], answers: list[tuple[float, list[Answer]]], has_impossible: bool,
          threshold: float | None = None) -> dict:  # fmt: skip
    """Exact match and F1, as the official scripts count them, of what `collect` returns; and {name}_se.

    If a question may have no answer, it gets none where (score of no answer - best score) > null_threshold: the one
    given, or the best for the F1 of these very questions, as is usual (Devlin et al. 2019, §4.3). The figures
    are then also given for the questions with an answer, and for those without, as far as there are any.
    """
    texts = [found[0].text if found else "" for _, found in answers]
    pairs = list(zip(texts, questions, strict=True))
    exact = np.array([exact_match(text, question.answers) for text, question in pairs])
    f1 = np.array([answer_f1(text, question.answers) for text, question in pairs])
    impossible = np.array([not question.answers for question in questions])
    if threshold is None and not has_impossible and not impossible.any():
        return with_error("exact_match", exact) | with_error("f1", f1)
    differences = np.array([null - (found[0].score if found else NEVER) for null, found in answers])
    threshold = best_threshold(differences, f1, impossible) if threshold is None else threshold
    silent = differences > threshold
    exact, f1 = np.where(silent, impossible, exact), np.where(silent, impossible, f1)
    figures = with_error("exact_match", exact) | with_error("f1", f1) | {"null_threshold": threshold}
    if not impossible.all():
        figures |= with_error("has_answer_f1", f1[~impossible])
    if impossible.any():
        figures |= with_error("no_answer_accuracy", exact[impossible])
    return figures


def best_threshold(differences: np.ndarray, f1: np.ndarray, impossible: np.ndarray) -> float:
    """The threshold for which F1 is highest, if questions whose difference is above it get no answer.

    f1: of the answers, if they are given. Of equally good ones the lowest. (find_best_thresh of evaluate-v2.0.py.)
    """
    order = np.argsort(differences, kind="stable")
    ordered = differences[order]
    gains = np.concatenate([[0], np.cumsum((f1 - impossible)[order])])  # by k answers, over none at all
    apart = np.concatenate([[True], ordered[1:] > ordered[:-1], [True]])  # no threshold parts equal differences
    k = int(np.where(apart, gains, -np.inf).argmax())
    return float(ordered[k - 1] if k else ordered[0] - 1)
