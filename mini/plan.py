"""What a training takes of each GPU's memory and arithmetic and of the link between them, before it is begun.

All is counted from the model that the flags describe (on PyTorch's meta device, which stores nothing) and from what
loop.py does with it. Letters as in transformer.py; a: bytes of an activation, 4 or 2. Activations are those of eager
PyTorch, of which torch.compile keeps fewer. Not counted, but left room for by --spare: CUDA's context, gaps of the
allocator, buffers of communication. Not counted either: time that is neither matrix products nor link.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch
from torch import nn

from mini.flags import Checked, UserError, option
from mini.model.attention import BLOCK, View
from mini.model.bert import Bert
from mini.model.config import ModelConfig
from mini.model.gpt import GPT
from mini.model.layers import Linear
from mini.model.scores import rows_at_once
from mini.model.transformer import Model
from mini.tasks.masked import MLMConfig
from mini.training.loop import TrainConfig, micro_batch_size
from mini.training.optim import OptimConfig, roles

MASKED = {"mask_rate", "nsp"}
FLAGS = {"batch_size", "accumulation", "checkpoint_activations", "shard", "steps", "tokens", "optimizer",
         "turns"} | MASKED  # fmt: skip


@dataclass
class PlanOptions(Checked):
    """Count what a training takes of each GPU and of the link between them. Nothing is trained."""

    gpus: int = option(1, "GPUs, each with a process", low=1, high=10**6)
    gpu_memory: float = option(80e9, "bytes of each", low=1e6)
    gpu_flops: float = option(400e12, "FLOP/s of each in matrix products of --dtype, by its data sheet", low=1)
    gpu_flops32: float = option(0.0, "the same in full float32, which Muon asks for; 0: gpu_flops / 16", low=0)
    link: float = option(25e9, "bytes/s that each sends and at the same time receives", low=1)
    utilisation: float = option(0.4, "share of those FLOP/s that a training reaches", low=0.001, high=1)
    spare: float = option(0.1, "share of the memory that is left to what is not counted", low=0, high=0.99)
    dtype: str = option("bfloat16", "of matrix products", ("bfloat16", "float16", "float32"))
    device: str = option("cuda", "whose ways of attention, norms and dropout", ("cuda", "cpu"))


NO_FLAGS = {f.name for cls in (TrainConfig, OptimConfig, MLMConfig) for f in fields(cls)} - FLAGS
NO_FLAGS -= {f.name for f in fields(PlanOptions)}


# ---------------------------------------------------------------- what autograd keeps until the backward pass
def norm_bytes(c: ModelConfig, cpu: bool) -> int:
    """For a token: the input and its statistics; on a CPU also what RMSNorm multiplies by its scale."""
    return 4 * c.d_model + 8 if c.norm == "layernorm" else 4 * c.d_model * (2 if cpu else 1) + 4


def attention_bytes(c: ModelConfig, layer: int, T: int, a: int, cpu: bool) -> float:
    """For a token: what lies between the input of qkv and that of out, which is included."""
    H, D = c.layers("n_heads")[layer], c.head_size
    K = c.n_kv_heads or H
    qk, qkv = (H + K) * D, (H + 2 * K) * D
    view = View(c.causal, window=c.layers("window")[layer], n_global=c.n_global)
    local = c.attention != "reference" and view.pays_in_blocks(T, T)
    S = view.n_global + (1 + sum(view.neighbours)) * BLOCK if local else T  # keys that a query is held against
    queries, copies = (BLOCK, S / BLOCK) if local else (T, 1)  # in blocks, each key is there several times
    faster = cpu and a == 2 and queries * S <= 512 * 512 and (local or c.attention == "auto")
    kept = (4 * (qk if a == 2 else qkv) + 4 * (H + K)) * c.qk_norm  # its input, in float32
    if faster or c.attention == "reference" or (cpu and c.dropout):  # written out: q, k, v, output; what has S columns:
        score = (a if cpu or a == 4 else 4 + a) + (2 * a if cpu else 5 if a == 4 else 1) * bool(c.dropout)
        return kept + (2 + 2 * copies) * H * D * a + H * S * score
    kept += H * D * a + 4 * H  # the output, and the logarithm of each row's sum
    if local:
        return kept + (1 + 2 * copies) * H * D * a + S * a  # q, k, v and the mask
    treated = c.qk_norm or c.positions == "rope"
    sliced = not treated or (K == H and not c.value_embeddings)  # a slice of what qkv gave is kept, and so all of it
    kept += qkv * a * (sliced and not (c.qk_norm and a == 4)) + qk * a * treated
    return kept + (2 * H * D if K < H else K * D * c.value_embeddings) * a


def block_bytes(c: ModelConfig, layer: int, B: int, T: int, a: int, cpu: bool) -> float:
    """For a micro-batch and a block: activations, without weights and without copies of them."""
    C, d_ff = c.d_model, c.layers("d_ff")[layer]
    token = norm_bytes(c, cpu) * (1 if c.embed_norm and layer == 0 else 2) + attention_bytes(c, layer, T, a, cpu)
    token += C * a * (3 if c.gated and a == 2 else 2)  # inputs of qkv, up, gate; autocast copies those of both
    token += d_ff * a * (4 if c.gated else 2)  # inputs and output of the activation, of its product with the gate
    token += 2 * C * (a if cpu else 1) * bool(c.dropout)  # masks
    return B * T * token


def ends_bytes(c: ModelConfig, B: int, T: int, predicted: float, a: int, cpu: bool) -> float:
    """For a micro-batch: norms and dropout of the stack itself, its output, and what BERT's head does with that."""
    token = norm_bytes(c, cpu) * (2 if c.embed_norm else 1) + 4 * c.d_model
    token += c.d_model * (4 if cpu else 1) * bool(c.dropout)
    return B * T * (token + c.mlm * predicted * (c.d_model * (2 * a + 4) + norm_bytes(c, cpu)))


def loss_bytes(c: ModelConfig, rows: int, tokens: float, a: int, device: str) -> float:
    """LossInParts: the gradients of weight and states, and beside them W, a product and some scores, or both anew."""
    weight, states, short, cap = rows * c.d_model, 4 * tokens * c.d_model, a if a == 2 else 0, bool(c.logit_softcap)
    n = min(rows_at_once(device), tokens)
    score = (8 if a == 4 else 12) + 8 * cap + 4 * (tokens > n)  # scores, logits, softmax; those of the rows before
    return 4 * weight + states + max(weight * (short + a) + n * rows * score, 4 * weight + states)


# ---------------------------------------------------------------- memory, arithmetic, link
def sizes(model: Model) -> tuple[int, int, list[int], nn.Linear]:
    """(parameters that learn, those of them that are hidden matrices, those of each block, the vocabulary's head)."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hidden = sum(model.get_parameter(name).numel() for name, role in roles(model).items() if role == "hidden")
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.stack.blocks]
    return total, hidden, blocks, model.head if model.config.causal else model.mlm.decoder


def memory(model: Model, o: PlanOptions, train: TrainConfig, optim: OptimConfig, predicted: float) -> dict[str, dict]:
    """{moment of a step: {what: bytes of a GPU}}. Parameters, their gradients and optimizer state are float32."""
    c, T, n, cpu, again = model.config, model.config.max_len, o.gpus, o.device == "cpu", train.checkpoint_activations
    B, a, s = train.batch_size // (n * train.accumulation), 4 if o.dtype == "float32" else 2, n if train.shard else 1
    P, hidden, blocks, head = sizes(model)
    muon, table, largest = hidden * (optim.optimizer == "muon"), 4 * head.weight.numel(), max(blocks)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    casts = 2 * sum(p.numel() for m in linear for p in m.parameters()) if a == 2 else 0  # autocast's, for both passes,
    casts *= not train.shard  # which gathers blocks in what they are multiplied in
    layers = [block_bytes(c, layer, B, T, a, cpu) for layer in range(c.n_layers)]
    slopes = B * T * ((4 + a) * c.d_model + 2 * a * max(c.layers("d_ff")))  # gradients by what is kept of a block
    kept = ends_bytes(c, B, T, predicted, a, cpu) + (4 * B * T * c.d_model * c.n_layers if again else sum(layers))
    stays = train.accumulation > 1 or (n > 1 and not train.shard)  # gradients, through the next forward pass: DDP's do
    first = 4 * P / s if stays else 0 if train.shard else table + 4 * blocks[-1]
    root, group = 4 * (P - sum(blocks)), (3 * a + 4) * largest  # all but blocks; two blocks, a gradient, what is sent
    # Of matrices whose turn it is: updates, and what is made of them: own steps, what is sent to others, what comes.
    share = 4 * muon / optim.turns * (4 if n == 1 else 6 / n if train.shard else 3 + 1 / n)
    loss = loss_bytes(c, len(head.weight), B * T * predicted, a, o.device)
    judged = min(rows_at_once(o.device), B * T) if c.causal else B * T * predicted  # whose logits are there at once
    whole = judged * len(head.weight) * (12 if c.logit_softcap else 8 + 2 * (a == 2))
    always = {"parameters": 4 * P / s, "optimizer state": (8 * P - 4 * muon) / s}
    names = "gradients", "activations", "copies of weights", "logits and others", "unsharded"
    moments = {
        "the loss": (4 * P / s * stays, kept, casts, loss, root),
        "the first gradients": (first, kept + slopes + max(layers) * again, casts, 0, root + group + table),
        "the last gradients": (4 * P / s, max(layers) + slopes, 0, table * (stays or c.tied), 2 * root + group),
        "the optimizer": (4 * P / s, 0, 0, share, 0),
        "an evaluation": (4 * P * (n > 1 and not train.shard), 0, casts, whole, root + group),
    }
    return {
        moment: always | dict(zip(names, (*found, unsharded * train.shard), strict=True))
        for moment, (*found, unsharded) in moments.items()
    }


def muon_flops(model: Model) -> list[float]:
    """Of orthogonalize(), for each weight: of sides m <= l XXᵀ and PX, and in five steps 17 products m x m x m."""
    weights = [
        [(rows, m.in_features) for rows in m.parts] for m in model.stack.blocks.modules() if isinstance(m, Linear)
    ]
    return [float(sum(4 * min(s) ** 2 * max(s) + 34 * min(s) ** 3 for s in parts)) for parts in weights]


def busiest(flops: list[float], turns: int, n: int) -> float:
    """Of matrices that take turns and are dealt to n processes, as by Muon: what one with the most has of a step."""
    due = [sorted(flops[i::turns], reverse=True) for i in range(min(turns, len(flops)))]
    return sum(sum(those[::n]) for those in due) / turns  # who has the first has the most


def work(model: Model, o: PlanOptions, train: TrainConfig, optim: OptimConfig, predicted: float) -> dict[str, float]:
    """A GPU's FLOPs, bytes sent and seconds of a step.

    DDP exchanges gradients during the last backward pass, FSDP blocks and their gradients during all passes; Muon's
    results go when all else is done.
    """
    T, n, turn = model.config.max_len, o.gpus, (optim.optimizer == "muon") / optim.turns
    P, hidden, blocks, _ = sizes(model)
    tokens, share = T * train.batch_size // n, 4 * (n - 1) / n  # of a step; bytes that are sent of a parameter
    forward = model.flops(T, predicted) * tokens
    backward = 2 * forward + model.stack.flops(T) * tokens * train.checkpoint_activations
    flops = forward + backward
    own = busiest(muon_flops(model), optim.turns, n) if turn else 0.0
    if train.shard:  # for each micro-batch all-gathers, of blocks twice, and reduce-scatter; matrices there and back
        low = 1 if o.dtype == "float32" else 0.5  # of the bytes, in gathering blocks
        gathered = 2 * P - sum(blocks) + 2 * low * sum(blocks)
        sent, apart, beside = share * train.accumulation * gathered, share * 2 * hidden * turn / n, flops
    else:  # all-reduce; all-gather of matrices
        sent, apart, beside = share * 2 * P, share * hidden * turn, backward / train.accumulation
    rate = o.gpu_flops * o.utilisation
    alone = own / (o.utilisation * (o.gpu_flops32 or o.gpu_flops / 16)) + apart / o.link
    return {
        "flops": flops + own, "bytes_sent": sent + apart, "link_seconds": (sent + apart) / o.link,
        "arithmetic_seconds": flops / rate + alone - apart / o.link,
        "step_seconds": (flops - beside) / rate + max(beside / rate, sent / o.link) + alone,
    }  # fmt: skip


# ---------------------------------------------------------------- the command
def ways_to_fit(fits: Callable, o: PlanOptions, train: TrainConfig) -> list[str]:
    """The flags with which fits(train) is true, as few as will do; each a way of its own."""
    mine, ways = train.batch_size // o.gpus, []
    parts = [p for p in range(train.accumulation, mine + 1) if mine % p == 0]  # smaller and smaller micro-batches
    for shard, again in itertools.product(
        {train.shard, o.gpus > 1 or train.shard}, {train.checkpoint_activations, True}
    ):
        for part in parts:
            flags = {"shard": shard, "checkpoint_activations": again, "accumulation": part}
            if fits(replace(train, **flags)):
                new = [(name, value) for name, value in flags.items() if value != getattr(train, name)]
                ways.append([f"--{name} {str(value).lower()}" for name, value in new])
                break
    return sorted(" ".join(way) for way in ways if len(way) == min(map(len, ways)))


def plan(o: PlanOptions, c: ModelConfig, optim: OptimConfig, train: TrainConfig, mlm: MLMConfig, given: set) -> None:
    """Prints what each GPU holds, computes and sends, which of these is short, and last all as one JSON object."""
    if c.block == "lstm":
        raise UserError("--block lstm: what it keeps is not known here, only that of transformers")
    if {"steps", "tokens"} <= given:
        raise UserError("--steps and --tokens: give one of them")
    if not (train.tokens or train.steps) or ("tokens" in given and not train.tokens):
        raise UserError(f"--{'tokens' if 'tokens' in given else 'steps'} 0: must be more than 0")
    if c.causal and (unused := given & MASKED):
        raise UserError(f"--{min(unused)} is of a BERT's training: give --preset bert-base, say")
    parts, asked = o.gpus * train.accumulation, train.batch_size
    if asked % parts and not given & {"batch_size", "accumulation"}:
        train = replace(train, batch_size=-(-asked // parts) * parts)
        print(f"The preset's batch of {asked} cannot be cut into {parts} equal parts: --batch_size {train.batch_size}")
    B, T = micro_batch_size(train, SimpleNamespace(size=o.gpus)), c.max_len
    predicted = 1.0 if c.causal else max(1, round(mlm.mask_rate * (T - 2 - mlm.nsp))) / T  # as masked.py says it
    with torch.device("meta"):
        model = GPT(c) if c.causal else Bert(replace(c, mlm=True, nsp=mlm.nsp))
    steps = max(1, round(train.tokens / (train.batch_size * T))) if train.tokens else train.steps
    optim = replace(optim, turns=min(optim.turns, max(1, steps)))

    def peak(train: TrainConfig) -> tuple[float, str, dict]:
        return max((sum(p.values()), name, p) for name, p in memory(model, o, train, optim, predicted).items())

    def fits(train: TrainConfig) -> bool:
        return peak(train)[0] <= (1 - o.spare) * o.gpu_memory

    bytes, moment, held = peak(train)
    time, fine = work(model, o, train, optim, predicted), fits(train)
    slower = "link" if time["link_seconds"] > time["arithmetic_seconds"] else "arithmetic"
    figures = {
        "parameters": model.num_params(), "gpus": o.gpus, "shard": train.shard, "batch_size": train.batch_size,
        "accumulation": train.accumulation, "micro_batch": B, "steps": steps, "tokens": steps * train.batch_size * T,
        "bytes": bytes, "moment": moment, "held": held, **time, "seconds": time["step_seconds"] * steps,
        "bottleneck": slower if fine else "memory", "fits": fine,
        "ways_to_fit": [] if fine else ways_to_fit(fits, o, train),
    }  # fmt: skip
    print(f"{type(model).__name__} with {model.num_params():,} parameters, {steps:,} steps of {o.gpus:,} x "
          f"{train.accumulation} x {B} sequences of {T:,} tokens")  # fmt: skip
    print(f"{bytes / 1e9:,.4g} of {o.gpu_memory / 1e9:,.4g} GB of a GPU, the most at the time of {moment}: "
          + ", ".join(f"{name} {value / 1e9:,.3g}" for name, value in held.items() if value))  # fmt: skip
    print(f"{time['step_seconds']:.3g} s a step: {time['arithmetic_seconds']:.3g} s for {time['flops']:.3g} FLOPs of a "
          f"GPU at {o.utilisation:.0%} of its speed, which is assumed; {time['link_seconds']:.3g} s for the "
          f"{time['bytes_sent'] / 1e9:.3g} GB that it sends, at the same time where the loop lets them be")  # fmt: skip
    hours = figures["seconds"] / 3600
    print(f"{figures['tokens']:,} tokens in {hours:,.3g} hours, {hours * o.gpus:,.3g} GPU-hours; what limits it: "
          f"{figures['bottleneck']}")  # fmt: skip
    if not fine:
        print(f"It does not fit with {o.spare:.0%} to spare, but would with " + (", or ".join(figures["ways_to_fit"])
              or "nothing but more memory"))  # fmt: skip
    print(json.dumps(figures))
