"""Heads, neurons and layers taken out of a model, which makes it smaller and faster.

Which of them matter is told by their norms, by the loss (Michel et al. 2019), or for layers by how much each changes
its input (Men et al. 2024). What belongs to a head or neuron its module says itself (`units` in model/transformer.py).
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mini.compression.activations import on_examples, run_all, seeing
from mini.compression.prune import PruneConfig, keep_highest
from mini.errors import UserError
from mini.flags import Checked, option
from mini.model.sparse import Masks, mask_key, mask_tensors
from mini.model.transformer import Model
from mini.storage import load_weights, weights
from mini.tasks.base import Task

UNITS = {
    "heads": ("attention", "n_heads"),
    "neurons": ("mlp", "d_ff"),
}  # the module of a block, the field of its config
ROUNDS = 10  # units go in so many rounds, their importance measured anew in each (Michel et al. 2019, §4)


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


# ---------------------------------------------------------------- heads and neurons
def unit_modules(model: Model, units: str) -> list[nn.Module]:
    """The modules of all layers that have these units."""
    return [block.get_submodule(UNITS[units][0]) for block in model.stack.blocks]


def sizes(model: nn.Module, units: str) -> list[int]:
    """The heads or neurons of each layer."""
    return model.config.layers(UNITS[units][1])


@contextlib.contextmanager
def gated(model: nn.Module, units: str, gates: list[Tensor]) -> Iterator[None]:
    """While active, the heads' outputs, or the neurons, are multiplied by gates[layer]: (n,), or (B, n) for each text.

    ξ_h in Michel et al. 2019, eq. 3. A gate of zero is what the removal of a head or neuron amounts to.
    """

    def multiply(layer: int):
        def hook(module: nn.Module, arguments: tuple) -> tuple:
            (x,) = arguments  # (B, T, H D) or (B, T, d_ff)
            gate = gates[layer].repeat_interleave(x.size(-1) // gates[layer].size(-1), dim=-1)  # (.., H D)
            return (x * (gate[:, None] if gate.ndim == 2 else gate),)

        return hook

    joints = [module.get_submodule(module.joint) for module in unit_modules(model, units)]
    handles = [joint.register_forward_pre_hook(multiply(layer)) for layer, joint in enumerate(joints)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def importance(
    model: nn.Module,
    units: str,
    method: str,
    alive: list[Tensor],
    seed: int,
    task: Task | None = None,
    batches: list = (),
) -> list[Tensor]:
    """For each layer (n,): what its heads or neurons matter, as a vector of length 1 (Michel et al. 2019, §4.1).

    magnitude: the norm of all weights of a head or neuron; gradient: the mean of |∂L/∂ξ| over texts, as long as the
    ones that are no longer alive are gated off.
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(len(gate), generator=generator).to(gate.device) for gate in alive]
    if method == "magnitude":
        found = [unit_norms(module) for module in unit_modules(model, units)]
    else:
        found = [torch.zeros(n, device=gate.device) for n, gate in zip(sizes(model, units), alive, strict=True)]
        model.eval()
        for batch in on_examples(batches):
            inputs = batch.to(alive[0].device).inputs
            gates = [gate.repeat(len(inputs["tokens"]), 1).requires_grad_() for gate in alive]  # (B, n): one per text
            with gated(model, units, gates):
                loss = task.total(task.loss(model, inputs))
            for total, gradient in zip(found, torch.autograd.grad(loss, gates), strict=True):
                total += gradient.abs().sum(dim=0)
    found = [values * gate for values, gate in zip(found, alive, strict=True)]  # of those that are still there
    return [values / values.norm().clamp(min=1e-12) for values in found]


def unit_norms(module: nn.Module) -> Tensor:
    """(n,): the norm of all weights that belong to a head (Q, K, V, O) or a neuron (W₁, its gate, W₂)."""
    total = 0.0
    for name, (dim, places) in module.units().items():
        weight = dict(module.named_parameters()).get(name)
        if weight is not None and weight.ndim > 1:
            squares = weight.detach().square().sum(dim=tuple(d for d in range(weight.ndim) if d != dim))
            total = total + squares[places.to(weight.device)].sum(dim=1)  # (n, entries) -> (n)
    return total.sqrt()


def choose_units(
    model: nn.Module, units: str, options: PruneConfig, seed: int, task: Task | None = None, batches: list = ()
) -> list[Tensor]:
    """Which heads or neurons stay, for each layer a gate (n,) of ones and zeros; at least one of each layer does."""
    counts = sizes(model, units)
    device = next(model.parameters()).device
    alive = [torch.ones(n, device=device) for n in counts]
    rounds = ROUNDS if options.method == "gradient" else 1
    for i in range(1, rounds + 1):
        share = options.sparsity * i / rounds
        values = importance(model, units, options.method, alive, seed, task, batches)
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


def check_units(model: nn.Module, units: str, options: PruneConfig) -> None:
    """Refuses to take away none, all of a layer, or heads that share their keys and values."""
    config, counts = model.config, sizes(model, units)
    total = sum(round(options.sparsity * n) for n in (counts if options.scope == "layer" else [sum(counts)]))
    if not total:
        raise UserError(f"--sparsity {options.sparsity}: of {counts[0]} {units} in a layer none would go; give more")
    if units == "heads" and config.n_kv_heads and any(h != config.n_kv_heads for h in counts):
        raise UserError("--pattern heads: these heads share keys and values (n_kv_heads); prune neurons instead")
    if options.scope == "layer":
        for layer, n in enumerate(counts):
            if round(options.sparsity * n) >= n:
                raise UserError(f"--sparsity {options.sparsity}: all {n} {units} of layer {layer} would go; give less")
    elif round(options.sparsity * sum(counts)) > sum(counts) - len(counts):
        raise UserError(f"--sparsity {options.sparsity}: fewer than one of the {units} per layer would stay; give less")


def without_units(model: Model, units: str, alive: list[Tensor]) -> Model:
    """The smaller model: it computes what the model does with these gates.

    A head takes its rows of Q, K and V with it (and their biases) and its columns of O; a neuron its row of W₁, with
    the bias, and its column of W₂.
    """
    config, tensors = model.config, every_tensor(model)
    counts = [int(gate.sum()) for gate in alive]
    place, field = UNITS[units]
    changes = {field: counts[0] if len(set(counts)) == 1 else counts, "d_head": config.head_size}
    if units == "heads" and config.n_kv_heads:
        changes["n_kv_heads"] = 0
    for layer, (module, gate) in enumerate(zip(unit_modules(model, units), alive, strict=True)):
        kept = gate.bool().cpu().nonzero().flatten()
        for name, (dim, places) in module.units().items():
            full = f"stack.blocks.{layer}.{place}.{name}"
            for key in (full, mask_key(full)):
                if key in tensors:
                    stay = places[kept].flatten().sort().values.to(tensors[key].device)
                    tensors[key] = tensors[key].index_select(dim, stay)
    return rebuilt(model, dataclasses.replace(config, **changes), tensors)


# ---------------------------------------------------------------- layers
def without_layers(model: nn.Module, keep: list[int]) -> nn.Module:
    """The model with only these of its blocks, in this order."""
    config, tensors = model.config, {}
    for name, tensor in every_tensor(model).items():
        block = re.match(r"(masks\.)?stack[./]blocks[./](\d+)[./]", name)
        if not block:
            tensors[name] = tensor
        for new, old in enumerate(keep):
            if block and int(block[2]) == old:
                tensors[name[: block.start(2)] + str(new) + name[block.end(2) :]] = tensor
    changes = {name: [value[i] for i in keep] for name, value in vars(config).items() if isinstance(value, list)}
    return rebuilt(model, dataclasses.replace(config, n_layers=len(keep), **changes), tensors)


def influence(model: nn.Module, task: Task, batches: list) -> list[float]:
    """What each block changes: 1 - the mean cosine of its input and output, over real tokens (Men et al. 2024, §3)."""
    sums, counts = [0.0] * len(model.stack.blocks), [0] * len(model.stack.blocks)

    def add(name: str, x: Tensor, y: Tensor) -> None:
        sums[int(name)] += float(torch.cosine_similarity(x.float(), y.float(), dim=1).sum())
        counts[int(name)] += len(x)

    with seeing(model, {str(i): block for i, block in enumerate(model.stack.blocks)}, add):
        run_all(task, model, batches)
    return [1 - total / count for total, count in zip(sums, counts, strict=True)]


def layers_to_keep(options: ReduceConfig, n: int, given: set[str], source: str) -> list[int] | None:
    """The layers of --keep, or of --layers and --by; None where their influence has to be measured."""
    if bool(options.keep) == bool(options.layers):
        raise UserError("say which layers stay with --keep 0,2,4, or how many with --layers")
    if options.keep and "by" in given:
        raise UserError("--by chooses layers for --layers; --keep names them")
    if options.layers:
        if options.layers >= n:
            raise UserError(f"--layers {options.layers}: {source} has {n}; keep fewer")
        return None if options.by == "influence" else chosen_layers("by", options.by, options.layers, n)
    keep = chosen_layers("keep", options.keep, n, n)
    if len(keep) == n:
        raise UserError(f"--keep {options.keep}: these are all layers of {source}; leave some out")
    return keep


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


# ---------------------------------------------------------------- the model at another size
def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those too that files do not hold."""
    return weights(model) | dict(model.named_buffers())


def rebuilt(model: Model, config, tensors: dict[str, Tensor]) -> Model:
    """A model of the same kind with this config and these tensors, masks among them.

    Raises ValueError where a buffer that files do not hold would come out of the config with other values: the smaller
    model would compute another function once it is opened again.
    """
    new = type(model)(config)
    if masks := mask_tensors(tensors):
        new.masks = Masks(masks)
    new.to(next(model.parameters()).device)
    for name in every_tensor(new).keys() - weights(new).keys():
        mine, theirs = new.get_buffer(name), tensors.get(name)
        if theirs is None or mine.shape != theirs.shape or not torch.equal(mine, theirs):
            raise ValueError(
                f"the buffer {name} depends on what was taken out: make it persistent, and say so in units()"
            )
    load_weights(new, {name: t for name, t in tensors.items() if name in weights(new)}, "the smaller model")
    return new.train(model.training)
