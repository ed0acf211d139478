"""The loop: every training in mini, whatever the model and the task, goes through train().

    for step in range(from the newest checkpoint, steps):
        micro_batches()       this rank's share of the batch, made by a thread during the step before
        count()               what the losses are divided by: of the whole batch, over all ranks
        set the learning rate
        backward()            each micro-batch: forward, loss / count, backward
        after_backward()      of the methods that are handed in, such as pruning
        clip_gradients()      and stop the run if loss or norm is not a number
        optimizer.step()
        after_step()          of the methods
        now and then: a line of metrics.jsonl, evaluate(), show_sample(), a checkpoint
    finish()

The global batch of a step is cut into equal micro-batches, one for each rank and accumulation; the summed losses of
each are divided by the counts of the whole batch, so that the gradients add up to that of the one big batch. Dropout is
seeded from (seed, step, first example of the micro-batch): so nothing depends on how many processes share micro-batches
of one size (1 x 4, 2 x 2, 4 x 1), and a run goes on from a checkpoint as if it had never stopped.
"""

import contextlib
import inspect
import itertools
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mini.flags import Checked, UserError, option
from mini.model.transformer import Model
from mini.tasks.base import Batch, Task
from mini.tasks.order import mix
from mini.tensors import held
from mini.training import checkpoints
from mini.training.devices import autocast, can_compile, keep_memory, peak_memory, pick_dtype, progress_bar
from mini.training.optim import OptimConfig, make_optimizers, schedule
from mini.training.ranks import World
from mini.training.shard import shard, whole
from mini.training.speed import Speedometer, plot_metrics


@dataclass
class TrainConfig(Checked):
    """The loop. log_every, sample_every, checkpoint_every, keep and accumulation may change when a run goes on."""

    steps: int = option(1000, "optimizer steps", low=0)
    epochs: float = option(0.0, "passes over the training data, instead of --steps", low=0)
    tokens: float = option(0.0, "tokens to train on, instead of --steps; for tasks of texts of one length", low=0)
    flops: float = option(0.0, "arithmetic to train with (a step: 3 forward passes), instead of --steps", low=0)
    max_seconds: float = option(0.0, "end sooner, by the clock, the learning rate falling with it; 0: no limit", low=0)
    batch_size: int = option(16, "global batch in sequences, over all ranks and parts", low=1, high=10**7)
    accumulation: int = option(1, "parts into which each rank cuts its share of the batch", low=1, resume=True)
    seed: int = option(1, "seed of weights, order and dropout", low=0, high=2**63 - 1)
    data_seed: int | None = option(None, "seed of the order and of masks; none: --seed", low=0, high=2**63 - 1)
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: str = option("auto", "of matrix products; auto: bfloat16 if in hardware",
                        ("auto", "bfloat16", "float16", "float32"))  # fmt: skip
    compile: str = option("auto", "torch.compile; auto: on GPUs (CPUs' sums would vary)", ("auto", "true", "false"))
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass: less memory")
    shard: bool = option(False, "each rank holds a share of model and optimizer; blocks work in --dtype", resume=True)
    eval_every: int = option(250, "steps between evaluations; 0: at the end only, when fine-tuning each epoch", low=0)
    eval_tokens: int = option(0, "validation tokens that evaluations of lm before the last use; 0: all", low=0)
    log_every: int = option(10, "steps between lines of metrics.jsonl", resume=True, low=1)
    sample_every: int = option(250, "steps between printed samples; 0: one at the end", resume=True, low=0)
    checkpoint_every: int = option(250, "steps between checkpoints; 0: only when interrupted", resume=True, low=0)
    keep: int = option(2, "checkpoints kept", resume=True, low=1)

    @property
    def trains(self) -> bool:
        return bool(self.steps or self.epochs or self.tokens or self.flops)

    def total_steps(self, task: Task, model: Model) -> int:
        if self.epochs:
            return max(1, round(self.epochs * task.n / self.batch_size))
        if not (self.tokens or self.flops):
            return self.steps
        if not task.fixed_shape:
            budget = "tokens" if self.tokens else "flops"
            raise UserError(f"--{budget}: this task's texts differ in length; give --epochs")
        T = model.config.max_len
        work = 3 * model.flops(T, task.predicted) * T * self.batch_size  # of a step, as Kaplan et al. 2020 count
        return max(1, round(self.tokens / (self.batch_size * T) if self.tokens else self.flops / work))


FIRST_SCALE = 2.0**16  # of the losses in float16
RESERVED = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}  # names in metrics.jsonl that no loss may have


class Losses(nn.Module):
    """The objective's losses and the model's own as a module's forward, which is what DDP and torch.compile wrap."""

    def __init__(self, model: nn.Module, objective: object):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.objective.loss(self.model, inputs), self.model.extra_losses()


def train(model: nn.Module, task: Task, options: TrainConfig, optim: OptimConfig, folder: Path, world: World,
          objective: object = None, methods: Sequence = (), test: Task | None = None) -> dict:  # fmt: skip
    """Trains to the end, from the newest checkpoint in folder if there is one; returns the final figures.

    objective: what is minimised, if not the task alone; it has a task's loss(), counts(), loss_weights, default_weight,
    best and fixed_shape. methods: what acts beside the optimizer, such as a pruning schedule, with
    after_backward(done, steps) and after_step(done, steps), which returns False as long as no weights may count as the
    best. test: on which the final weights are judged, nothing being chosen by it.
    Writes metrics.jsonl, checkpoints, and at the end model.safetensors and result.json.
    Raises UserError where the loss stops being a number; SystemExit after SIGTERM or Ctrl-C, a checkpoint written.
    """
    objective = objective or task
    size = micro_batch_size(options, world)
    ready = partial(micro_batches, task, size=size, options=options, world=world)
    steps, eval_every = options.total_steps(task, model), options.eval_every
    if objective.best and not eval_every:
        eval_every = -(-task.n // options.batch_size)  # each epoch

    keep_memory(not (options.shard and world.size > 1))
    model.train()
    model.stack.checkpoint_activations = options.checkpoint_activations
    dtype = pick_dtype(options.dtype, world.device)
    model.freeze_unused()
    losses_of: nn.Module = Losses(model, objective)
    if options.shard and world.size == 1:
        world.say("--shard true: one process holds everything; torchrun starts several")
    elif options.shard:
        shard(losses_of, model.stack.blocks, dtype, world)
        world.say(f"sharded: each of the {world.size} processes holds its rows of every matrix; no sample at the end")
    model.to(world.device)
    # In fewer steps than there are turns, each matrix has its turn all the same.
    optimizers = make_optimizers(model, replace(optim, turns=min(optim.turns, max(1, steps))), world)
    state = resume(model, optimizers, folder, world)
    if state["step"] > steps:
        raise UserError(f"{folder}: its checkpoint is of step {state['step']:,}, and the run has {steps:,}")
    if dtype == torch.float16 and state["scale"] == 1:  # also of a run that began in another
        state["scale"] = FIRST_SCALE

    # On CPUs compiled code adds in an order that varies with several threads: runs would not repeat to the bit.
    wanted = options.compile == "true" or (options.compile == "auto" and objective.fixed_shape and world.on_gpu)
    if wanted and can_compile(world.device, world.say):
        if world.sharded:  # what gathers a block's parameters stands between the blocks
            for block in model.stack.blocks:
                block.compile()
        else:
            losses_of = torch.compile(losses_of)
    if world.size > 1 and not world.sharded:
        newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13's name
        buffers = {"forward_sync_buffers" if newer else "broadcast_buffers": False}  # all ranks compute the same ones
        losses_of = DistributedDataParallel(losses_of, gradient_as_bucket_view=True, **buffers)
    counted = objective.fixed_shape and all(p.requires_grad for p in model.parameters())  # else a step does less
    speed = Speedometer(model, task.predicted if counted else 0, dtype, world, state)
    peak_memory(world.device)  # what came before, such as a large matrix product, does not count
    writes = world.main or world.sharded  # whether this rank has something to write

    began = time.perf_counter() - state["seconds"]
    bar = progress_bar(total=steps, initial=state["step"], disable=not (world.main and steps), unit="step")
    writer, thread = checkpoints.Writer(folder, options.keep, world), ThreadPoolExecutor(1)
    with Interrupts() as interrupts, bar, writer, thread:
        coming = thread.submit(ready, state["step"]) if state["step"] < steps else None
        for step in range(state["step"], steps):
            world.doing = f"in step {step + 1:,}"
            writer.check()
            clock = time.perf_counter()
            batches = coming.result()
            coming = thread.submit(ready, step + 1) if step + 1 < steps else None
            counts, n_tokens, (stop, spent) = count(objective, batches, world, interrupts.received, clock - began)
            # Where there is a limit, as far along as the clock is, or the steps.
            at = max(step, min(steps - 1, int(spent / options.max_seconds * steps))) if options.max_seconds else step
            share = schedule(at, steps, optim)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak_lr"] * share
            sums, weights = backward(losses_of, objective, model.loss_weights, batches, counts, n_tokens, dtype, world,
                                     state["scale"])  # fmt: skip
            for method in methods:
                method.after_backward(at, steps)
            norm = clip_gradients(model, optim.clip, state["scale"])
            *values, norm = torch.stack([*sums.values(), norm]).tolist()  # here alone a step waits for its device
            losses = {name: value / counts.get(name, n_tokens) for name, value in zip(sums, values, strict=True)}
            loss = sum(weights[name] * value for name, value in losses.items())
            # Gradients that are too large for float16 make no step.
            lost = dtype == torch.float16 and not math.isfinite(norm) and state["scale"] > 1
            if not (math.isfinite(loss) and (math.isfinite(norm) or lost)):
                raise diverged(step + 1, f"the loss is {loss} and the gradient norm {norm}", step, folder, writer)
            if dtype == torch.float16:
                state |= rescaled(state, lost)
            for optimizer in optimizers:
                if not lost:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            done, last = step + 1, at + 1 == steps
            settled = False not in [method.after_step(at + 1, steps) for method in methods]
            state |= {"step": done, "tokens": state["tokens"] + n_tokens}
            state["train_seconds"] += time.perf_counter() - clock
            bar.update()

            evaluating = last or falls_on(done, eval_every)
            if evaluating or falls_on(done, options.log_every):
                row = {"step": done, "loss": loss, "lr": optim.lr * share, "grad_norm": None if lost else norm}
                row |= speed.since_last(state)
                if len(losses) > 1:
                    row |= losses
                postfix = f"loss {loss:.3f}, lr {row['lr']:.2g}, {row['tokens_per_s']:,.0f} tokens/s"
                bar.set_postfix_str(postfix, refresh=False)
                if evaluating:
                    with whole(losses_of):
                        figures = evaluate(model, task, world, dtype, size, 0 if last else options.eval_tokens)
                    if not math.isfinite(figures["val_loss"]):
                        raise diverged(done, f"the validation loss is {figures['val_loss']}", done, folder, writer)
                    row |= {name: value for name, value in figures.items() if isinstance(value, float)}
                    world.say(f"step {done:>{len(str(steps))}}: " + describe(figures))
                    if objective.best and (last or settled) and is_better(figures, state["best"], objective.best):
                        state["best"] = {**figures, "best_step": done}
                        writer.wait()  # which deletes those of before
                        state["best_sha256"] = checkpoints.keep_best(folder, model, done, world) if writes else ""
                if world.main:
                    checkpoints.append_metrics(folder, row)
            if writes and falls_on(done, options.sample_every) and not last:
                with whole(losses_of):
                    show_sample(model, task, world, dtype)
            state["seconds"] = time.perf_counter() - began
            if writes and not last and (stop or falls_on(done, options.checkpoint_every)):
                writer.save(model, optimizers, state)
            if stop and not last:
                bar.close()
                saved = writer.wait()
                world.say(f"interrupted: {saved} is written; the same command goes on from there")
                world.leave()
                raise SystemExit(128 + stop)
            if last:
                break
        writer.wait()

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.end_learning()
    if not steps:  # a run that is only judged
        figures = state["best"] = evaluate(model, task, world, dtype, size)
        if not math.isfinite(figures["val_loss"]):
            raise UserError(f"{folder}: the validation loss is {figures['val_loss']}: the weights are of no use")
        world.say(describe(figures))
    result = {
        **(state["best"] if objective.best else figures), "steps": state["step"], "tokens": state["tokens"],
        **speed.overall(state), "seconds": time.perf_counter() - began, "parameters": model.num_params(),
        "trained_parameters": trained,
        "device": str(world.device), "dtype": str(dtype).removeprefix("torch."),
        "memory_mb": peak_memory(world.device),
    }  # fmt: skip
    if task.cut:
        result["cut"] = task.cut
    if "best_step" in result:
        state["best_sha256"] = world.agree(state["best_sha256"])
        checkpoints.load_best(folder, model, state)
        world.wait()  # before they are deleted
    if test is not None:
        test.settle(result)
        result["cut"] = result.get("cut", {}) | {"test": test.cut["valid"]}
        with whole(losses_of):
            figures = evaluate(model, test, world, dtype, size)
        result |= {f"test_{n.removeprefix('val_')}": v for n, v in figures.items() if isinstance(v, float)}
    if writes:
        finish(model, result, folder, world)
    return result


def resume(model: nn.Module, optimizers: list, folder: Path, world: World) -> dict:
    """Puts the newest whole checkpoint into place, if there is one; returns how far the run has come."""
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "train_seconds": 0.0, "best": None, "best_sha256": ""}
    state |= {"scale": 1.0, "good": 0}
    if checkpoint := checkpoints.newest_checkpoint(folder, world.say):
        state |= checkpoints.load_checkpoint(checkpoint, model, optimizers)
        world.say(f"going on from {checkpoint}")
    elif checkpoints.checkpoints(folder):
        raise UserError(f"{folder}: no checkpoint can be used; --overwrite true begins anew")
    if world.highest(state["step"]) != -world.highest(-state["step"]):
        raise UserError(f"{folder}: the ranks see different checkpoints; put the run on a file system that all share")
    if world.main:
        checkpoints.rewind(folder, state["step"])
    return state


def finish(model: nn.Module, result: dict, folder: Path, world: World) -> None:
    """Writes the final weights, the picture, and last result.json, with which the run counts as finished."""
    result |= checkpoints.save_model(model, folder, world)
    if world.main:
        plot_metrics(checkpoints.read_metrics(folder), folder / "loss.png")
        checkpoints.write_result(folder, result)
        checkpoints.drop_best(folder)


def micro_batch_size(options: TrainConfig, world: World) -> int:
    """Sequences in one forward pass: the batch is cut equally by ranks, then by accumulation."""
    parts = world.size * options.accumulation
    size, rest = divmod(options.batch_size, parts)
    if rest:
        near = " or ".join(str(n * parts) for n in (size, size + 1) if n)
        cut = f"{world.size} ranks x {options.accumulation} parts"
        raise UserError(f"--batch_size {options.batch_size} cannot be cut into {cut}: give {near}")
    return size


def falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def micro_batches(task: Task, step: int, size: int, options: TrainConfig, world: World) -> list[tuple[int, Batch]]:
    """This rank's share of a step's batch, each with the seed of its dropout, the same wherever it is computed."""
    first = step * options.batch_size + world.rank * options.accumulation * size
    firsts = [first + i * size for i in range(options.accumulation)]  # the number of each one's first example
    batches = [(mix(options.seed, step, n), task.batch(np.arange(n, n + size))) for n in firsts]
    return [(seed, batch.pin()) for seed, batch in batches] if world.on_gpu else batches


def count(objective: object, batches: list[tuple[int, Batch]], world: World, received: int = 0,
          seconds: float = 0.0) -> tuple[dict[str, int], int, tuple[int, float]]:  # fmt: skip
    """Of all ranks: {loss: predictions}, real tokens, (a signal that one of them has received, rank 0's seconds)."""
    counted = [objective.counts(batch) for _, batch in batches]
    if any(counts.keys() != counted[0].keys() for counts in counted):
        raise ValueError(f"micro-batches count different losses: {sorted(map(sorted, counted))}")
    numbers = [sum(counts[name] for counts in counted) for name in counted[0]]
    numbers += [sum(batch.n_tokens for _, batch in batches), round(1e6 * seconds) * world.main]
    numbers += [received == signal.SIGINT, received == signal.SIGTERM]
    *totals, n_tokens, microseconds, interrupted, ended = world.sum(torch.tensor(numbers)).tolist()
    counts = dict(zip(counted[0], totals, strict=True))
    stop = signal.SIGTERM if ended else signal.SIGINT if interrupted else 0  # some may have had one, some the other
    return counts, n_tokens, (int(stop), microseconds / 1e6)


def backward(losses_of: nn.Module, objective: object, extra_weights: dict[str, float],
             batches: list[tuple[int, Batch]], counts: dict[str, int], n_tokens: int, dtype: torch.dtype, world: World,
             scale: float = 1.0) -> tuple[dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """Leaves the gradient of the step's whole batch in the parameters: of all losses that objective and model return.

    extra_weights: of the model's own losses. counts, n_tokens: of the whole batch. scale: by which the gradients are
    too large. Returns ({name: summed loss in nats, of all ranks}, {name: its weight}).
    Raises ValueError for a count or a weight without a loss, and for a name that is taken.
    """
    sums: dict[str, Tensor] = {}
    for i, (seed, batch) in enumerate(batches):
        torch.manual_seed(seed)
        # Ranks exchange gradients once, with the last micro-batch; DDP looks at this during the forward pass. Sharded
        # ones go to their ranks at once: none has the memory for all of them.
        alone = world.size > 1 and i + 1 < len(batches) and not world.sharded
        with losses_of.no_sync() if alone else contextlib.nullcontext():
            with autocast(world.device, dtype):
                asked, extra = losses_of(batch.to(world.device).inputs)
            if taken := asked.keys() & extra.keys() | (asked.keys() | extra.keys()) & RESERVED:
                raise ValueError(f"two losses, or a figure of the log, have the name {', '.join(sorted(taken))}")
            weights = {name: objective.loss_weights.get(name, objective.default_weight) for name in asked}
            weights |= {name: extra_weights.get(name, 1.0) for name in extra}
            if missing := (counts.keys() | objective.loss_weights.keys() | extra_weights.keys()) - weights.keys():
                raise ValueError(f"there is a count or a weight, but no loss, of the name {', '.join(sorted(missing))}")
            # Σ over all micro-batches and ranks of (summed loss / the whole batch's count) is the batch's mean loss.
            # Backward passes add up a rank's own; DDP averages over the ranks, so world.size makes that a sum.
            times = scale * world.size
            shares = {name: weight * times / counts.get(name, n_tokens) for name, weight in weights.items()}
            losses = asked | extra
            sum(share * losses[name] for name, share in shares.items()).backward()
        for name, value in losses.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    values = world.sum(torch.stack([value.float() for value in sums.values()]))
    return dict(zip(sums, values.unbind(), strict=True)), weights


def clip_gradients(model: nn.Module, limit: float, scale: float = 1.0) -> Tensor:
    """Divides all gradients by scale, and again where their norm is over limit (0: none); returns that norm, ()."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if scale != 1:
        torch._foreach_mul_([held(p.grad).tensor for p in parameters], 1 / scale)
    norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def rescaled(state: dict, lost: bool) -> dict:
    """Half the scale after gradients that were too large for float16, twice it after 2,000 steps without any
    (Micikevicius et al. 2018, "Mixed precision training", §3.2)."""
    if lost:
        return {"scale": state["scale"] / 2, "good": 0}
    good = (state["good"] + 1) % 2000
    return {"scale": min(2.0**24, state["scale"] * (1 if good else 2)), "good": good}


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, world: World, dtype: torch.dtype, batch_size: int, limit: int = 0) -> dict:
    """The task's figures on the whole validation set (or its first `limit` tokens), shared out over the ranks."""
    sums: dict[str, Tensor] = {}
    for measured in measure(model, task, world, dtype, batch_size, limit):
        for name, value in measured.items():
            sums[name] = sums[name] + value if name in sums else value
    if world.size > 1:
        sums = {name: world.sum(sums[name].to(world.device)).cpu() for name in sorted(sums)}
    return task.metrics(sums)


@torch.no_grad()
def measure(
    model: nn.Module, task: Task, world: World, dtype: torch.dtype, batch_size: int, limit: int = 0
) -> Iterator[dict[str, Tensor]]:
    """What metrics() needs the sums of, for each validation batch that is this rank's.

    All compute equally many, as shares of a model are gathered for all; what is another's counts nothing. Where a task
    writes, one token more in one of them is one gathering more: all then judge the same, and the first one's counts.
    """
    model.eval()
    batches, at_once = task.validation(batch_size, limit), 1 if world.sharded and task.writes else world.size
    with progress_bar(desc="evaluating", leave=False, delay=2, disable=not world.main, unit="batch") as progress:
        while dealt := list(itertools.islice(batches, at_once)):
            mine = world.rank < len(dealt)
            batch = dealt[world.rank if mine else 0]
            with autocast(world.device, dtype):
                measured = task.measure(model, batch.to(world.device).inputs)
            counts = {f"count/{name}": count for name, count in batch.counts.items()} | {"bytes": batch.n_bytes}
            measured |= {name: torch.tensor(float(count)) for name, count in counts.items()}
            yield {name: value.cpu().double() * mine for name, value in measured.items()}
            progress.update()
    model.train()


def is_better(figures: dict, best: dict | None, name: str) -> bool:
    """Whether figures[name] is better than the best so far, or as good with a lower validation loss."""

    def rank(figures: dict) -> tuple[float, float]:
        return (-1 if name.endswith("loss") else 1) * figures[name], -figures["val_loss"]

    return best is None or rank(figures) > rank(best)


def describe(figures: dict) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))


def show_sample(model: nn.Module, task: Task, world: World, dtype: torch.dtype) -> None:
    model.eval()
    with autocast(world.device, dtype):
        text = task.sample(model)
    model.train()
    if text is not None:
        world.say("\n".join("    | " + line for line in text.splitlines()))


def diverged(step: int, what: str, bad: int, folder: Path, writer: checkpoints.Writer) -> UserError:
    """bad: the number of steps after which the weights were no longer good."""
    writer.wait()
    good = checkpoints.newest_checkpoint(folder, before=bad)
    return UserError(
        f"step {step}: {what}, so the run stops here. Last good checkpoint: {good or 'none'}. "
        f"Try a smaller --lr, a longer --warmup, --clip 1 or --dtype float32, in another --out"
    )


class Interrupts:
    """While active, Ctrl-C and SIGTERM only leave their number in `received`; a second Ctrl-C ends at once."""

    def __enter__(self) -> "Interrupts":
        self.received = 0
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            os._exit(130)  # and not wait for a checkpoint that is being written: it is whole, or not there
        self.received = number
        if os.environ.get("RANK", "0") == "0":  # not print(), in the middle of which the signal may have come
            os.write(2, b"\nstopping after this step; Ctrl-C once more ends at once\n")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
