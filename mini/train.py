"""The loop: every training in mini, whatever the model and the task, goes through train().

    for step in range(from the newest checkpoint, steps):
        set the learning rate
        backward()            each part of the step's batch: forward, loss / count of the whole batch, backward
        clip_gradients()      those of masked weights being zero; and stop the run if loss or norm is not a number
        optimizer.step()      then prune.follow(): masked weights stay zero
        now and then: a line of metrics.jsonl, evaluate(), show_sample(), a checkpoint
    finish()

One step in words: the global batch of the step is cut into equal parts, one for each rank and accumulation; each part's
summed losses are divided by the counts of the whole batch, so that the gradients add up to that of the one big
batch; then one optimizer step. Dropout is seeded from (seed, step, first example of the part): with parts of the
same size nothing depends on how many processes share them (1 x 4, 2 x 2, 4 x 1), and a run goes on from a checkpoint
as if it had never stopped.
"""

import contextlib
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mini import prune, runs
from mini.config import TrainConfig, UserError
from mini.data import mix
from mini.devices import World, can_compile, keep_memory, pick_dtype
from mini.optim import make_optimizers, schedule
from mini.report import Speedometer, plot_metrics
from mini.runs import RunConfig
from mini.storage import load_tensors, load_weights, save_tensors, weights, write_json


class Objective(nn.Module):
    """The task's loss as a module's forward, which is what DDP and torch.compile wrap."""

    def __init__(self, model: nn.Module, task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.task.loss(self.model, inputs)


def train(model: nn.Module, task, config: RunConfig, folder: Path, world: World) -> dict:
    """Trains to the end, from the newest checkpoint in folder if there is one; returns the final figures.

    Writes metrics.jsonl, checkpoints, and at the end model.safetensors and result.json.
    Raises UserError where the loss stops being a number; SystemExit after SIGTERM or Ctrl-C, a checkpoint written.
    """
    options, optim = config.train, config.optim
    part = part_size(options, world)
    steps, eval_every = options.steps, options.eval_every
    if options.epochs:
        steps = max(1, round(options.epochs * task.data.n / options.batch_size))
    if task.best and not eval_every:
        eval_every = -(-task.data.n // options.batch_size)  # each epoch

    keep_memory()
    model.to(world.device).train()
    model.stack.checkpoint_activations = options.checkpoint_activations
    dtype = pick_dtype(options.dtype, world.device)
    optimizers = make_optimizers(model, optim, dtype)
    state = resume(model, optimizers, folder, world)

    objective: nn.Module = Objective(model, task)
    # On CPUs compiled code adds in an order that varies with several threads: runs would not repeat to the bit.
    wanted = options.compile == "true" or (options.compile == "auto" and task.fixed_shape and world.on_gpu)
    if wanted and can_compile(world.device, world.say):
        objective = torch.compile(objective)
    if world.size > 1:
        objective = DistributedDataParallel(objective, broadcast_buffers=False)  # all ranks compute the same ones
    speed = Speedometer(model, task, dtype, world, state)

    began = time.perf_counter() - state["seconds"]
    bar = progress_bar(total=steps, initial=state["step"], disable=not world.main, unit="step")
    with Interrupts() as interrupts, bar:
        for step in range(state["step"], steps):
            stop = world.highest(interrupts.received)
            clock = time.perf_counter()
            share = schedule(step, steps, optim)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak_lr"] * share
            losses, n_tokens = backward(objective, task, step, part, options, dtype, world)
            prune.hold_gradients(model)
            loss = sum(loss_weight(task, name) * value for name, value in losses.items())
            norm = clip_gradients(model, optim.clip)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise diverged(step + 1, f"the loss is {loss} and the gradient norm {norm}", step, folder)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            done, last = step + 1, step + 1 == steps
            prune.follow(model, config.prune, options.seed, done, steps)
            state |= {"step": done, "tokens": state["tokens"] + n_tokens}
            state["train_seconds"] += time.perf_counter() - clock
            bar.update()

            evaluating = last or falls_on(done, eval_every)
            if evaluating or falls_on(done, options.log_every):
                row = {"step": done, "loss": loss, "lr": optim.lr * share, "grad_norm": norm, **speed.since_last(state)}
                if len(losses) > 1:
                    row |= losses
                postfix = f"loss {loss:.3f}, lr {row['lr']:.2g}, {row['tokens_per_s']:,.0f} tokens/s"
                bar.set_postfix_str(postfix, refresh=False)
                if evaluating:
                    figures = evaluate(model, task, world, dtype, part, 0 if last else options.eval_tokens)
                    if not math.isfinite(figures["val_loss"]):
                        raise diverged(done, f"the validation loss is {figures['val_loss']}", done, folder)
                    row |= {name: value for name, value in figures.items() if isinstance(value, float)}
                    world.say(f"step {done:>{len(str(steps))}}: " + describe(figures))
                    if task.best and done >= prune.ramp_end(config.prune, steps):
                        keep_best(state, figures, task.best, model, folder, world)
                if world.main:
                    runs.append_metrics(folder, row)
            if world.main and falls_on(done, options.sample_every) and not last:
                show_sample(model, task, world, dtype)
            state["seconds"] = time.perf_counter() - began
            if not last and (stop or falls_on(done, options.checkpoint_every)) and world.main:
                saved = runs.save_checkpoint(folder, model, optimizers, state, options.keep)
            if stop and not last:
                bar.close()
                if world.main:
                    world.say(f"interrupted: {saved} is written; the same command goes on from there")
                world.leave()
                raise SystemExit(128 + stop)

    model.projections = None  # of distillation: they have served
    if not steps:  # a run that is only judged
        figures = state["best"] = evaluate(model, task, world, dtype, part)
        world.say(describe(figures))
    result = {
        **(state["best"] if task.best else figures),
        "steps": steps,
        "tokens": state["tokens"],
        **speed.overall(state),
        "seconds": time.perf_counter() - began,
        "parameters": model.num_params(),
        "device": str(world.device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if prune.masks_of(model):
        result["sparsity"] = prune.sparsity(model)
    if world.main:
        finish(model, result, folder, config)
    return result


def resume(model: nn.Module, optimizers: list, folder: Path, world: World) -> dict:
    """Puts the newest whole checkpoint into place, if there is one; returns how far the run has come."""
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "train_seconds": 0.0, "best": None}
    if checkpoint := runs.newest_checkpoint(folder, world.say):
        state |= runs.load_checkpoint(checkpoint, model, optimizers)
        world.say(f"going on from {checkpoint}")
    elif runs.checkpoints(folder):
        raise UserError(f"{folder}: every checkpoint is damaged; --overwrite true begins anew")
    if world.lowest(state["step"]) != world.highest(state["step"]):
        raise UserError(f"{folder}: the ranks see different checkpoints; put the run on a file system that all share")
    if world.main:
        runs.rewind(folder, state["step"])
    return state


def finish(model: nn.Module, result: dict, folder: Path, config: RunConfig) -> None:
    """Writes the final weights, the picture, and last result.json, with which the run counts as finished."""
    if (best := folder / "best.safetensors").exists():
        load_weights(model, load_tensors(best), folder)
    size = runs.save_model(model, folder)
    if config.prune or config.reduce or config.quant or config.distill or prune.masks_of(model):
        result["bytes"] = size
    plot_metrics(runs.read_metrics(folder), folder / "loss.png")
    write_json(folder / "result.json", result)
    (folder / "best.safetensors").unlink(missing_ok=True)


def part_size(options: TrainConfig, world: World) -> int:
    """Sequences in one forward pass: the batch is cut equally by ranks, then by accumulation."""
    size, rest = divmod(options.batch_size, world.size * options.accumulation)
    if rest:
        raise UserError(
            f"--batch_size {options.batch_size} cannot be cut into {world.size} ranks x {options.accumulation} parts"
        )
    return size


def progress_bar(**options) -> tqdm:
    """A bar that is drawn ten times a second on a terminal, and twice a minute in a log file."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 30, dynamic_ncols=True, **options)


def falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def backward(
    objective: nn.Module,
    task,
    step: int,
    part: int,
    options: TrainConfig,
    dtype: torch.dtype,
    world: World,
) -> tuple[dict[str, float], int]:
    """Leaves the gradient of the step's whole batch in the parameters.

    Returns ({name: mean loss in nats}, real tokens), each over all ranks.
    """
    first = step * options.batch_size + world.rank * options.accumulation * part
    starts = [first + i * part for i in range(options.accumulation)]  # example number of each part's first
    batches = [task.data.batch(np.arange(start, start + part)) for start in starts]
    names = [name for name in batches[0].counts if name != "bytes"]
    counts = [sum(batch.counts[name] for batch in batches) for name in names]
    totals = torch.tensor([*counts, sum(batch.n_tokens for batch in batches)], device=world.device)
    *counts, n_tokens = world.sum(totals).tolist()

    sums = torch.zeros(len(names), device=world.device)
    for start, batch in zip(starts, batches, strict=True):
        torch.manual_seed(mix(options.seed, step, start))  # dropout, the same wherever this part is computed
        # Ranks exchange gradients once, with the last part; DDP looks at this during the forward pass.
        alone = world.size > 1 and start != starts[-1]
        with objective.no_sync() if alone else contextlib.nullcontext():
            with torch.autocast(world.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                losses = objective(batch.to(world.device).inputs)
            # Σ over all parts and ranks of (a part's summed loss / the whole batch's count) is the batch's mean loss.
            # Backward passes add up a rank's parts; DDP averages over the ranks, so world.size makes that a sum.
            shares = [loss_weight(task, n) * world.size / count for n, count in zip(names, counts, strict=True)]
            sum(share * losses[name] for name, share in zip(names, shares, strict=True)).backward()
        sums += torch.stack([losses[name].detach() for name in names])
    values = world.sum(sums).tolist()
    return {name: v / c for name, v, c in zip(names, values, counts, strict=True)}, n_tokens


def loss_weight(task, name: str) -> float:
    """What a loss counts in the sum: 1, but for tasks that say otherwise."""
    return getattr(task, "loss_weights", {}).get(name, 1.0)


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scales all gradients so that their norm is at most limit (0: leaves them); returns the norm before."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    return float(nn.utils.clip_grad_norm_(parameters, limit or math.inf))


@torch.no_grad()
def evaluate(model: nn.Module, task, world: World, dtype: torch.dtype, batch_size: int, limit: int = 0) -> dict:
    """The task's figures on the whole validation set (or its first `limit` tokens), shared out over the ranks."""
    model.eval()
    sums: dict[str, Tensor] = {}
    progress = progress_bar(desc="evaluating", leave=False, delay=2, disable=not world.main, unit="batch")
    with progress:
        for i, batch in enumerate(task.data.validation(batch_size, limit)):
            mine = i % world.size == world.rank
            if not mine and i > 0:  # everybody computes the first: a rank without any still knows the sums' shapes
                continue
            with torch.autocast(world.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                measured = task.measure(model, batch.to(world.device).inputs)
            measured |= {f"count/{name}": torch.tensor(float(count)) for name, count in batch.counts.items()}
            for name, value in measured.items():
                value = value.cpu().double() * mine
                sums[name] = sums[name] + value if name in sums else value
            progress.update()
    if world.size > 1:
        sums = {name: world.sum(sums[name].to(world.device)).cpu() for name in sorted(sums)}
    model.train()
    return task.metrics(sums)


def keep_best(state: dict, figures: dict, name: str, model: nn.Module, folder: Path, world: World) -> None:
    """Remembers figures and weights if figures[name] is the best so far, or as good with a lower validation loss."""

    def rank(figures: dict) -> tuple[float, float]:
        return (-1 if name.endswith("loss") else 1) * figures[name], -figures["val_loss"]

    if state["best"] is None or rank(figures) > rank(state["best"]):
        state["best"] = {**figures, "best_step": state["step"]}
        if world.main:
            tensors = {n: t for n, t in weights(model).items() if not n.startswith("projections.")}
            save_tensors(folder / "best.safetensors", tensors)


def describe(figures: dict) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))


def show_sample(model: nn.Module, task, world: World, dtype: torch.dtype) -> None:
    model.eval()
    with torch.autocast(world.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        text = task.sample(model)
    model.train()
    if text is not None:
        world.say("\n".join("    | " + line for line in text.splitlines()))


def diverged(step: int, what: str, bad: int, folder: Path) -> UserError:
    """bad: the number of steps after which the weights were no longer good."""
    good = runs.newest_checkpoint(folder, before=bad)
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
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
