"""Heads, neurons and layers taken out of a model, which makes it smaller and faster.

Which of them matter is told by their norms, by the loss (Michel et al. 2019), or for layers by how much each changes
its input (Men et al. 2024). What belongs to a head or neuron its module says itself (`units` in model/transformer.py).
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from mini.compression.activations import Examples, seeing
from mini.compression.prune import PruneConfig, keep_highest
from mini.flags import Checked, UserError, option
from mini.model.sparse import Masks, mask_key, mask_tensors
from mini.model.transformer import Model
from mini.tensors import load_weights, weights

# The module of a block, and the field of its config.
UNITS = {"heads": ("attention", "n_heads"), "neurons": ("mlp", "d_ff")}
ROUNDS = 10  # units go in so many rounds, their importance measured anew in each (Michel et al. 2019, §4)


@dataclass
class ReduceConfig(Checked):
    """Which layers a model keeps."""

    keep: str = option("", "the layers that stay, counted from 0, such as 0,2,4,7,9,11")
    layers: int = option(0, "or how many", low=0)
    by: str = option("uniform", "influence: that change their input most", ("uniform", "first", "last", "influence"))
    calibrate: int = option(256, "training examples that influence looks at", low=1)


# ---------------------------------------------------------------- heads and neurons
def unit_modules(model: Model, units: str) -> list[nn.Module]:
    """The modules of all layers that have these units."""
    return [block.get_submodule(UNITS[units][0]) for block in model.stack.blocks]


def sizes(model: Model, units: str) -> list[int]:
    """The heads or neurons of each layer."""
    return model.config.layers(UNITS[units][1])


@contextlib.contextmanager
def gated(model: Model, units: str, gates: list[Tensor]) -> Iterator[None]:
    """While active, the heads' outputs, or the neurons, are multiplied by gates[layer]: (n,), or (B, n) for each text.

    ξ_h in Michel et al. 2019, eq. 3. A gate of zero is what the removal of a head or neuron amounts to.
    """

    def multiply(gate: Tensor, module: nn.Module, arguments: tuple) -> tuple:
        (x,) = arguments  # (B, T, H D) or (B, T, d_ff)
        gate = gate.repeat_interleave(x.size(-1) // gate.size(-1), dim=-1)  # (.., H D)
        return (x * (gate[:, None] if gate.ndim == 2 else gate),)

    with contextlib.ExitStack() as hooks:
        for module, gate in zip(unit_modules(model, units), gates, strict=True):
            joint = module.get_submodule(module.joint)
            hooks.enter_context(joint.register_forward_pre_hook(partial(multiply, gate)))
        yield


def importance(
    model: Model, options: PruneConfig, alive: list[Tensor], seed: int, examples: Examples | None = None
) -> list[Tensor]:
    """For each layer (n,): what its heads or neurons matter, as a vector of length 1 (Michel et al. 2019, §4.1).

    magnitude: the norm of all weights of a head or neuron; gradient: the mean of |∂L/∂ξ| over texts, as long as the
    ones that are no longer alive are gated off.
    """
    units = options.pattern
    if options.method == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(len(gate), generator=generator).to(gate.device) for gate in alive]
    if options.method == "magnitude":
        found = [unit_norms(module) for module in unit_modules(model, units)]
    else:
        found = [torch.zeros_like(gate) for gate in alive]
        for inputs in examples.inputs(model):
            gates = [gate.repeat(len(inputs["tokens"]), 1).requires_grad_() for gate in alive]  # (B, n): one per text
            with gated(model, units, gates):
                loss = examples.task.total(examples.task.loss(model, inputs))
            for total, gradient in zip(found, torch.autograd.grad(loss, gates), strict=True):
                total += gradient.abs().sum(dim=0)
    found = [values * gate for values, gate in zip(found, alive, strict=True)]  # of those that are still there
    return [values / values.norm().clamp(min=1e-12) for values in found]


def unit_norms(module: nn.Module) -> Tensor:
    """(n,): the norm of all weights that belong to a head (Q, K, V, O) or a neuron (W₁, its gate, W₂), tables aside."""
    total, units = 0.0, module.units()
    tables = {f"{name}.weight" for name, child in module.named_modules() if getattr(child, "by_token", False)}
    for name, weight in module.named_parameters():
        if name in units and name not in tables and weight.ndim > 1:
            dim, places = units[name]
            squares = weight.detach().square().sum(dim=tuple(d for d in range(weight.ndim) if d != dim))
            total = total + squares[places.to(weight.device)].sum(dim=1)  # (n, entries) -> (n)
    return total.sqrt()


def choose_units(model: Model, options: PruneConfig, seed: int, examples: Examples | None = None) -> list[Tensor]:
    """Which heads or neurons stay, for each layer a gate (n,) of ones and zeros; at least one of each layer does."""
    counts = sizes(model, options.pattern)
    device = next(model.parameters()).device
    alive = [torch.ones(n, device=device) for n in counts]
    rounds = ROUNDS if options.method == "gradient" else 1
    for i in range(1, rounds + 1):
        share = options.sparsity * i / rounds
        values = importance(model, options, alive, seed, examples)
        values = [v.masked_fill(gate == 0, -1).cpu() for v, gate in zip(values, alive, strict=True)]
        if options.scope == "layer":
            kept = [keep_highest(value[None], [round(share * len(value))])[0] for value in values]
        else:
            for value in values:  # the best of each layer stays in any case
                value[value.argmax()] = float("inf")
            kept = keep_highest(torch.cat(values)[None], [round(share * sum(counts))])[0].split(counts)
        alive = [gate.to(device, torch.float32) for gate in kept]
    return alive


def check_units(model: Model, options: PruneConfig) -> None:
    """Refuses to take away none, all of a layer, or heads that share their keys and values."""
    units, config, counts = options.pattern, model.config, sizes(model, options.pattern)
    if config.block == "lstm":
        raise UserError(f"--pattern {units}: an LSTM has none that could go; take unstructured or 2:4")
    compared = counts if options.scope == "layer" else [sum(counts)]
    gone = [round(options.sparsity * n) for n in compared]
    if not any(gone):
        raise UserError(f"--sparsity {options.sparsity}: of {counts[0]} {units} in a layer none would go; give more")
    if units == "heads" and config.n_kv_heads and any(h != config.n_kv_heads for h in counts):
        raise UserError("--pattern heads: these heads share keys and values (n_kv_heads); prune neurons instead")
    if options.scope == "global" and gone[0] > sum(counts) - len(counts):
        raise UserError(f"--sparsity {options.sparsity}: fewer than one of the {units} per layer would stay; give less")
    for layer, n in enumerate(compared):
        if gone[layer] >= n:
            raise UserError(f"--sparsity {options.sparsity}: all {n} {units} of layer {layer} would go; give less")


def without_units(model: Model, units: str, alive: list[Tensor]) -> Model:
    """The smaller model: it computes what the model does with these gates.

    A head takes its rows of Q, K, V (and biases) and its columns of O with it; a neuron its row of W₁ and column of W₂.
    """
    config, tensors = model.config, every_tensor(model)
    counts = [int(gate.sum()) for gate in alive]
    attribute, field = UNITS[units]
    changes = {field: counts[0] if len(set(counts)) == 1 else counts, "d_head": config.head_size}
    if units == "heads" and config.n_kv_heads:
        changes["n_kv_heads"] = 0
    for layer, (module, gate) in enumerate(zip(unit_modules(model, units), alive, strict=True)):
        kept = gate.bool().cpu().nonzero().flatten()
        for name, (dim, places) in module.units().items():
            full = f"stack.blocks.{layer}.{attribute}.{name}"
            for key in (full, mask_key(full)):
                if key in tensors:
                    stay = places[kept].flatten().sort().values.to(tensors[key].device)
                    tensors[key] = tensors[key].index_select(dim, stay)
    return rebuilt(model, replace(config, **changes), tensors)


# ---------------------------------------------------------------- layers
def without_layers(model: Model, keep: list[int]) -> Model:
    """The model with only these of its blocks, in this order."""
    tensors = {}
    for name, tensor in every_tensor(model).items():
        block = re.match(r"((?:masks\.)?stack[./]blocks[./])(\d+)([./].*)", name)
        if not block:
            tensors[name] = tensor
        elif int(block[2]) in keep:
            tensors[f"{block[1]}{keep.index(int(block[2]))}{block[3]}"] = tensor
    return rebuilt(model, model.config.of_layers(keep), tensors)


def influence(model: Model, examples: Examples) -> list[float]:
    """What each block changes: 1 - the mean cosine of its input and output, over real tokens (Men et al. 2024, §3)."""
    sums, counts = [0.0] * len(model.stack.blocks), [0] * len(model.stack.blocks)

    def add(name: str, x: Tensor, y: Tensor) -> None:
        sums[int(name)] += float(torch.cosine_similarity(x.float(), y.float(), dim=1).sum())
        counts[int(name)] += len(x)

    with seeing(model, {str(i): block for i, block in enumerate(model.stack.blocks)}, add):
        examples.run(model)
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
        keep = [int(layer) for layer in spec.split(",")]
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
def every_tensor(model: Model) -> dict[str, Tensor]:
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
            raise ValueError(f"the buffer {name} depends on what was taken out: make it persistent, list it in units()")
    unsaved = every_tensor(model).keys() - weights(model).keys()
    load_weights(new, {name: t for name, t in tensors.items() if name not in unsaved}, "the smaller model")
    return new.train(model.training)
