"""Distillation: a small model, the student, learns from what a large one, the teacher, computes on the same input.

Hinton et al. 2015: the teacher's probabilities say more than a label, namely which wrong answers are nearly right. A
temperature T > 1 lifts these small probabilities, so that they count.
    soft         T² KL(p_T ‖ p_S), p = softmax(logits / T)

Sanh et al. 2019, "DistilBERT": the same while pretraining, by a student that begins with every other layer of its
teacher; and its last hidden states point where the teacher's do.
    cosine       1 - cos(h_S, h_T)

Jiao et al. 2020, "TinyBERT": a narrower student copies its teacher's inside layer by layer, seen through a matrix W
that it learns; first on plain text, then on a task. The answers come last (mini/teach.py has the four steps).
    embedding    MSE(E_S W, E_T)      what enters the first block (eq. 9)
    hidden       MSE(H_S W, H_T)      what leaves each block (eq. 8)
    attention    MSE(A_S, A_T)        A = QKᵀ/√D before softmax, head by head (eq. 7)

Wang et al. 2021, "MiniLMv2": of one layer alone how its queries, keys and values relate, each to each other of its
kind. No W is needed, nor as many heads.
    relations    KL(R_T ‖ R_S), R = softmax(XXᵀ/√D), for X = Q, K and V (eq. 3-5)

Each loss is a sum over N predictions or tokens, which the loop divides by their number in the whole batch: so nothing
depends on padding, or on how a batch is cut. `hard` is the task's own loss, of the labels.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini.config import LOSSES, STUDENTS, DistillConfig, ModelConfig, UserError
from mini.data import Batch
from mini.prune import chosen_layers, without_layers
from mini.teacher_cache import TeacherCache, merged_soft_targets
from mini.transformer import vocabulary_logits

PROJECTED = ("cosine", "embedding", "hidden")  # those between vectors whose widths may differ
NEVER = -1e9  # a score so low that its probability is zero, and still no infinity


# ---------------------------------------------------------------- losses
def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² Σ KL(p_T ‖ p_S), p = softmax(logits / T); logits (N, V) (Hinton et al. 2015, §2).

    T² keeps the gradient's size: that of softened targets is smaller by it. Divided by N this is PyTorch's batchmean;
    its default, mean, divides by V as well.
    """
    p_s = F.log_softmax(student.float() / temperature, dim=-1)
    p_t = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(p_s, p_t, log_target=True, reduction="sum")


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ 1 - cos(h_S, h_T); hidden states (N, C)."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).sum()


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ MSE(h_S, h_T), the mean over channels; hidden states (N, C), the student's projected to the teacher's width."""
    return (student.float() - teacher.float()).square().mean(dim=-1).sum()


def attention_error(student: "QKV", teacher: "QKV", visible: Tensor, real: Tensor) -> Tensor:
    """Σ over queries of the mean over heads and visible keys of (A_S - A_T)², A = QKᵀ/√D before softmax.

    visible (B, T, T): which keys a query may look at; real (B, T): the queries that count.
    """
    error = (scores(student.q, student.k).float() - scores(teacher.q, teacher.k)).square()  # (B, H, T, T)
    per_query = (error * visible[:, None]).sum(dim=-1) / visible.sum(dim=-1).clamp(min=1)[:, None]  # (B, H, T)
    return (per_query.mean(dim=1) * real).sum()


def relation_error(student: Tensor, teacher: Tensor, heads: int, visible: Tensor, real: Tensor) -> Tensor:
    """Σ over queries of the mean over relation heads of KL(R_T ‖ R_S), R = softmax(XXᵀ/√D); X (B, H, T, D).

    The heads are joined and cut anew into `heads` of them: teacher and student need not have as many.
    """
    relations = []
    for x in (student, teacher):
        B, H, T, D = x.shape
        x = x.transpose(1, 2).reshape(B, T, heads, H * D // heads).transpose(1, 2)  # (B, A, T, H D / A)
        mask = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, NEVER)  # added: faster than masked_fill
        relations.append((scores(x, x) + mask[:, None]).log_softmax(dim=-1, dtype=torch.float32))  # (B, A, T, T)
    divergence = F.kl_div(*relations, log_target=True, reduction="none").sum(dim=-1)  # (B, A, T)
    return (divergence.mean(dim=1) * real).sum()


def scores(q: Tensor, k: Tensor) -> Tensor:
    """QKᵀ/√D of (B, H, T, D) -> (B, H, T, T)."""
    return q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)


# ---------------------------------------------------------------- what a model computes on the way
@dataclass
class QKV:
    q: Tensor  # each (B, H, T, D), as they enter the attention
    k: Tensor
    v: Tensor


@dataclass
class Seen:
    """What was computed on the way to a loss."""

    real: Tensor | None = None  # (B, T), True where a token is real
    hidden: list[Tensor] = field(default_factory=list)  # L + 1 of (B, T, C): what enters the blocks, what leaves each
    final: Tensor | None = None  # (B, T, C): what leaves the last, with pre-norm normed
    attention: list[QKV] = field(default_factory=list)  # of each block
    logits: Tensor | None = None


@contextlib.contextmanager
def observing(model: nn.Module) -> Iterator[Seen]:
    """While active, a forward pass leaves in `seen` what it computes on the way."""
    seen, stack = Seen(), model.stack
    blocks = list(stack.blocks)

    def begin(module: nn.Module, arguments: tuple, named: dict) -> None:
        tokens, padding = arguments[0], named.get("padding")
        seen.real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else padding
        seen.hidden, seen.attention = [], []

    def end(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen.final = output

    def head_output(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen.logits = output

    def leave(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen.hidden.append(output)

    handles = [
        stack.register_forward_pre_hook(begin, with_kwargs=True),
        blocks[0].register_forward_pre_hook(lambda module, arguments: seen.hidden.append(arguments[0])),
        *(block.register_forward_hook(leave) for block in blocks),
        stack.register_forward_hook(end),
        head(model).register_forward_hook(head_output),
    ]
    originals = [block.attention.attend for block in blocks]

    def recording(attend):
        def call(q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
            seen.attention.append(QKV(q, k, v))
            return attend(q, k, v, *rest)

        return call

    for block in blocks:
        block.attention.attend = recording(block.attention.attend)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for block, attend in zip(blocks, originals, strict=True):
            block.attention.attend = attend


def head(model: nn.Module) -> nn.Module:
    """The head whose scores are the model's answer."""
    if model.kind == "gpt":
        return model.classifier or model.head
    return model.classifier or model.spans or model.mlm


# ---------------------------------------------------------------- which layer learns from which
def layer_map(spec: str, n_student: int, n_teacher: int) -> list[tuple[int, int]]:
    """Pairs (layer of the student, layer of the teacher it learns from), counted from 0.

    uniform: the last of each of n_student equal stretches, TinyBERT's g(m) = m L_T / L_S for m = 1..L_S; last: the
    teacher's last n_student; first: its first; or a list of teacher:student, such as 0:0,2:1.
    """
    if spec in ("uniform", "first", "last"):
        if n_student > n_teacher:
            raise UserError(f"--layer_map {spec}: the student has {n_student} layers, its teacher {n_teacher}")
        theirs = {
            "uniform": [round((m + 1) * n_teacher / n_student) - 1 for m in range(n_student)],
            "first": list(range(n_student)),
            "last": list(range(n_teacher - n_student, n_teacher)),
        }
        return list(enumerate(theirs[spec]))
    pairs = []
    for part in spec.split(","):
        try:
            theirs, mine = map(int, part.split(":"))
        except ValueError:
            raise UserError(
                f"--layer_map {spec}: choose uniform, last or first, or give teacher:student, such as 0:0,2:1"
            ) from None
        for whose, layer, n in (("teacher", theirs, n_teacher), ("student", mine, n_student)):
            if not 0 <= layer < n:
                raise UserError(f"--layer_map {spec}: the {whose} has layers 0 to {n - 1}, and no {layer}")
        if (mine, theirs) in pairs:
            raise UserError(f"--layer_map {spec}: {part} is there twice")
        pairs.append((mine, theirs))
    return pairs


def matched_layers(student: ModelConfig, teacher: ModelConfig, options: DistillConfig) -> list[tuple[int, int]]:
    """The pairs of --layer_map, by the student's layers, if a loss needs them; refuses heads that it forbids."""
    weights = options.weights()
    if not any(weights[name] for name in ("hidden", "attention", "relations")):
        return []
    pairs = sorted(layer_map(options.layer_map, student.n_layers, teacher.n_layers))
    mine, theirs = student.layers("n_heads"), teacher.layers("n_heads")
    for m, t in pairs:
        if weights["attention"] and mine[m] != theirs[t]:
            raise UserError(
                f"--attention: layer {m} of the student has {mine[m]} heads, layer {t} of its teacher {theirs[t]}; "
                f"give --n_heads, or compare their --relations, which need not have as many"
            )
    m, t = pairs[-1]
    heads = options.relation_heads or theirs[t]
    for width in (mine[m] * student.head_size, theirs[t] * teacher.head_size):
        if weights["relations"] and width % heads:
            raise UserError(f"--relation_heads {heads}: a width of {width} cannot be cut into so many")
    return pairs


def student_config(teacher: ModelConfig, options: DistillConfig) -> ModelConfig:
    """The student's shape: a named one, relative to the teacher's, or as the flags say."""
    depth, width = STUDENTS[options.student]
    step = 2 * (options.n_heads or max(teacher.layers("n_heads")))  # each head gets an even width, as RoPE needs
    n_layers = options.n_layers or max(1, round(depth * teacher.n_layers))
    d_model = options.d_model or max(step, round(width * teacher.d_model / step) * step)
    changes = dict(n_layers=n_layers, d_model=d_model)
    uneven = isinstance(teacher.n_heads, list) or isinstance(teacher.d_ff, list)
    if uneven and not (options.n_heads and options.d_ff):
        raise UserError("the teacher's layers differ in size: give the student's with --n_heads and --d_ff")
    changes["n_heads"] = options.n_heads or teacher.n_heads
    changes["d_ff"] = options.d_ff or round(teacher.d_ff * d_model / teacher.d_model)  # 0 stays: it follows d_model
    if (d_model, changes["n_heads"]) != (teacher.d_model, teacher.n_heads):
        changes |= dict(d_head=0, n_kv_heads=0)
    return dataclasses.replace(teacher, **changes)


def first_layers(teacher: ModelConfig, options: DistillConfig) -> list[int] | None:
    """The teacher's layers that a student begins with, their masks included; None where it begins at random."""
    config, n = student_config(teacher, options), teacher.n_layers
    alike = config.n_layers <= n and dataclasses.replace(config, n_layers=n) == teacher
    if options.start == "random" or (options.start == "auto" and not alike):
        return None
    if not alike:
        raise UserError(f"--start {options.start}: only a student of its teacher's width can begin with its layers")
    start = "uniform" if options.start == "auto" else options.start
    keep = chosen_layers("start", start, config.n_layers, n)
    if len(keep) != config.n_layers:
        raise UserError(f"--start {start} names {len(keep)} layers, the student has {config.n_layers}: give --n_layers")
    return keep


def make_student(teacher: nn.Module, options: DistillConfig) -> nn.Module:
    """A student of this teacher."""
    keep = first_layers(teacher.config, options)
    return type(teacher)(student_config(teacher.config, options)) if keep is None else without_layers(teacher, keep)


# ---------------------------------------------------------------- the objective
class Distillation:
    """A task with a teacher: its own losses, of the labels, and beside them those of this file, each with a weight.

    What it does not have itself (figures, samples, labels) is the task's.
    """

    fixed_shape = False

    def __init__(self, task, student: nn.Module, teacher: nn.Module, options: DistillConfig):
        self.task, self.teacher, self.options = task, teacher.eval().requires_grad_(False), options
        weights = options.weights()
        self.losses = [name for name in LOSSES if weights[name]]
        self.loss_weights = weights | dict.fromkeys(("mlm", "nsp"), weights["hard"])
        self.best = task.best if weights["hard"] or weights["soft"] else None  # else the head learns nothing
        self.pairs = matched_layers(student.config, teacher.config, options)
        self.cache = None
        if options.cache and "soft" in self.losses:
            self.cache = TeacherCache(options.cache, teacher, options.top_k, options.temperature)
        self.data = Counted(task.data, self.losses, 2 if student.config.spans else 1)
        widths = student.config.d_model, teacher.config.d_model
        projected = [name for name in PROJECTED if name in self.losses and widths[0] != widths[1]]
        if projected:  # W of TinyBERT's eq. 8 and 9: part of the student while it learns
            student.projections = nn.ModuleDict({name: nn.Linear(*widths, bias=False) for name in projected})

    def __getattr__(self, name: str):
        return getattr(self.task, name)

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: sum}: what the task asks of the student, and what the teacher does."""
        with observing(model) as mine:
            losses = renamed(self.task.loss(model, inputs))
        if not self.losses:  # --soft 0 alone: the same student without a teacher
            return losses
        if self.cache is not None:
            theirs, classes = self.cache(inputs, lambda: answers_of(self.teacher, self.ask(inputs), inputs))
            answers = answers_of(model, mine, inputs)
            return losses | {"soft": merged_soft_targets(answers, theirs, classes, self.options.temperature)}
        theirs = self.ask(inputs)
        return losses | {name: self.term(name, model, mine, theirs, inputs) for name in self.losses}

    @torch.no_grad()
    def ask(self, inputs: dict[str, Tensor]) -> Seen:
        """What the teacher computes."""
        with observing(self.teacher) as theirs:
            self.task.loss(self.teacher, inputs)
        return theirs

    def term(self, name: str, model: nn.Module, mine: Seen, theirs: Seen, inputs: dict[str, Tensor]) -> Tensor:
        """One of the teacher's losses, summed over answers (soft) or tokens."""
        real, pairs = mine.real, self.pairs

        def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # (N, C) each, of the real tokens, equally wide
            x = x[real]
            if name in (getattr(model, "projections", None) or ()):
                x = model.projections[name](x)
            return x, y[real]

        if name == "soft":
            answers = (answers_of(m, seen, inputs) for m, seen in ((model, mine), (self.teacher, theirs)))
            return soft_targets(*answers, self.options.temperature)
        if name == "cosine":
            return cosine(*both(mine.final, theirs.final))
        if name == "embedding":
            return squared_error(*both(mine.hidden[0], theirs.hidden[0]))
        if name == "hidden":
            # Two last layers are compared as their heads see them: with pre-norm, normed.
            final = {(len(mine.attention) - 1, len(theirs.attention) - 1): (mine.final, theirs.final)}
            states = [final.get((m, t), (mine.hidden[m + 1], theirs.hidden[t + 1])) for m, t in pairs]
            return sum(squared_error(*both(x, y)) for x, y in states)
        visible = real[:, None, :].expand(-1, real.size(1), -1)  # (B, T, T)
        if model.config.causal:
            visible = visible.tril()
        if name == "attention":
            return sum(attention_error(mine.attention[m], theirs.attention[t], visible, real) for m, t in pairs)
        m, t = pairs[-1]  # one layer of each, with --layer_map last or uniform the last
        a, b = mine.attention[m], theirs.attention[t]
        heads = self.options.relation_heads or b.q.size(1)
        return sum(relation_error(x, y, heads, visible, real) for x, y in ((a.q, b.q), (a.k, b.k), (a.v, b.v)))


def answers_of(model: nn.Module, seen: Seen, inputs: dict[str, Tensor]) -> Tensor:
    """(N, V): the logits of every answer that the task asks for: tokens, masked tokens, a class, an answer's ends."""
    if model.config.n_classes:
        return seen.logits
    if model.config.spans:  # first and last token of each text: (B, T, 2) -> (2B, T)
        return seen.logits.float().masked_fill(~seen.real[..., None], NEVER).transpose(1, 2).flatten(0, 1)
    logits = seen.logits[inputs["targets"] >= 0]
    return vocabulary_logits(logits, model.config) if model.kind == "gpt" else logits


class Counted:
    """A task's data, whose batches also say over how many answers or tokens the teacher's losses are summed."""

    def __init__(self, data, losses: list[str], per_example: int):
        self.data, self.losses, self.per_example = data, losses, per_example

    def __getattr__(self, name: str):
        return getattr(self.data, name)

    def batch(self, indices: np.ndarray) -> Batch:
        batch = self.data.batch(indices)
        answers = self.per_example * next(iter(batch.counts.values()))
        counts = {name: answers if name == "soft" else batch.n_tokens for name in self.losses}
        return Batch(batch.inputs, renamed(batch.counts) | counts, batch.n_tokens)


def renamed(values: dict) -> dict:
    """The task's own loss is called hard here: "loss" is the weighted sum of all."""
    return {"hard" if name == "loss" else name: value for name, value in values.items()}
