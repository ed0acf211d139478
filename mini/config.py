"""Everything a user can set, as dataclasses: each field is a flag, a line of --help and a key of config.json.

An idea for an ablation is a field of ModelConfig and the place in transformer.py that reads it.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field


class UserError(Exception):
    """A user's mistake or a broken input: shown as one line, exit status 2, no traceback."""


def option(default, help: str, choices: tuple[str, ...] = (), low: float = -math.inf, high: float = math.inf, **extra):
    """A dataclass field with its line of --help, and what it may be: one of the choices, or within low..high.

    extra: flag=False is no flag, resume=True may differ when a run goes on, positional="1" or "+" has no --name.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high, **extra))


def check(config) -> None:
    """Raises UserError for a value outside its field's choices or bounds; nan is outside of all."""
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices", ())
        if choices and value not in choices:
            raise UserError(f"--{f.name} {value}: choose one of {', '.join(choices)}{nearest(str(value), choices)}")
        low, high = f.metadata.get("low", -math.inf), f.metadata.get("high", math.inf)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not (low <= number <= high and math.isfinite(number)):
                least = f"at least {low:g}" if low > -math.inf else ""
                most = f"at most {high:g}" if high < math.inf else ""
                raise UserError(
                    f"--{f.name} {number}: must be {' and '.join(filter(None, [least, most])) or 'a number'}"
                )


class Checked:
    """A dataclass of options that refuses what they may not be."""

    def __post_init__(self):
        check(self)


@dataclass
class ModelConfig(Checked):
    """The model. A GPT and a BERT differ in these values only; the defaults are GPT-2's ways, small."""

    n_layers: int = option(6, "number of blocks", low=1)
    n_heads: int | list[int] = option(6, "attention heads; one number, or one for each layer: 6,6,4", low=1)
    n_kv_heads: int = option(0, "key/value heads, each shared by n_heads/n_kv_heads queries; 0: n_heads", low=0)
    d_model: int = option(384, "width of the residual stream (C)", low=1)
    d_head: int = option(0, "width of a head (D); 0: d_model / n_heads", low=0)
    d_ff: int | list[int] = option(0, "hidden width of the MLP, or one for each layer; 0: 4 d_model", low=0)
    max_len: int = option(256, "longest context in tokens (T)", low=1)
    vocab_size: int = option(4096, "tokens of a trained BPE; any other tokenizer sets it", low=1)
    vocab_multiple: int = option(1, "pad the embedding's rows to a multiple (64 is fast on GPUs); same loss", low=1)
    norm: str = option("layernorm", "normalisation", ("layernorm", "rmsnorm"))
    norm_place: str = option("pre", "norm before each sublayer (GPT-2) or after its sum (BERT)", ("pre", "post"))
    norm_eps: float = option(1e-5, "epsilon of the normalisation", low=0)
    positions: str = option("learned", "position encoding", ("learned", "rope", "sinusoidal", "none"))
    rope_base: float = option(10000.0, "longest wavelength of RoPE, divided by 2 pi, in tokens", low=1)
    activation: str = option("gelu_tanh", "nonlinearity of the MLP", ("gelu", "gelu_tanh", "relu2", "swiglu"))
    qk_norm: bool = option(False, "normalise each query and key head (RMS) before their product")
    bias: bool = option(True, "biases in linear layers and LayerNorms")
    tied: bool = option(True, "the output head is the token embedding")
    zero_init: bool = option(False, "start the residual projections (and an untied head) at zero")
    logit_softcap: float = option(0.0, "c tanh(logits / c); 0: off", low=0)
    dropout: float = option(0.0, "dropout of embeddings, attention weights and sublayer outputs", low=0, high=0.99)
    attention: str = option(
        "auto", "the written-out equations, PyTorch's fused call, or the faster", ("auto", "reference", "fused")
    )
    n_segments: int = option(0, "segment embeddings, of which BERT has 2; 0: none", low=0)
    causal: bool = option(True, "a token sees only itself and what is before it", flag=False)
    n_classes: int = option(0, "classes of a classification head; 0: none", flag=False)
    mlm: bool = option(False, "BERT: a head that predicts masked tokens", flag=False)
    nsp: bool = option(False, "BERT: a head that tells the next sentence from a random one", flag=False)
    spans: bool = option(False, "BERT: a head that finds the first and last token of an answer", flag=False)
    pooling: str = option("cls", "BERT: the pooler sees the first token, or the mean of all", ("cls", "mean"))
    pooler: bool = option(False, "BERT: a tanh layer on the first token", flag=False)

    def __post_init__(self):
        super().__post_init__()
        for name in ("n_heads", "d_ff"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != self.n_layers:
                raise UserError(f"--{name} lists {len(values)} values for {self.n_layers} layers: give one for each")
        if not self.d_head:
            if isinstance(self.n_heads, list):
                raise UserError("--n_heads differs between layers: give the width of a head with --d_head")
            if self.d_model % self.n_heads:
                raise UserError(f"--d_model {self.d_model} is not divisible by --n_heads {self.n_heads}")
        for heads in self.layers("n_heads"):
            if self.n_kv_heads and heads % self.n_kv_heads:
                raise UserError(f"--n_heads {heads} is not divisible by --n_kv_heads {self.n_kv_heads}")
        if self.n_segments == 1:
            raise UserError("--n_segments 1: a pair of texts has two; give 0 for none")
        if self.positions == "rope" and self.head_size % 2:
            raise UserError(f"--positions rope needs an even head width, not {self.head_size}")

    def layers(self, name: str) -> list[int]:
        """The value of a per-layer field (n_heads, d_ff) for each layer."""
        value = getattr(self, name)
        return value if isinstance(value, list) else [value] * self.n_layers

    @property
    def head_size(self) -> int:
        return self.d_head or self.d_model // self.n_heads

    @property
    def ff_sizes(self) -> list[int]:
        # SwiGLU has three matrices instead of two: 8/3 of d_model keeps the parameters (Shazeer 2020, §2).
        gated = (8 * self.d_model // 3 + 63) // 64 * 64
        return [d or (gated if self.activation == "swiglu" else 4 * self.d_model) for d in self.layers("d_ff")]


@dataclass
class RunOptions(Checked):
    """What to do, from what, and where the result goes."""

    task: str = option("", "what to learn: its flags are in the --help of that task")
    init: str | None = option(None, "a run, or a folder with published weights, to start from")
    out: str = option("", "the run folder; the same command goes on with an unfinished one")
    overwrite: bool = option(False, "delete the run in --out and begin anew")


@dataclass
class CompressOptions(Checked):
    """What to make smaller, and where the result goes."""

    run: str = option("", "a run, or a folder with published weights", positional="1")
    out: str = option("", "the run folder to make; the same command goes on with an unfinished one")
    overwrite: bool = option(False, "delete the run in --out and begin anew")


@dataclass
class DataConfig(Checked):
    """Where text comes from and how it becomes tokens."""

    data: str = option("python-docs", "text, .jsonl, .gz of either, a folder, a token folder, a known corpus")
    train: str | None = option(None, "training file of the tasks that fine-tune")
    valid: str | None = option(None, "validation file; without one, the end of --data is held out")
    valid_fraction: float = option(0.1, "share of --data held out for validation", low=1e-6, high=0.999999)
    separator: str | None = option(
        None, "what ends a document in a text file, such as \\n\\n; without it a file is one"
    )
    errors: str = option("strict", "bytes that are not UTF-8: refuse, or replace", ("strict", "replace"))
    tokenizer: str = option("bpe", "bpe (train one), bytes, gpt2, a .tiktoken file, a WordPiece vocab.txt, or a run")


@dataclass
class MLMConfig(Checked):
    """BERT's pretraining: masked tokens and the next sentence (Devlin et al. 2019, §3.1)."""

    nsp: bool = option(True, "pairs of segments, and whether the second follows; false: one segment (RoBERTa)")
    mask_rate: float = option(0.15, "share of the tokens to predict", low=0.001, high=0.9)
    whole_word: bool = option(False, "mask words as a whole; one that would exceed mask_rate is left out")
    short_rate: float = option(0.1, "share of the examples that are cut to a random shorter length", low=0, high=1)


@dataclass
class ClassifyConfig(Checked):
    """Labelled texts, as they are read and as they are varied while training."""

    class_weights: str = option("none", "weight of a class in the loss; balanced: 1 / frequency", ("none", "balanced"))
    normalize: str = option("none", "of every text: any of lower,accents,punctuation,stopwords, or all")
    augment: str = option("none", "of training texts: any of insert,replace,swap,delete,mask, or all")
    augment_share: float = option(0.5, "share of the training texts that are augmented each time", low=0, high=1)
    augment_rate: float = option(0.1, "share of the words of such a text that change", low=0, high=1)


@dataclass
class QAConfig(Checked):
    """Answers as spans of a text (Devlin et al. 2019, §4.2)."""

    stride: int = option(64, "tokens between the starts of a long text's windows", low=1)
    max_question: int = option(64, "tokens of a question that are read", low=1)
    max_answer: int = option(30, "longest answer in tokens", low=1)
    n_best: int = option(20, "candidates that each window offers", low=1)


@dataclass
class PruneConfig(Checked):
    """What is taken out of a model, and how it is chosen."""

    sparsity: float = option(0.5, "share of the weights, heads or neurons that goes", low=0)
    method: str = option(
        "magnitude",
        "how their importance is measured; gradient: of heads and neurons",
        ("magnitude", "random", "wanda", "gradient"),
    )
    scope: str = option("layer", "compared within a layer, or all with each other", ("layer", "global"))
    pattern: str = option("unstructured", "single weights; N:M, of M inputs N stay, such as 2:4; heads; neurons")
    schedule: str = option("oneshot", "all at once, or more and more of them while training", ("oneshot", "cubic"))
    calibrate: int = option(256, "training examples that wanda looks at, and gradient ten times", low=1)
    first: float = option(0.0, "the sparsity from which a cubic schedule begins", flag=False)

    def __post_init__(self):
        super().__post_init__()
        if self.sparsity >= 1:
            raise UserError(f"--sparsity {self.sparsity}: must be below 1, something has to stay")
        groups = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not groups and self.pattern not in ("unstructured", "heads", "neurons"):
            raise UserError(f"--pattern {self.pattern}: choose one of unstructured, heads, neurons, or N:M such as 2:4")
        if groups:
            n, m = int(groups[1]), int(groups[2])
            if not 0 < n < m:
                raise UserError(f"--pattern {self.pattern}: N of M weights stay, with 0 < N < M")
            self.sparsity = 1 - n / m
        units = self.pattern in ("heads", "neurons")
        if units and (self.method == "wanda" or self.schedule == "cubic"):
            wrong = "--method wanda" if self.method == "wanda" else "--schedule cubic"
            raise UserError(f"{wrong}: for single weights; heads and neurons are taken out at once")
        if not units and self.method == "gradient":
            raise UserError("--method gradient: for --pattern heads or neurons")
        if self.method == "wanda" and (self.scope == "global" or self.schedule == "cubic"):
            wrong = "--scope global" if self.scope == "global" else "--schedule cubic"
            raise UserError(f"--method wanda with {wrong}: it compares the inputs of one output, once")
        if groups and (self.scope == "global" or self.schedule == "cubic"):
            wrong = "--scope global" if self.scope == "global" else "--schedule cubic"
            raise UserError(f"--pattern {self.pattern} with {wrong}: it compares the weights of a group, once")


@dataclass
class QuantConfig(Checked):
    """Int8 weights, and how what is multiplied with them is quantized."""

    scheme: str = option(
        "dynamic",
        "scales of each token when it comes; one for all, found beforehand; the same, and weights trained within it",
        ("dynamic", "static", "qat"),
    )
    observer: str = option("minmax", "how static and qat find the fixed ranges", ("minmax", "ema", "percentile", "mse"))
    calibrate: int = option(256, "training examples that static and qat look at for it", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.scheme != "dynamic" and not self.calibrate:
            raise UserError(f"--calibrate 0: --scheme {self.scheme} needs examples to find its ranges")


@dataclass
class ReduceConfig(Checked):
    """Which layers a model keeps."""

    keep: str = option("", "the layers that stay, counted from 0, such as 0,2,4,7,9,11")
    layers: int = option(0, "or how many", low=0)
    by: str = option(
        "uniform",
        "and which so many: evenly spread; the first; the last; those that change their input most",
        ("uniform", "first", "last", "influence"),
    )
    calibrate: int = option(256, "training examples that influence looks at", low=1)


# What a student learns, and how much each counts: Hinton et al. 2015, §2; Sanh et al. 2019, §3; Jiao et al. 2020, §3.1;
# Wang et al. 2021, with the labels beside, for the head.
LOSSES = ("soft", "cosine", "embedding", "hidden", "attention", "relations")  # beside "hard", the task's own
RECIPES = {
    "hinton": dict(soft=0.5, hard=0.5),
    "distilbert": dict(soft=5.0, hard=2.0, cosine=1.0),
    "tinybert": dict(embedding=1.0, hidden=1.0, attention=1.0),
    "minilm": dict(relations=1.0, hard=1.0),
}
# A student's share of its teacher's layers and of its width.
STUDENTS = {
    "distilbert": (1 / 2, 1), "distilgpt2": (1 / 2, 1), "tinybert6": (1 / 2, 1), "tinybert4": (1 / 3, 312 / 768),
    "minilm6": (1 / 2, 1 / 2),
}  # fmt: skip


@dataclass
class DistillConfig(Checked):
    """Who learns, and what of its teacher; the weight of a loss is the recipe's, if no flag gives it."""

    recipe: str = option("hinton", "losses and weights of these papers", tuple(RECIPES))
    student: str = option(
        "distilbert",
        "half of its teacher's layers; tinybert4: a third, 0.41 times as wide; minilm6: half of both",
        tuple(STUDENTS),
    )
    n_layers: int = option(0, "of the student; 0: as its size has", low=0)
    n_heads: int = option(0, "of the student; 0: as the teacher has", low=0)
    d_model: int = option(0, "of the student; 0: as its size has", low=0)
    d_ff: int = option(0, "of the student; 0: in proportion", low=0)
    start: str = option(
        "auto", "random, or layers of the teacher: uniform (0,2,4,7,9,11 of 12), first, last, 0,2,4; auto: if they fit"
    )
    init: str | None = option(None, "a run that the student goes on from, instead of --student and --start")
    general: str | None = option(
        None, "tinybert: pretrained run of its first step, which has that run's settings (but --data, --seed)"
    )
    general_steps: int = option(0, "tinybert: of its first step; 0: as many as that run had", low=0)
    copies: int = option(4, "tinybert: of each labelled text, with other words by the pretrained BERT", low=0)
    layer_map: str = option(
        "uniform", "who learns from which: uniform (2,5,8,11 of 12), last, first, or teacher:student 0:0,2:1"
    )
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


TASK_CONFIGS = {"mlm": MLMConfig, "classify": ClassifyConfig, "qa": QAConfig}  # the flags of one task only


@dataclass
class OptimConfig(Checked):
    """The optimizer and its schedule."""

    optimizer: str = option("muon", "Muon for the hidden matrices and AdamW for the rest, or AdamW", ("muon", "adamw"))
    lr: float = option(0.02, "peak learning rate (with Muon: of the hidden matrices)", low=0)
    embed_lr: float = option(0.0, "AdamW's for embeddings; 0: lr, with Muon lr / 2", low=0)
    head_lr: float = option(0.0, "AdamW's for an untied head, norms and biases; 0: lr, with Muon lr / 4", low=0)
    schedule: str = option("trapezoidal", "shape after the warm-up", ("trapezoidal", "cosine", "linear", "constant"))
    warmup: float = option(0.02, "warm-up: share of the steps, or their number if 1 or more", low=0)
    cooldown: float = option(0.5, "share of the steps in which a trapezoidal schedule falls", low=0, high=1)
    min_lr: float = option(0.0, "learning rate at the end, as a share of the peak", low=0, high=1)
    weight_decay: float = option(0.0, "decoupled weight decay of matrices and embeddings", low=0)
    beta1: float = option(0.9, "AdamW's first-moment decay", low=0, high=0.999999)
    beta2: float = option(0.95, "AdamW's second-moment decay", low=0, high=0.999999)
    momentum: float = option(0.95, "Muon's momentum", low=0, high=0.999999)
    clip: float = option(1.0, "largest gradient norm; 0: no clipping", low=0)


@dataclass
class TrainConfig(Checked):
    """The loop. log_every, sample_every, checkpoint_every, keep and accumulation may change when a run goes on."""

    steps: int = option(1000, "optimizer steps", low=0)
    epochs: float = option(0.0, "passes over the training data, instead of --steps", low=0)
    batch_size: int = option(16, "global batch in sequences, over all ranks and accumulated parts", low=1)
    accumulation: int = option(1, "parts into which each rank cuts its share of the batch", low=1, resume=True)
    seed: int = option(1, "seed of weights, order and dropout", low=0, high=2**63 - 1)
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: str = option(
        "auto", "of matrix products; auto: bfloat16 where the hardware multiplies it", ("auto", "bfloat16", "float32")
    )
    compile: str = option(
        "auto",
        "torch.compile; auto: on GPUs. On CPUs true is faster, but does not repeat to the bit",
        ("auto", "true", "false"),
    )
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass: less memory")
    eval_every: int = option(250, "steps between evaluations; 0: at the end only, when fine-tuning each epoch", low=0)
    eval_tokens: int = option(0, "validation tokens that evaluations of lm before the last use; 0: all", low=0)
    log_every: int = option(10, "steps between lines of metrics.jsonl", resume=True, low=1)
    sample_every: int = option(250, "steps between printed samples; 0: never", resume=True, low=0)
    checkpoint_every: int = option(250, "steps between checkpoints; 0: only when interrupted", resume=True, low=0)
    keep: int = option(2, "checkpoints kept", resume=True, low=1)


# ---------------------------------------------------------------- presets: name -> flags
# A modern small recipe, kept together because its parts were tuned together.
MODERN = dict(
    norm="rmsnorm", positions="rope", activation="relu2", qk_norm=True, bias=False, tied=False, zero_init=True
)  # fmt: skip
# GPT-2's ways (Radford et al. 2019) with the training values of nanoGPT's reproduction.
GPT2 = dict(
    max_len=1024, vocab_size=50257, tokenizer="gpt2", optimizer="adamw", lr=6e-4, beta2=0.95, weight_decay=0.1,
    schedule="cosine", warmup=0.007, min_lr=0.1, batch_size=480, accumulation=5, steps=100_000, eval_every=1000,
    checkpoint_every=1000,
)  # fmt: skip
GPT_PRESETS: dict[str, dict] = {
    "laptop": dict(
        MODERN, n_layers=6, n_heads=4, d_model=256, max_len=256, vocab_size=2048, lr=0.01, weight_decay=0.1,
        steps=390, eval_every=130, sample_every=130, checkpoint_every=130,
    ),
    "char": dict(
        MODERN, n_layers=4, n_heads=4, d_model=128, max_len=64, tokenizer="bytes", data="tinyshakespeare",
        batch_size=12, steps=2000, eval_every=500,
    ),
    "gpt2": dict(GPT2, n_layers=12, n_heads=12, d_model=768),
    "gpt2-medium": dict(GPT2, n_layers=24, n_heads=16, d_model=1024, lr=3e-4),
    "gpt2-large": dict(GPT2, n_layers=36, n_heads=20, d_model=1280, lr=2.5e-4),
    "gpt2-xl": dict(GPT2, n_layers=48, n_heads=25, d_model=1600, lr=2e-4),
}  # fmt: skip
# What makes a stack of blocks an encoder.
ENCODER = dict(causal=False, n_segments=2)
# BERT's ways (Devlin et al. 2019, appendix A.2); the small sizes are those of Turc et al. 2019.
BERT = dict(
    ENCODER, norm_place="post", norm_eps=1e-12, activation="gelu", dropout=0.1, max_len=512, vocab_size=30522,
    optimizer="adamw", lr=1e-4, beta2=0.999, weight_decay=0.01, schedule="linear", warmup=0.01, batch_size=256,
    steps=1_000_000, eval_every=5000, checkpoint_every=5000,
)  # fmt: skip
BERT_PRESETS: dict[str, dict] = {
    "bert-laptop": dict(
        MODERN, **ENCODER, n_layers=6, n_heads=4, d_model=256, max_len=128, vocab_size=2048, lr=0.01,
        batch_size=32, steps=390, eval_every=130, sample_every=130, checkpoint_every=130,
    ),
    "bert-tiny": dict(BERT, n_layers=2, n_heads=2, d_model=128),
    "bert-mini": dict(BERT, n_layers=4, n_heads=4, d_model=256),
    "bert-small": dict(BERT, n_layers=4, n_heads=8, d_model=512),
    "bert-medium": dict(BERT, n_layers=8, n_heads=8, d_model=512),
    "bert-base": dict(BERT, n_layers=12, n_heads=12, d_model=768),
    "bert-large": dict(BERT, n_layers=24, n_heads=16, d_model=1024),
}  # fmt: skip
PRESETS = BERT_PRESETS | GPT_PRESETS


def model_preset(name: str) -> ModelConfig:
    """The ModelConfig of a preset, for use from Python: GPT(model_preset("gpt2"))."""
    return from_dict(ModelConfig, {k: v for k, v in PRESETS[name].items() if k in field_names(ModelConfig)})


# ---------------------------------------------------------------- dataclasses <-> JSON and command line
def field_names(cls) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def from_dict(cls, values: dict):
    """A dataclass from config.json's object; a key it does not know is an error, a missing one has its default."""
    unknown = sorted(set(values) - field_names(cls))
    if unknown:
        raise UserError(f"unknown {cls.__name__} fields {', '.join(unknown)}: was this run made by a newer version?")
    return cls(**values)


def nearest(name: str, names) -> str:
    """' (did you mean X?)', or nothing when no name is close."""
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def parse_value(name: str, text: str | list[str], kind):
    """A flag's text as its field's type, which is one of int, float, bool, str, a list of ints, or None."""
    if isinstance(text, list):  # a positional argument with several values
        return text
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    try:
        if list[int] in options and "," in text:
            return [int(part) for part in text.split(",")]
        if bool in options:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if int in options:
            number = float(text) if "e" in text.lower() else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if float in options:
            return float(text)
        return text.lower() if text in ("True", "False") else text  # of flags like --compile, with true and auto
    except (ValueError, KeyError, OverflowError):
        wanted = "true or false" if bool in options else "a whole number" if int in options else "a number"
        raise UserError(f"--{name} {text}: expected {wanted}") from None


class Parser(argparse.ArgumentParser):
    """argparse, but its complaints are UserErrors and name the flag that was probably meant."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")

    def refuse_unknown(self, unknown: list[str]) -> None:
        known = {flag for action in self._actions for flag in action.option_strings}
        for word in unknown:
            if word.startswith("-"):
                flag = word.split("=")[0]
                raise UserError(f"unknown flag {flag}{nearest(flag, known)}; see --help")
        if unknown:
            raise UserError(f"unexpected argument {unknown[0]!r}; see --help")


def add_flags(parser: argparse.ArgumentParser, cls, defaults: dict, without: set[str]) -> None:
    """One flag for each field of a dataclass but those `without`, in a group of its own, its default shown."""
    title = cls.__name__.removesuffix("Config").removesuffix("Options").lower()
    group = parser.add_argument_group(title, cls.__doc__.splitlines()[0])
    for f in dataclasses.fields(cls):
        if not f.metadata.get("flag", True) or f.name in without:
            continue
        default = defaults.get(f.name, f.default)
        shown = str(default).lower() if isinstance(default, bool) else default
        help = f.metadata["help"].replace("%", "%%")
        if nargs := f.metadata.get("positional"):  # "1" or, as in argparse, "+" for one or more
            group.add_argument(f.name, metavar=f.name.upper(), nargs=None if nargs == "1" else nargs, help=help)
            continue
        metavar = "|".join(f.metadata["choices"]) or _metavar(f.type)
        group.add_argument(f"--{f.name}", metavar=metavar, help=f"{help} [{shown}]", default=argparse.SUPPRESS)


def _metavar(kind) -> str:
    names = {int: "N", float: "X", bool: "true|false", str: "S"}
    options = typing.get_args(kind) or (kind,)
    return names.get(options[0], "S")


def peek(argv: list[str], name: str, default: str) -> str:
    """The value of one flag, for what has to be known before the others make sense."""
    parser = Parser(allow_abbrev=False, add_help=False)
    parser.add_argument(f"--{name}", default=default)
    return getattr(parser.parse_known_args(argv)[0], name)


def parse_flags(
    argv: list[str],
    classes: list,
    description: str,
    presets: dict[str, dict] | None = None,
    without: set[str] = frozenset(),
    **defaults,
):
    """Reads a command line into dataclasses: the fields' defaults < preset < defaults < flags.

    presets: those of --preset, the first of them its default. without: fields that are no flags of this command.
    Where two classes have a field of the same name, the first of them has the flag.

    Returns ([one object for each class], the names of the flags that were given).
    Raises UserError for anything unknown or misspelt, naming the nearest flag.
    """
    parser = Parser(description=description, allow_abbrev=False, formatter_class=_formatter)
    if presets:
        names, first = ", ".join(presets), next(iter(presets))
        parser.add_argument("--preset", metavar="NAME", default=first, help=f"{names} [{first}]")
        name = peek(argv, "preset", first)
        if name not in presets:
            raise UserError(f"unknown preset {name}{nearest(name, presets)}: choose one of {names}")
        defaults = presets[name] | defaults
    flags = [(f.name, cls) for cls in classes for f in dataclasses.fields(cls) if f.metadata.get("flag", True)]
    owners = {name: cls for name, cls in reversed(flags) if name not in without}
    for cls in classes:
        add_flags(parser, cls, defaults, {name for name in field_names(cls) if owners.get(name) is not cls})
    known, unknown = parser.parse_known_args(argv)
    parser.refuse_unknown(unknown)

    given = {name: text for name, text in vars(known).items() if name != "preset"}
    objects = []
    for cls in classes:
        values = {n: v for n, v in defaults.items() if n in field_names(cls) and owners.get(n, cls) is cls}
        for f in dataclasses.fields(cls):
            if f.name in given and owners[f.name] is cls:
                values[f.name] = parse_value(f.name, given[f.name], f.type)
        objects.append(cls(**values))
    return objects, set(given)


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34, width=118)


def dispatch(argv: list[str], commands: dict[str, tuple[Callable, str]], program: str) -> None:
    """Calls the command that argv names with the rest of argv; commands: {name: (function, what it does)}."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:10} {what}" for name, (_, what) in commands.items()]
        print("\n".join([f"usage: {program} COMMAND ... (COMMAND --help lists its flags)", "", *lines]))
        return
    name, *rest = argv
    if name not in commands:
        raise UserError(f"unknown command {name}{nearest(name, commands)}: choose one of {', '.join(commands)}")
    sys.argv[0] = f"{program} {name}"
    commands[name][0](rest)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs a command on sys.argv; a user's mistake becomes one line and exit status 2."""
    try:
        main(sys.argv[1:])
        return
    except UserError as error:
        message, status = f"error: {error}", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:  # a full disk, a folder that may not be written
        message, status = f"error: {error.filename or 'the system'}: {error.strerror or error}", 2
    if os.environ.get("RANK", "0") == "0":  # of many processes, one speaks
        print(message, file=sys.stderr)
    raise SystemExit(status)
