"""Distillation: a small model, the student, learns from what a large one, the teacher, computes on the same input.

Hinton et al. 2015: the teacher's probabilities say more than a label, namely which wrong answers are nearly right. A
temperature T > 1 lifts these small probabilities, so that they count.
    soft         T² KL(p_T ‖ p_S), p = softmax(logits / T)

Sanh et al. 2019, "DistilBERT": the same while pretraining, by a student that begins with every other layer of its
teacher; and its last hidden states point where the teacher's do.
    cosine       1 - cos(h_S, h_T)

Jiao et al. 2020, "TinyBERT": a narrower student copies its teacher's inside layer by layer, seen through a matrix W
that it learns; first on plain text, then on a task. The answers come last (compression/teach.py has the four steps).
    embedding    MSE(E_S W, E_T)      what enters the first block (eq. 9)
    hidden       MSE(H_S W, H_T)      what leaves each block (eq. 8)
    attention    MSE(A_S, A_T)        A = QKᵀ/√D before softmax, head by head (eq. 7)

Wang et al. 2021, "MiniLMv2": of one layer alone how its queries, keys and values relate, each to each other of its
kind. No W is needed, nor as many heads.
    relations    KL(R_T ‖ R_S), R = softmax(XXᵀ/√D), for X = Q, K and V (eq. 3-5)

Each loss is a sum over N predictions or tokens, which the loop divides by their number in the whole batch: so nothing
depends on padding, or on how a batch is cut. `hard` weighs the task's own losses, of the labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini.compression.activations import Activations, recording
from mini.compression.shrink import chosen_layers, spread, without_layers
from mini.compression.teacher_cache import TeacherCache, merged_soft_targets
from mini.flags import Checked, UserError, option
from mini.model.bert import NEVER
from mini.model.config import ModelConfig
from mini.model.transformer import Model, draw
from mini.tasks.base import Batch, Task

# Loss and weight: distilbert's are its published code's, tinybert's those of §3.1; minilm has labels too, for the head.
LOSSES = ("soft", "cosine", "embedding", "hidden", "attention", "relations")  # beside "hard", the task's own
RECIPES = {
    "hinton": dict(soft=0.5, hard=0.5),
    "distilbert": dict(soft=5.0, hard=2.0, cosine=1.0),
    "tinybert": dict(embedding=1.0, hidden=1.0, attention=1.0),
    "minilm": dict(relations=1.0, hard=1.0),
}
# A student's share of its teacher's layers and of its width.
STUDENTS = {"distilbert": (1 / 2, 1), "distilgpt2": (1 / 2, 1), "tinybert6": (1 / 2, 1),
            "tinybert4": (1 / 3, 312 / 768), "minilm6": (1 / 2, 1 / 2)}  # fmt: skip
PROJECTED = ("cosine", "embedding", "hidden")  # those between vectors whose widths may differ


@dataclass
class DistillConfig(Checked):
    """Who learns, and what of its teacher; the weight of a loss is the recipe's, if no flag gives it."""

    recipe: str = option("hinton", "losses and weights of these papers", tuple(RECIPES))
    student: str = option("distilbert", "half as deep; minilm6: and as wide; tinybert4: 1/3, 0.41 wide", (*STUDENTS,))
    n_layers: int = option(0, "of the student; 0: as its size has", low=0)
    n_heads: int = option(0, "of the student; 0: as the teacher has", low=0)
    d_model: int = option(0, "of the student; 0: as its size has", low=0)
    d_ff: int = option(0, "of the student; 0: in proportion", low=0)
    start: str = option(
        "auto", "random, or the teacher's layers: uniform, first, last, 0,2,4; auto: uniform, if they fit"
    )
    init: str | None = option(None, "a run that the student goes on from, instead of --student and --start")
    general: str | None = option(None, "tinybert: pretrained run of step 1, with its settings but --data, --seed")
    general_steps: int = option(0, "tinybert: of its first step; 0: as many as that run had", low=0)
    copies: int = option(4, "tinybert: of each labelled text, with other words by the pretrained BERT", low=0)
    layer_map: str = option("uniform", "who learns from whom: uniform, last, first, or teacher:student, like 0:0,2:1")
    temperature: float = option(2.0, "of the soft targets", low=0.01)
    alpha: float | None = option(None, "weight of the soft targets, 1 - alpha that of the labels", low=0, high=1)
    hard: float | None = option(None, "weight of the task's own loss, of the labels", low=0)
    soft: float | None = option(None, "weight of the soft targets (Hinton)", low=0)
    cosine: float | None = option(None, "weight of the last hidden states' direction (DistilBERT)", low=0)
    embedding: float | None = option(None, "weight of the embeddings' error (TinyBERT)", low=0)
    hidden: float | None = option(None, "weight of the hidden states' error (TinyBERT)", low=0)
    attention: float | None = option(None, "weight of the attention scores' error (TinyBERT)", low=0)
    relations: float | None = option(None, "weight of the attention relations (MiniLM)", low=0)
    relation_heads: int = option(0, "heads into which relations are cut; 0: as the teacher has", low=0)
    cache: str | None = option(None, "a folder that keeps the teacher's answers, for more students of the same batches")
    top_k: int = option(50, "likeliest classes of each answer that the cache keeps", low=1)

    def __post_init__(self):
        super().__post_init__()
        if self.alpha is not None and (self.soft is not None or self.hard is not None):
            raise UserError("--alpha is --soft, and 1 - alpha --hard: give alpha or those")
        if not any(self.weights().values()):
            raise UserError("every loss has the weight 0: there is nothing to learn")
        inner = [name for name in LOSSES[1:] if self.weights()[name]]
        if self.cache and inner:
            raise UserError(f"--cache keeps the teacher's answers alone, and --{inner[0]} needs more: leave one out")

    def weights(self) -> dict[str, float]:
        """The weight of each loss."""
        names = ("hard", *LOSSES)
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.alpha is not None:
            chosen |= dict(soft=self.alpha, hard=1 - self.alpha)
        return dict.fromkeys(names, 0.0) | RECIPES[self.recipe] | chosen

    @property
    def between_layers(self) -> bool:
        """Whether a loss that compares layers has a weight."""
        return any(self.weights()[name] for name in ("hidden", "attention", "relations"))


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


def attention_error(student: Sequence[Tensor], teacher: Sequence[Tensor], visible: Tensor, real: Tensor) -> Tensor:
    """Σ over queries of the mean over heads and visible keys of (A_S - A_T)², A = QKᵀ/√D before softmax.

    student, teacher: q, k, ..; visible (B, T, T): which keys a query may look at; real (B, T): the queries that count.
    """
    error = (scores(*student[:2]).float() - scores(*teacher[:2])).square()  # (B, H, T, T)
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
        never = max(NEVER, torch.finfo(x.dtype).min / 2)
        mask = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, never)  # added: faster than masked_fill
        relations.append((scores(x, x) + mask[:, None]).log_softmax(dim=-1, dtype=torch.float32))  # (B, A, T, T)
    divergence = F.kl_div(*relations, log_target=True, reduction="none").sum(dim=-1)  # (B, A, T)
    return (divergence.mean(dim=1) * real).sum()


def scores(q: Tensor, k: Tensor) -> Tensor:
    """QKᵀ/√D of (B, H, T, D) -> (B, H, T, T)."""
    return q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)


# ---------------------------------------------------------------- which layer learns from which
def layer_map(spec: str, n_student: int, n_teacher: int) -> list[tuple[int, int]]:
    """Pairs (layer of the student, layer of the teacher it learns from), counted from 0.

    uniform: the last of each of n_student equal stretches, TinyBERT's g(m) = m L_T / L_S for m = 1..L_S; last: the
    teacher's last n_student; first: its first; or a list of teacher:student, such as 0:0,2:1.
    """
    if spec in ("uniform", "first", "last"):
        if n_student > n_teacher:
            raise UserError(f"--layer_map {spec}: the student has {n_student} layers, its teacher {n_teacher}")
        if spec == "uniform":
            return [(m, round((m + 1) * n_teacher / n_student) - 1) for m in range(n_student)]
        return list(enumerate(chosen_layers("layer_map", spec, n_student, n_teacher)))
    pairs = []
    for pair in spec.split(","):
        try:
            t, m = map(int, pair.split(":"))
        except ValueError:
            ways = "choose uniform, last or first, or give teacher:student, such as 0:0,2:1"
            raise UserError(f"--layer_map {spec}: {ways}") from None
        for whose, layer, n in (("teacher", t, n_teacher), ("student", m, n_student)):
            if not 0 <= layer < n:
                raise UserError(f"--layer_map {spec}: the {whose} has layers 0 to {n - 1}, and no {layer}")
        if (m, t) in pairs:
            raise UserError(f"--layer_map {spec}: {pair} is there twice")
        pairs.append((m, t))
    return pairs


def matched_layers(student: ModelConfig, teacher: ModelConfig, options: DistillConfig) -> list[tuple[int, int]]:
    """The pairs of --layer_map, by the student's layers, if a loss needs them; refuses heads that it forbids."""
    if not options.between_layers:
        return []
    weights, pairs = options.weights(), sorted(layer_map(options.layer_map, student.n_layers, teacher.n_layers))
    if "lstm" in (student.block, teacher.block) and (weights["attention"] or weights["relations"]):
        raise UserError("an LSTM has no attention to compare: give --attention 0 and --relations 0")
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
    uneven = isinstance(teacher.n_heads, list) or isinstance(teacher.d_ff, list)
    if uneven and not (options.n_heads and options.d_ff):
        raise UserError("the teacher's layers differ in size: give the student's with --n_heads and --d_ff")
    depth, width = STUDENTS[options.student]
    n_layers = options.n_layers or max(1, round(depth * teacher.n_layers))
    n_heads = options.n_heads or teacher.n_heads
    step = 2 * n_heads  # each head gets an even width, as RoPE needs
    d_model = options.d_model or max(step, round(width * teacher.d_model / step) * step)
    d_ff = options.d_ff or round(teacher.d_ff * d_model / teacher.d_model)  # 0 stays: it follows d_model
    heads = {} if (d_model, n_heads) == (teacher.d_model, teacher.n_heads) else dict(d_head=0, n_kv_heads=0)
    layers = teacher.of_layers(spread(n_layers, teacher.n_layers))  # what else differs between layers
    return replace(layers, n_heads=n_heads, d_model=d_model, d_ff=d_ff, **heads)


def first_layers(teacher: ModelConfig, options: DistillConfig) -> list[int] | None:
    """The teacher's layers that a student begins with, their masks included; None where it begins at random."""
    student, n = student_config(teacher, options), teacher.n_layers
    alike = student.n_layers <= n and student == teacher.of_layers(spread(student.n_layers, n))
    if options.start == "random" or (options.start == "auto" and not alike):
        return None
    if not alike:
        raise UserError(f"--start {options.start}: only a student of its teacher's width can begin with its layers")
    spec = "uniform" if options.start == "auto" else options.start
    keep = chosen_layers("start", spec, student.n_layers, n)
    if len(keep) != student.n_layers:
        raise UserError(f"--start {spec} names {len(keep)} layers, the student has {student.n_layers}: give --n_layers")
    return keep


def make_student(teacher: Model, options: DistillConfig) -> Model:
    keep = first_layers(teacher.config, options)
    return type(teacher)(student_config(teacher.config, options)) if keep is None else without_layers(teacher, keep)


# ---------------------------------------------------------------- the objective
class Distillation:
    """A task with a teacher, as the loop's objective: the task's own losses and beside them those of this file."""

    fixed_shape = False

    def __init__(self, task: Task, student: Model, teacher: Model, options: DistillConfig):
        self.task, self.teacher, self.options = task, teacher.eval().requires_grad_(False), options
        weights = options.weights()
        self.losses = [name for name in LOSSES if weights[name]]
        hard = weights["hard"]
        self.default_weight = hard * task.default_weight  # of the task's own losses
        self.loss_weights = {name: hard * weight for name, weight in task.loss_weights.items()}
        self.loss_weights |= {name: weights[name] for name in self.losses}
        self.best = task.best if hard or weights["soft"] else None  # else the head learns nothing
        self.pairs = matched_layers(student.config, teacher.config, options)
        self.cache = None
        if options.cache and "soft" in self.losses:
            self.cache = TeacherCache(options.cache, teacher, options.top_k, options.temperature)
        if type(task).loss is not Task.loss:
            raise UserError(
                "this task has a loss() of its own, which no teacher can be added to: give it losses() instead"
            )
        widths = student.config.d_model, teacher.config.d_model
        for name in PROJECTED:  # W of TinyBERT's eq. 8 and 9
            if name in self.losses and widths[0] != widths[1]:
                student.learning[name] = layer = nn.Linear(*widths, bias=False)
                draw(layer.weight, f"learning.{name}.weight", torch.initial_seed(), widths[0] ** -0.5)

    def counts(self, batch: Batch) -> dict[str, int]:
        """The task's; soft targets are summed over its answers, the others over real tokens."""
        counts = self.task.counts(batch)
        return counts | {"soft": counts[self.task.judged]} if "soft" in self.losses else counts

    def loss(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: sum}: what the task asks of the student, and what the teacher does."""
        with recording(model) as mine:
            answers = model.answers(inputs)
        losses = self.task.losses(answers, inputs)
        if taken := losses.keys() & set(self.losses):
            raise ValueError(f"the task's loss {min(taken)!r} has the name of one of its teacher's")
        if not self.losses:  # --soft 0 alone: the same student without a teacher
            return losses
        answers = self.asked(answers, inputs)  # (N, V)
        if self.cache is not None:
            theirs, classes = self.cache(inputs, lambda: self.ask(inputs)[0])
            return losses | {"soft": merged_soft_targets(answers, theirs, classes, self.options.temperature)}
        their_answers, theirs = self.ask(inputs)
        if "soft" in self.losses:
            losses["soft"] = soft_targets(answers, their_answers, self.options.temperature)
        return losses | {name: self.term(name, model, mine, theirs) for name in self.losses if name != "soft"}

    @torch.no_grad()
    def ask(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Activations]:
        """The teacher's answers, (N, V), and what it computes on the way."""
        with recording(self.teacher) as theirs:
            answers = self.teacher.answers(inputs)
        return self.asked(answers, inputs), theirs

    def asked(self, answers: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """(N, V): the logits of all answers that the task asks for: tokens, masked tokens, classes, answers' ends."""
        logits = answers[self.task.judged]
        return logits[inputs["targets"] >= 0] if "targets" in inputs else logits.flatten(0, -2)

    def term(self, name: str, model: Model, mine: Activations, theirs: Activations) -> Tensor:
        """One of the losses between what both compute on the way, summed over tokens."""
        real, pairs = mine.real, self.pairs

        def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # (N, C) each, of the real tokens, equally wide
            x = x[real]
            return model.learning[name](x) if name in model.learning else x, y[real]

        if name == "cosine":
            return cosine(*both(mine.final, theirs.final))
        if name == "embedding":
            return squared_error(*both(mine.hidden[0], theirs.hidden[0]))
        if name == "hidden":
            # Two last layers are compared as their heads see them: with pre-norm, normed.
            final = {(len(mine.hidden) - 2, len(theirs.hidden) - 2): (mine.final, theirs.final)}
            states = [final.get((m, t), (mine.hidden[m + 1], theirs.hidden[t + 1])) for m, t in pairs]
            return sum(squared_error(*both(x, y)) for x, y in states)

        def visible(layer: int) -> Tensor:  # (B, T, T): of what the student sees
            seen = real.new_ones(len(real), real.size(1), real.size(1))
            mask = mine.views[layer].mask(*seen.shape[1:], real.device)
            return seen if mask is None else seen & mask[:, 0]

        if name == "attention":
            return sum(attention_error(mine.attention[m], theirs.attention[t], visible(m), real) for m, t in pairs)
        m, t = pairs[-1]  # one layer of each, with --layer_map last or uniform the last
        heads = self.options.relation_heads or theirs.attention[t][0].size(1)
        qkv = zip(mine.attention[m], theirs.attention[t], strict=True)
        return sum(relation_error(x, y, heads, visible(m), real) for x, y in qkv)
