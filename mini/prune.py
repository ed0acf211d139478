"""Pruning: which weights, heads, neurons or layers a model can do without, and the model without them.

    scores    how much a weight matters: |w| (Han et al. 2015), |w| times the norm of its input (Wanda, Sun et al.
              2023), or chance, the baseline of both
    masks     True where a weight stays: the least important s of all, of a matrix, or of each group (N:M)
    schedule  all at once, or ever more of them while training goes on (Zhu & Gupta 2017)
    heads, neurons, layers
              are taken out of the matrices, so that the model is smaller and faster; by their norm, or by what the
              loss says of them (Michel et al. 2019)

A mask alone makes nothing faster and no file smaller: masked weights are zeros in dense matrices. Files hold one bit
for each weight and the weights that stay (`pack`).
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mini.config import PruneConfig, UserError
from mini.storage import load_weights, weights
from mini.transformer import SMALL_HEADS
from mini.watch import looking_at, run_all, watching

RAMP = 2 / 3  # the share of the steps in which a cubic schedule prunes; in the rest the model recovers
ROUNDS = 10  # heads and neurons go in so many rounds, their importance measured anew in each (Michel et al. 2019, §4)


# ---------------------------------------------------------------- masks
class Masks(nn.Module):
    """For each pruned matrix a mask of its shape, True where a weight stays. A model has them as `model.masks`."""

    def __init__(self, masks: dict[str, Tensor]):
        super().__init__()
        for name, mask in masks.items():  # the names of buffers have no dots
            self.register_buffer(name.replace(".", "/"), mask)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((name.replace("/", "."), mask) for name, mask in self.named_buffers())


def mask_key(name: str) -> str:
    """The name, in checkpoints and in state_dict(), of a weight's mask."""
    return "masks." + name.replace(".", "/")


def mask_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name of a weight: its mask} of what `weights` gives, or a checkpoint holds."""
    prefix = mask_key("")
    return {k.removeprefix(prefix).replace("/", "."): t for k, t in tensors.items() if k.startswith(prefix)}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """{name of a weight: its mask} of a pruned model; empty for any other."""
    masks = getattr(model, "masks", None)
    return dict(masks.items()) if masks is not None else {}


@torch.no_grad()
def hold(model: nn.Module) -> None:
    """Sets masked weights to zero, after every step of an optimizer: its momentum and Muon's mixing revive them."""
    for name, mask in masks_of(model).items():
        model.get_parameter(name).mul_(mask)


@torch.no_grad()
def hold_gradients(model: nn.Module) -> None:
    """The same for gradients, before their norm is taken: the weights that stay are clipped by their own."""
    for name, mask in masks_of(model).items():
        if (gradient := model.get_parameter(name).grad) is not None:
            gradient.mul_(mask)


def set_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    model.masks = Masks(masks)
    hold(model)


def prunable(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """{name of a weight: its layer} for the matrices that are pruned: all but positions, segments and small heads.

    A matrix with two places (a tied head) stands here once, with the name that files give it.
    """
    layers = {
        f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in SMALL_HEADS
    }
    layers["stack.tokens.weight"] = model.stack.tokens
    return {name: layers[name] for name, _ in model.named_parameters() if name in layers}


def sparsity(model: nn.Module) -> float:
    """The share of the weights that are masked, in the matrices that have masks."""
    masks = masks_of(model).values()
    return sum(int((~mask).sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))


# ---------------------------------------------------------------- which weights go
def scores(model: nn.Module, method: str, seed: int, task=None, batches: list = ()) -> dict[str, Tensor]:
    """The importance of every prunable weight, in matrices of their shapes. Masked weights get -1: they go first.

    Wanda's norms are those of the model as it is; the paper measures each block behind blocks that are pruned already.
    """
    layers = prunable(model)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        found = {n: torch.rand(m.weight.shape, generator=generator).to(m.weight.device) for n, m in layers.items()}
    else:
        found = {name: layer.weight.detach().abs().float() for name, layer in layers.items()}
    if method == "wanda":  # |W_ij| · ‖X_j‖₂ over the tokens of the batches; an embedding has no inputs to measure
        for name, norms in input_norms(model, task, batches).items():
            found[name] = found[name] * norms
    for name, mask in masks_of(model).items():
        found[name] = found[name].masked_fill(~mask, -1)
    return found


def input_norms(model: nn.Module, task, batches: list) -> dict[str, Tensor]:
    """‖X_j‖₂ of each input j of every linear layer, over all real tokens: {name of the weight: (in,)}."""
    squares: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, output: Tensor) -> None:
        squares[name] = squares.get(name, 0) + x.float().square().sum(dim=0)

    layers = {name: layer for name, layer in prunable(model).items() if isinstance(layer, nn.Linear)}
    with watching(model, layers, add):
        run_all(task, model, batches)
    return {name: total.sqrt() for name, total in squares.items()}


def make_masks(scored: dict[str, Tensor], share: float, options: PruneConfig) -> dict[str, Tensor]:
    """The masks that take away the least important `share` of the weights, to the weight.

    Compared are all weights with each other (scope global), those of a matrix (layer), those of one output (Wanda), or
    those of a group of M inputs (N:M).
    """
    if options.scope == "global":
        flat = torch.cat([score.flatten() for score in scored.values()])
        kept = keep_highest(flat[None], [round(share * len(flat))])[0].split([s.numel() for s in scored.values()])
        return {name: part.view_as(score) for (name, score), part in zip(scored.items(), kept, strict=True)}
    masks = {}
    for name, score in scored.items():
        if ":" in options.pattern:
            n, m = map(int, options.pattern.split(":"))
            if score.size(1) % m:
                raise UserError(f"--pattern {options.pattern}: {name} has {score.size(1)} inputs, no multiple of {m}")
            groups = score.reshape(-1, m)  # (rows * in / M, M)
            masks[name] = keep_highest(groups, [m - n] * len(groups)).view_as(score)
            continue
        rows = score if options.method == "wanda" else score.reshape(1, -1)
        ends = [round(share * rows.size(1) * (i + 1)) for i in range(len(rows))]  # of one matrix share · n go, exactly
        masks[name] = keep_highest(rows, np.diff([0, *ends])).view_as(score)
    return masks


def keep_highest(rows: Tensor, without: list[int]) -> Tensor:
    """True in each row (R, n) but for its without[r] lowest values; of equal ones the first go."""
    order = rows.argsort(dim=1, stable=True)  # a threshold would take all of several equal values, or none
    places = torch.arange(rows.size(1), device=rows.device)
    gone = places < torch.as_tensor(without, device=rows.device)[:, None]  # (R, n), in that order
    return torch.ones_like(rows, dtype=torch.bool).scatter(1, order, ~gone)


def prune(model: nn.Module, options: PruneConfig, share: float, seed: int, task=None, batches: list = ()) -> None:
    """Masks this share of the model's weights. Masked ones stay so: 0.5 twice is 0.5.

    More than this share goes where an older mask has taken more of a matrix, row or group than its part.
    """
    masks, older = make_masks(scores(model, options.method, seed, task, batches), share, options), masks_of(model)
    set_masks(model, {name: mask & older[name] if name in older else mask for name, mask in masks.items()})


# ---------------------------------------------------------------- ever more of them
def cubic(t: float, final: float, first: float = 0.0) -> float:
    """The sparsity at t, 0 to 1: s_f + (s_0 - s_f)(1 - t)³, fast at first and ever slower (Zhu & Gupta 2017, eq. 1)."""
    return final + (first - final) * (1 - min(t, 1.0)) ** 3


def ramp_end(options: PruneConfig | None, steps: int) -> int:
    """The step after which nothing more is pruned: 0 but for a cubic schedule."""
    return max(1, round(RAMP * steps)) if options and options.schedule == "cubic" else 0


def follow(model: nn.Module, options: PruneConfig | None, seed: int, done: int, steps: int) -> None:
    """What pruning has to do after each step: keep zeros zero, and with a cubic schedule make more of them."""
    ramp = ramp_end(options, steps)
    every = max(1, ramp // 50)
    if done <= ramp and (done % every == 0 or done == ramp):
        prune(model, options, max(sparsity(model), cubic(done / ramp, options.sparsity, options.first)), seed)
    else:
        hold(model)


# ---------------------------------------------------------------- heads and neurons
JOINS = {"heads": "attention.out", "neurons": "mlp.down"}  # where their outputs are joined


def sizes(model: nn.Module, part: str) -> list[int]:
    """The heads or neurons of each layer."""
    return model.config.layers("n_heads") if part == "heads" else model.config.ff_sizes


@contextlib.contextmanager
def gated(model: nn.Module, part: str, gates: list[Tensor]) -> Iterator[None]:
    """While active, the heads' outputs, or the neurons, are multiplied by gates[layer]: (n,), or (B, n) for each text.

    ξ_h in Michel et al. 2019, eq. 3. A gate of zero is what the removal of a head or neuron amounts to.
    """

    def multiply(layer: int):
        def hook(module: nn.Module, arguments: tuple) -> tuple:
            (x,) = arguments  # (B, T, H D) or (B, T, d_ff)
            gate = gates[layer].repeat_interleave(x.size(-1) // gates[layer].size(-1), dim=-1)  # (.., H D)
            return (x * (gate[:, None] if gate.ndim == 2 else gate),)

        return hook

    joins = [block.get_submodule(JOINS[part]) for block in model.stack.blocks]
    handles = [join.register_forward_pre_hook(multiply(layer)) for layer, join in enumerate(joins)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def importance(
    model: nn.Module, part: str, method: str, alive: list[Tensor], seed: int, task=None, batches: list = ()
) -> list[Tensor]:
    """For each layer (n,): what its heads or neurons matter, as a vector of length 1 (Michel et al. 2019, §4.1).

    magnitude: the norm of all weights of a head or neuron; gradient: the mean of |∂L/∂ξ| over texts, as long as the
    ones that are no longer alive are gated off.
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(len(gate), generator=generator).to(gate.device) for gate in alive]
    if method == "magnitude":
        found = [unit_norms(block, part) for block in model.stack.blocks]
    else:
        found = [torch.zeros(n, device=gate.device) for n, gate in zip(sizes(model, part), alive, strict=True)]
        model.eval()
        for batch in looking_at(batches):
            inputs = batch.to(alive[0].device).inputs
            gates = [gate.repeat(len(inputs["tokens"]), 1).requires_grad_() for gate in alive]  # (B, n): one per text
            with gated(model, part, gates):
                loss = sum(task.loss(model, inputs).values())
            for total, gradient in zip(found, torch.autograd.grad(loss, gates), strict=True):
                total += gradient.abs().sum(dim=0)
    found = [values * gate for values, gate in zip(found, alive, strict=True)]  # of those that are still there
    return [values / values.norm().clamp(min=1e-12) for values in found]


def unit_norms(block: nn.Module, part: str) -> Tensor:
    """(n,): the norm of all weights that belong to a head (Q, K, V, O) or a neuron (W₁, its gate, W₂)."""
    if part == "heads":
        a, C = block.attention, block.attention.out.weight.size(0)
        qkv = a.qkv.weight.view(3, a.n_heads, -1)  # (3, H, D C)
        out = a.out.weight.view(C, a.n_heads, -1)  # (C, H, D)
        return (qkv.square().sum(dim=(0, 2)) + out.square().sum(dim=(0, 2))).sqrt().detach()
    rows = [linear.weight for linear in (block.mlp.up, block.mlp.gate) if linear is not None]  # each (d_ff, C)
    return (sum(w.square().sum(dim=1) for w in rows) + block.mlp.down.weight.square().sum(dim=0)).sqrt().detach()


def choose_units(
    model: nn.Module, part: str, options: PruneConfig, seed: int, task=None, batches: list = ()
) -> list[Tensor]:
    """Which heads or neurons stay, for each layer a gate (n,) of ones and zeros; at least one of each layer does."""
    counts = sizes(model, part)
    device = next(model.parameters()).device
    alive = [torch.ones(n, device=device) for n in counts]
    rounds = ROUNDS if options.method == "gradient" else 1
    for i in range(1, rounds + 1):
        share = options.sparsity * i / rounds
        values = importance(model, part, options.method, alive, seed, task, batches)
        values = [v.masked_fill(gate == 0, -1) for v, gate in zip(values, alive, strict=True)]
        if options.scope == "layer":
            for layer, value in enumerate(values):
                kept = keep_highest(value[None].cpu(), [round(share * len(value))])[0]
                alive[layer] = kept.to(device, torch.float32)
        else:
            for value in values:  # the best of each layer stays in any case
                value[value.argmax()] = float("inf")
            kept = keep_highest(torch.cat(values)[None].cpu(), [round(share * sum(counts))])[0]
            alive = [part.to(device, torch.float32) for part in kept.split(counts)]
    return alive


def check_units(model: nn.Module, part: str, options: PruneConfig) -> None:
    """Refuses to take away none, all of a layer, or heads that share their keys and values."""
    config, counts = model.config, sizes(model, part)
    total = sum(round(options.sparsity * n) for n in (counts if options.scope == "layer" else [sum(counts)]))
    if not total:
        raise UserError(f"--sparsity {options.sparsity}: of {counts[0]} {part} in a layer none would go; give more")
    if part == "heads" and config.n_kv_heads and any(h != config.n_kv_heads for h in counts):
        raise UserError("--pattern heads: these heads share keys and values (n_kv_heads); prune neurons instead")
    if options.scope == "layer":
        for layer, n in enumerate(counts):
            if round(options.sparsity * n) >= n:
                raise UserError(f"--sparsity {options.sparsity}: all {n} {part} of layer {layer} would go; give less")
    elif round(options.sparsity * sum(counts)) > sum(counts) - len(counts):
        raise UserError(f"--sparsity {options.sparsity}: fewer than one of the {part} per layer would stay; give less")


def without_units(model: nn.Module, part: str, alive: list[Tensor]) -> nn.Module:
    """The smaller model: it computes what the model does with these gates.

    A head takes its rows of Q, K and V with it (and their biases) and its columns of O; a neuron its row of W₁, with
    the bias, and its column of W₂.
    """
    config, tensors = model.config, weights(model)
    counts = [int(gate.sum()) for gate in alive]
    field = "n_heads" if part == "heads" else "d_ff"
    value = counts[0] if len(set(counts)) == 1 else counts
    changes = {field: value, "d_head": config.head_size}
    if part == "heads" and config.n_kv_heads:
        changes["n_kv_heads"] = 0
    for layer, gate in enumerate(alive):
        kept = gate.bool().cpu().nonzero().flatten()
        if part == "heads":
            places = (kept[:, None] * config.head_size + torch.arange(config.head_size)).flatten()  # of one third
            width = len(gate) * config.head_size
            thirds = torch.cat([places, places + width, places + 2 * width])
            cuts = {"attention.qkv.weight": (0, thirds), "attention.qkv.bias": (0, thirds),
                    "attention.out.weight": (1, places)}  # fmt: skip
        else:
            cuts = {f"mlp.{name}": (0, kept) for name in ("up.weight", "up.bias", "gate.weight", "gate.bias")}
            cuts["mlp.down.weight"] = (1, kept)
        for name, (dim, places) in cuts.items():
            full = f"stack.blocks.{layer}.{name}"
            for key in (full, mask_key(full)):
                if key in tensors:
                    tensors[key] = tensors[key].index_select(dim, places.to(tensors[key].device))
    return rebuilt(model, dataclasses.replace(config, **changes), tensors)


# ---------------------------------------------------------------- layers
def without_layers(model: nn.Module, keep: list[int]) -> nn.Module:
    """The model with only these of its blocks, in this order."""
    config, tensors = model.config, {}
    for name, tensor in weights(model).items():
        block = re.match(r"(masks\.)?stack[./]blocks[./](\d+)[./]", name)
        if not block:
            tensors[name] = tensor
        for new, old in enumerate(keep):
            if block and int(block[2]) == old:
                tensors[name[: block.start(2)] + str(new) + name[block.end(2) :]] = tensor
    changes = {f: [v[i] for i in keep] for f in ("n_heads", "d_ff") if isinstance(v := getattr(config, f), list)}
    return rebuilt(model, dataclasses.replace(config, n_layers=len(keep), **changes), tensors)


def influence(model: nn.Module, task, batches: list) -> list[float]:
    """What each block changes: 1 - the mean cosine of its input and output, over real tokens (Men et al. 2024, §3)."""
    sums, counts = [0.0] * len(model.stack.blocks), [0] * len(model.stack.blocks)

    def add(name: str, x: Tensor, y: Tensor) -> None:
        sums[int(name)] += float(torch.cosine_similarity(x.float(), y.float(), dim=1).sum())
        counts[int(name)] += len(x)

    with watching(model, {str(i): block for i, block in enumerate(model.stack.blocks)}, add):
        run_all(task, model, batches)
    return [1 - total / count for total, count in zip(sums, counts, strict=True)]


def chosen_layers(flag: str, spec: str, n: int, total: int) -> list[int]:
    """n of `total` layers: spread uniform, the first, the last; or those that a list such as 0,2,4 names."""
    ways = {"uniform": spread(n, total), "first": list(range(n)), "last": list(range(total - n, total))}
    if spec in ways:
        return ways[spec]
    try:
        keep = [int(part) for part in spec.split(",")]
    except ValueError:
        raise UserError(f"--{flag} {spec}: expected numbers of layers, such as 0,2,4") from None
    if wrong := [i for i in keep if not 0 <= i < total]:
        raise UserError(f"--{flag} {spec}: there are layers 0 to {total - 1}, and no {wrong[0]}")
    if keep != sorted(set(keep)):
        raise UserError(f"--{flag} {spec}: give each layer once, in rising order")
    return keep


def spread(n: int, total: int) -> list[int]:
    """n of `total` layers, evenly spread, the first and the last among them: DistilBERT's 0, 2, 4, 7, 9, 11 of 12."""
    return [int(i * (total - 1) / max(1, n - 1) + 0.5) for i in range(n)]


def rebuilt(model: nn.Module, config, tensors: dict[str, Tensor]) -> nn.Module:
    """A model of the same kind with this config and these weights, masks among them."""
    new = type(model)(config)
    if masks := mask_tensors(tensors):
        new.masks = Masks(masks)
    load_weights(new, tensors, "the smaller model")
    return new.to(next(model.parameters()).device).train(model.training)


# ---------------------------------------------------------------- files
def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each masked weight as NAME.bits, one bit for each weight, and NAME.kept, those that stay, row by row."""
    packed = {name: tensor for name, tensor in tensors.items() if not name.startswith("masks.")}
    for name, mask in mask_tensors(tensors).items():
        packed[f"{name}.bits"] = torch.from_numpy(np.packbits(mask.cpu().numpy()))
        packed[f"{name}.kept"] = packed.pop(name)[mask]
    return packed


def unpack(model: nn.Module, tensors: dict[str, Tensor], where) -> dict[str, Tensor]:
    """The inverse; the model gets the masks that the tensors speak of, packed or not."""
    wanted, tensors = weights(model), dict(tensors)
    for name in [name for name in tensors if name.endswith(".bits")]:
        weight = name.removesuffix(".bits")
        if weight not in wanted or f"{weight}.kept" not in tensors:
            raise UserError(f"{where}: {name} belongs to no weight of this model")
        shape, bits, kept = wanted[weight].shape, tensors.pop(name), tensors.pop(f"{weight}.kept")
        mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel())).bool()
        if len(bits) != -(-shape.numel() // 8) or int(mask.sum()) != len(kept):
            raise UserError(f"{where}: {name} does not fit {weight} {list(shape)}: the file is damaged")
        tensors[weight] = torch.zeros(shape.numel(), dtype=kept.dtype).masked_scatter(mask, kept).view(shape)
        tensors[mask_key(weight)] = mask.view(shape)
    if masks := {name: mask.clone() for name, mask in mask_tensors(tensors).items()}:
        model.masks = Masks(masks)
    return tensors
