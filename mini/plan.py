"""What a training will take: bytes on each GPU, bytes on the link, seconds, and what it waits for; nothing is trained.

All of it follows from the model's own counts. Bytes are what autograd keeps without torch.compile, which saves some of
them; beside them a GPU holds a context, NCCL's buffers, and gaps between its blocks of memory: 1 to 3 GB. Evaluations,
which hold the logits of one micro-batch, are not counted.

Shapes: B sequences of a micro-batch, T time, N = B T, C channels, H heads, K key/value heads, D head size, F width of
the MLP, R rows of the vocabulary's matrix. low: bytes of a number in a matrix product (the residual stream has 4).
"""

import itertools
import json
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import nn

from mini.flags import Checked, UserError, field_names, option, parse_flags, peek
from mini.model.attention import BLOCK, View
from mini.model.config import ModelConfig
from mini.model.layers import Linear
from mini.model.scores import ROWS
from mini.model.transformer import Model
from mini.presets import BERT_PRESETS, GPT_PRESETS
from mini.tasks import TASKS
from mini.tasks.base import Task
from mini.tasks.masked import MLMConfig
from mini.text.tokenizer import ByteTokenizer
from mini.training.loop import TrainConfig, micro_batch_size
from mini.training.optim import OptimConfig
from mini.training.runs import MODELS

FLAGS = {"batch_size", "accumulation", "steps", "tokens", "dtype", "device", "checkpoint_activations", "optimizer",
         "turns", "nsp", "mask_rate"}  # of a training, what costs something # fmt: skip


@dataclass
class PlanOptions(Checked):
    """Say what a training takes on so many GPUs, before it is begun: memory, time, and what it waits for."""

    gpus: int = option(1, "ranks, each on a GPU", low=1)
    gpu_memory: float = option(80e9, "bytes of each", low=1)
    gpu_flops: float = option(312e12, "per second, of each, in --dtype, as its data sheet says", low=1)
    exact_flops: float = option(0.0, "in all bits of float32, as Muon iterates; 0: gpu_flops / 15 (A100, H100)", low=0)
    utilisation: float = option(0.4, "share of these that a training reaches", low=1e-6, high=1)
    link: float = option(25e9, "bytes per second that each GPU sends to others", low=1)
    shard: bool = option(False, "FSDP2: each rank holds its share of weights, gradients and optimizer state")


def block_bytes(c: ModelConfig, layer: int, B: int, T: int, low: int, cpu: bool) -> float:
    """What the backward pass of a block needs of its forward pass, beside the weights. cpu: as CPUs compute it."""
    C, D, H, F = c.d_model, c.head_size, c.layers("n_heads")[layer], c.layers("d_ff")[layer]
    K, dropout, turned = c.n_kv_heads or H, c.dropout > 0, c.qk_norm or c.positions == "rope"
    view = View(c.causal, None, c.layers("window")[layer], c.n_global)
    near = c.attention != "reference" and view.pays_in_blocks(T, T)  # keys and values are copied for each block
    keys = (1 + sum(view.neighbours)) * BLOCK + c.n_global if near else T
    faster = cpu and low < 4 and (BLOCK * keys if near else T * T) <= 512 * 512 and (near or c.attention == "auto")
    written = c.attention == "reference" or faster or (cpu and dropout)  # that has no fused call on CPUs

    norms = 1 if c.embed_norm and layer == 0 else 2
    total = norms * (4 * C + 8 if c.norm == "layernorm" else (8 if cpu else 4) * C + 4)  # input, statistics
    total += low * (C + H * D + C + F)  # inputs of qkv, out (which attention shares), up and down
    # The function's input; with a gate that, the function and what it multiplies, and in short another copy of x.
    total += low * (3 * F + C * (low < 4) if c.gated else F)
    total += 2 * C * (low if cpu else 1) * dropout
    if c.qk_norm:
        total += 4 * (H + K) + 4 * (H + K) * D * (low < 4)  # statistics, and the input in float32
    if (c.qk_norm and low == 4) or not (near or written or (turned and (K < H or c.value_embeddings))):
        total += low * (H + 2 * K) * D  # what qkv gave, of which something is a view
    if near or written:
        total += low * H * D * (1 + 2 * (keys / BLOCK if near else 1))  # copies of q, k and v
    else:
        total += low * (H + K) * D * turned + low * (2 * H * D if K < H else K * D * c.value_embeddings)
    if near and c.n_global:  # whose queries look at all keys
        total += low * H * D * 2 if written else low * ((H + K) * D * turned + 2 * (H + K) * D)
    if written:  # the scores' softmax, which autocast has in float32 on GPUs; with dropout that, and what is left
        total += H * keys * (low * (3 if dropout else 1) if cpu else 4 + low * (low < 4 or dropout) + dropout)
    else:  # log-sums; the mask where one is held
        total += 4 * H + (4 if cpu else low) * (keys if near else view.is_local(T) * T / B)
    return B * T * total


def head_bytes(c: ModelConfig, rows: int, low: int, in_parts: bool) -> float:
    """The most that the loss of so many tokens over the vocabulary takes at one time; in_parts: as LossInParts does."""
    table = c.n_rows * c.d_model
    states, short = 8 * rows * c.d_model, low * table * (low < 4)  # and their gradients; the matrix in autocast's dtype
    if not in_parts:  # log-softmax, its gradient and that of the scores
        return states + short + (12 + low * (c.logit_softcap > 0)) * rows * c.n_rows
    scores = min(ROWS, rows) * c.n_rows
    forward = short + max((20 if c.logit_softcap else 12 if low == 4 else 14) * scores, 8 * scores + low * table)
    return states + 4 * table + max(forward, 4 * table)  # the matrix's gradient is there at once, and scaled later


def sizes(model: Model, optim: OptimConfig) -> SimpleNamespace:
    """Numbers of parameters: all, that learn, of all blocks, of the largest; and (rows, columns) of Muon's matrices."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.stack.blocks]
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = [m for m in model.stack.blocks.modules() if isinstance(m, Linear)]
    muon = [(rows, m.in_features) for m in linear for rows in m.parts] if optim.optimizer == "muon" else []
    total = sum(p.numel() for p in model.parameters())
    return SimpleNamespace(total=total, learn=learn, blocks=sum(blocks), block=max(blocks), muon=muon,
                           hidden=sum(a * b for a, b in muon))  # fmt: skip


def memory(options: PlanOptions, model: Model, train: TrainConfig, optim: OptimConfig, task: Task) -> dict:
    """Bytes on each GPU by what they are for, and "peak", the most at one time: they are not there all at once."""
    c, T, n, size = model.config, model.config.max_len, options.gpus, sizes(model, optim)
    B, low, cpu = micro_batch_size(train, ranks(n)), 4 if train.dtype == "float32" else 2, train.device == "cpu"
    N, C, share = B * T, c.d_model, n if options.shard else 1
    held = {
        "parameters": 4 * size.total / share,
        "optimizer": 4 * (2 * size.learn - size.hidden) / share,  # AdamW's two moments, Muon's one
        "buckets": 4 * size.learn * (n > 1 and not options.shard),  # DDP's own, beside the gradients
    }
    gradients = 4 * size.learn / share
    # Whole groups under FSDP2: all but the blocks, and of these one and the next. Its gradients are as large.
    gathered = 4 * (size.total - size.blocks + 2 * size.block) * options.shard
    unreduced = gathered or 4 * c.n_rows * C  # gradients not shared out yet; the second of a tied table, not added yet
    vocabulary = model.vocabulary_weights()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight not in vocabulary]
    copies = low * sum(map(torch.numel, linear)) * (low < 4)  # autocast's, which are whole on each rank

    blocks = [block_bytes(c, layer, B, T, low, cpu) for layer in range(c.n_layers)]
    edges = N * ((8 if c.norm == "rmsnorm" and cpu else 4) * C + 8 + C * (4 if cpu else 1) * (c.dropout > 0))
    kept, again = sum(blocks), copies
    if train.checkpoint_activations:  # each block's input, and all of one block, which has its input already
        kept, again = 4 * N * C * c.n_layers, max(blocks) - 4 * N * C + copies / c.n_layers
    # Gradients on their way through an MLP, of whose tensors one is free by then.
    passing = N * (low * max(c.layers("d_ff")) * (1 if c.activation.startswith("gelu") else 2) + 8 * C)
    logits = head_bytes(c, round(N * task.predicted), low, task.in_parts)
    # Muon: the updates; those of one shape again, with A, P and products; and what ranks send each other.
    alike = [size.muon.count((a, b)) * (a * b + 5 * min(a, b) ** 2) for a, b in set(size.muon)]
    muon = 4 * ((size.hidden + max(alike, default=0)) / n + size.hidden * (n > 1)) / optim.turns
    earlier = gradients * (train.accumulation > 1)  # of the micro-batches before
    times = {
        "loss": gathered + earlier + copies + kept + edges + logits,
        "backward": gathered + earlier + again + kept + edges + passing + unreduced,
        "gradients": gathered + gradients + unreduced,
        "optimizer": gradients + muon,
    }
    at = max(times, key=times.get)
    rest = dict(gradients=gradients, whole_groups=2 * gathered, copies=copies, activations=kept + edges, logits=logits)
    return {**held, **rest, "muon": muon, "peak": sum(held.values()) + times[at], "peak_at": at}


def seconds(options: PlanOptions, model: Model, train: TrainConfig, optim: OptimConfig, task: Task) -> dict:
    """FLOPs of a step on all GPUs, bytes that each of them sends, and seconds.

    Backward is twice forward (Kaplan et al. 2020). DDP's exchange overlaps with the last backward pass of a step, each
    of FSDP2's with its pass, Muon's with nothing.
    """
    T, n, parts, size = model.config.max_len, options.gpus, train.accumulation, sizes(model, optim)
    N = micro_batch_size(train, ranks(n)) * T
    forward = N * model.flops(T, task.predicted)  # of a micro-batch
    backward = 2 * forward + N * model.stack.flops(T) * train.checkpoint_activations
    # orthogonalize(): A = XXᵀ and PX; of m x m matrices five squares, and but once PQ and QAQ.
    muon = sum(4 * min(s) ** 2 * max(s) + 2 * (5 + 4 + 8) * min(s) ** 3 for s in size.muon) / optim.turns
    gather = 4 * (n - 1) / n  # bytes sent for each number that all have in the end, or that is summed up for one
    ahead, behind = (size.total, size.blocks + size.learn) if options.shard else (0, 2 * size.learn)
    ahead, behind, shared = gather * ahead, gather * behind, gather * size.hidden / optim.turns
    sent = (ahead + behind) * (parts if options.shard else 1) + shared

    speed, exact = (options.utilisation * x for x in (options.gpu_flops, options.exact_flops or options.gpu_flops / 15))
    there, back, link = forward / speed, backward / speed, options.link
    last = max(there, ahead / link) + max(back, behind / link)
    step = parts * last if options.shard else (parts - 1) * (there + back) + last
    return {
        "flops": n * parts * (forward + backward) + muon, "muon_flops": muon, "bytes_sent": sent,
        "arithmetic_s": parts * (there + back) + muon / n / exact, "link_s": sent / link,
        "step_s": step + muon / n / exact + shared / link,
    }  # fmt: skip


def ranks(n: int) -> SimpleNamespace:
    return SimpleNamespace(size=n)


def read(argv: list[str]) -> tuple[PlanOptions, Model, TrainConfig, OptimConfig, Task]:
    """What the command line says, where a hyphen in a flag's name is as good as an underscore."""
    argv = [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    kind = "bert" if peek(argv, "preset", "") in BERT_PRESETS else "gpt"
    classes = [PlanOptions, TrainConfig, OptimConfig, ModelConfig, MLMConfig]
    without = set().union(*map(field_names, (TrainConfig, OptimConfig, MLMConfig))) - FLAGS
    presets = GPT_PRESETS | BERT_PRESETS
    of_bytes = presets.get(peek(argv, "preset", ""), {}).get("tokenizer") == "bytes"
    own = dict(vocab_size=ByteTokenizer().vocab_size) if of_bytes else {}
    settings, given = parse_flags(argv, classes, PlanOptions.__doc__, presets, without, **own)
    options, train, optim, config, mlm = settings
    if config.block != "transformer":
        raise UserError(f"--block {config.block}: only a transformer's activations can be told beforehand")
    if kind == "gpt" and (unused := given & field_names(MLMConfig)):
        raise UserError(f"--{min(unused)} has no effect here: it is for BERTs; name one of their presets")
    if options.shard and options.gpus == 1:
        raise UserError("--shard true: one GPU has nobody to share with; give --gpus")
    if {"steps", "tokens"} <= given:
        raise UserError("--steps and --tokens: give one of them")
    if not given & {"batch_size", "accumulation"} and train.batch_size % (options.gpus * train.accumulation):
        wanted, train.accumulation = train.batch_size, 1
        train.batch_size += -wanted % options.gpus
        print(f"--batch_size {train.batch_size} --accumulation 1: the preset's {wanted} cannot be cut for these GPUs")
    predicted, heads = 1.0, {}
    if kind == "bert":
        room = config.max_len - (3 if mlm.nsp else 2)  # as in MaskedLanguageModelling
        predicted, heads = max(1, round(mlm.mask_rate * room)) / config.max_len, dict(mlm=True, nsp=mlm.nsp)
    with torch.device("meta"):  # shapes alone
        model = MODELS[kind](replace(config, **heads))
    model.freeze_unused()
    in_parts = TASKS["mlm" if heads else "lm"].in_parts
    return options, model, train, optim, SimpleNamespace(fixed_shape=True, predicted=predicted, in_parts=in_parts)


def remedies(options: PlanOptions, model: Model, train: TrainConfig, optim: OptimConfig, task: Task) -> list[str]:
    """The fewest flags that make it fit, each way there is."""
    each = train.batch_size // options.gpus  # sequences
    ways = {"accumulation": [n for n in range(train.accumulation + 1, each + 1) if each % n == 0],
            "checkpoint_activations": [True] * (not train.checkpoint_activations),
            "shard": [True] * (options.gpus > 1 and not options.shard)}  # fmt: skip
    found: dict[tuple, str] = {}  # of several accumulations the first
    for n in (1, 2, 3):
        for names in itertools.combinations(ways, n):
            for values in itertools.product(*map(ways.get, names)):
                new = dict(zip(names, values, strict=True))
                settings = replace(options, shard=new.pop("shard", options.shard)), model, replace(train, **new)
                if names not in found and memory(*settings, optim, task)["peak"] <= options.gpu_memory:
                    found[names] = " ".join(f"--{k} {str(v).lower()}" for k, v in zip(names, values, strict=True))
        if found:
            break
    return list(found.values())


def plan(argv: list[str]) -> None:
    """Prints what it takes, then all figures as one JSON object."""
    settings = read(argv)
    options, model, train, _, task = settings
    size, time, T = memory(*settings), seconds(*settings), model.config.max_len
    steps, fits = train.total_steps(task, model), size["peak"] <= options.gpu_memory
    waits = "memory" if not fits else "link" if time["link_s"] > time["arithmetic_s"] else "arithmetic"
    cures = [] if fits else remedies(*settings)
    figures = {
        "parameters": model.num_params(), "gpus": options.gpus, "batch_size": train.batch_size,
        "accumulation": train.accumulation, "micro_batch": micro_batch_size(train, ranks(options.gpus)),
        "steps": steps, "tokens": steps * train.batch_size * T, "bytes": size, "fits": fits, "remedies": cures, **time,
        "tokens_per_s": train.batch_size * T / time["step_s"], "seconds": steps * time["step_s"], "bottleneck": waits,
    }  # fmt: skip
    f = SimpleNamespace(**figures)
    print(f"{type(model).__name__} with {f.parameters:,} parameters on {f.gpus} GPUs, each with {f.accumulation} x "
          f"{f.micro_batch} of {f.batch_size} sequences of {T} tokens")  # fmt: skip
    print("bytes per GPU: " + ", ".join(f"{k} {v / 1e9:.3g} GB" for k, v in size.items() if k[:4] != "peak" and v))
    print(f"at one time {size['peak'] / 1e9:.3g} GB ({size['peak_at']}) of {options.gpu_memory / 1e9:.3g} GB:",
          "it fits" if fits else "it does not fit")  # fmt: skip
    if not fits:
        cure = "; or with ".join(cures) or "more GPUs and --shard true, or a smaller model"
        print(f"it would fit with {cure}")
    print(f"a step: {f.flops:.3g} FLOPs, {f.arithmetic_s:.3g} s at {options.utilisation:.0%} of the GPUs' speed; "
          f"{f.bytes_sent / 1e9:.3g} GB from each GPU, {f.link_s:.3g} s; together {f.step_s:.3g} s")  # fmt: skip
    print(f"{steps:,} steps, {f.tokens:,} tokens: {f.seconds / 3600:.3g} hours, {f.tokens_per_s:,.0f} tokens/s")
    print(f"the bottleneck is {waits}")
    print(json.dumps(figures))
