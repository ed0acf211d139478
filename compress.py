"""Make a run smaller: prune, quantize, reduce or distill it; each writes a run that every other command opens."""

import dataclasses

import numpy as np

import train_bert
import train_gpt
from mini import compare, prune, quant
from mini.config import (
    TASK_CONFIGS,
    CompressOptions,
    DataConfig,
    DistillConfig,
    OptimConfig,
    PruneConfig,
    QuantConfig,
    ReduceConfig,
    TrainConfig,
    UserError,
    dispatch,
    parse_flags,
    peek,
    run_command,
)
from mini.devices import World
from mini.start import PRETRAINING, Settings, make_world, open_own_task, open_run, read_compression, run_compressed
from mini.teach import check, teach, tinybert

CALIBRATION_BATCH = 32
QAT_LR = 0.1  # of the run's own: int8 does little harm, which high learning rates would add to (docs/log.md)


def prune_run(argv: list[str]) -> None:
    """Take weights, heads or neurons out of a run, and train what stays for --steps."""
    s = read_compression(argv, "prune", prune_run.__doc__, PruneConfig)
    options, part, model = s.prune, s.prune.pattern, s.start
    if s.quant:
        raise UserError(f"{s.run.init} is quantized: prune first, then quantize")
    if part in prune.JOINS:
        prune.check_units(model, part, options)
    if ":" in part and "sparsity" in s.given:
        raise UserError(f"--pattern {part} says how many weights go: leave --sparsity out")
    if options.schedule == "cubic" and not (s.train.steps or s.train.epochs):
        raise UserError("--schedule cubic prunes while the model trains: say how long with --steps")
    options.first = prune.sparsity(model)
    if part not in prune.JOINS and options.sparsity < options.first - 1e-4:  # matrices round, each for itself
        raise UserError(f"--sparsity {options.sparsity}: {s.run.init} has {options.first:.4g} already")
    world = make_world(s.train)
    task, tokenizer = open_own_task(s, world)
    model.to(world.device)
    batches = calibration(task, options.calibrate) if options.method in ("wanda", "gradient") else []
    if part in prune.JOINS:
        gates = prune.choose_units(model, part, options, s.train.seed, task, batches)
        s.start = prune.without_units(model, part, world.agree([gate.cpu() for gate in gates]))
    else:
        share = options.first if options.schedule == "cubic" else options.sparsity
        prune.prune(model, options, share, s.train.seed, task, batches)
        masks = world.agree({name: mask.cpu() for name, mask in prune.masks_of(model).items()})
        prune.set_masks(model, {name: mask.to(world.device) for name, mask in masks.items()})
    run_compressed(s, task, tokenizer, world)
    world.leave()


def quantize_run(argv: list[str]) -> None:
    """Give a run int8 matrices, and with --steps train them in that form."""
    s = read_compression(argv, "quant", quantize_run.__doc__, QuantConfig, lr_share=QAT_LR)
    if quant.is_int8(s.start) or quant.is_prepared(s.start):
        raise UserError(f"{s.run.init} is quantized already: start from the run it was made of")
    if s.quant.scheme == "qat" and not (s.train.steps or s.train.epochs):
        raise UserError("--scheme qat trains: say how long with --steps, or take --scheme static")
    if s.quant.scheme == "dynamic" and (unused := s.given & {"observer", "calibrate"}):
        raise UserError(f"--{min(unused)}: --scheme dynamic has no ranges to find; take static or qat, or leave it out")
    world = make_world(s.train)
    task, tokenizer = open_own_task(s, world)
    s.start.to(world.device)
    ranges = {}
    if s.quant.scheme != "dynamic":
        batches = calibration(task, s.quant.calibrate)
        ranges = world.agree(quant.calibrate(s.start, s.quant.observer, task, batches))
    quant.prepare(s.start, ranges)
    world.say(f"Served as int8: {quant.backend(world.device.type)}")
    run_compressed(s, task, tokenizer, world)
    world.leave()


def reduce_run(argv: list[str]) -> None:
    """Keep some of a run's layers, and train them for --steps."""
    s = read_compression(argv, "reduce", reduce_run.__doc__, ReduceConfig)
    keep = layers_to_keep(s)
    world = make_world(s.train)
    task, tokenizer = open_own_task(s, world)
    if keep is None:
        s.start.to(world.device)
        values = world.agree(prune.influence(s.start, task, calibration(task, s.reduce.calibrate)))
        world.say("Block influence: " + ", ".join(f"{i}: {value:.4f}" for i, value in enumerate(values)))
        order = sorted(range(len(values)), key=lambda i: -values[i])
        keep = sorted(order[: s.reduce.layers])
    s.start = prune.without_layers(s.start, keep)
    world.say(f"Layers kept: {', '.join(map(str, keep))}")
    run_compressed(s, task, tokenizer, world)
    world.leave()


def layers_to_keep(s: Settings) -> list[int] | None:
    """The layers of --keep, or of --layers and --by; None where their influence has to be measured."""
    options, n = s.reduce, s.model.n_layers
    if bool(options.keep) == bool(options.layers):
        raise UserError("say which layers stay with --keep 0,2,4, or how many with --layers")
    if options.keep and "by" in s.given:
        raise UserError("--by chooses layers for --layers; --keep names them")
    if s.quant:
        raise UserError(f"{s.run.init} is quantized: reduce first, then quantize")
    if options.layers:
        if options.layers >= n:
            raise UserError(f"--layers {options.layers}: {s.run.init} has {n}; keep fewer")
        return None if options.by == "influence" else prune.chosen_layers("by", options.by, options.layers, n)
    keep = prune.chosen_layers("keep", options.keep, n, n)
    if len(keep) == n:
        raise UserError(f"--keep {options.keep}: these are all layers of {s.run.init}; leave some out")
    return keep


def distill_run(argv: list[str]) -> None:
    """Teach a smaller model what a run computes."""
    world = None
    if argv and peek(argv, "recipe", None) == "tinybert" and peek(argv, "train", None):
        argv, world = with_teacher(argv)
    s = read_compression(argv, "distill", distill_run.__doc__, DistillConfig, training={}, lr_share=1.0)
    check(s)
    world = world or make_world(s.train)
    if s.distill.recipe == "tinybert" and s.run.task not in PRETRAINING:
        tinybert(s, world)
    else:
        teach(s, world)
    world.leave()


def with_teacher(argv: list[str]) -> tuple[list[str], World | None]:
    """TinyBERT's second step where RUN is pretrained only: fine-tunes it, in OUT-teacher, which then is the RUN."""
    source, train = argv[0], peek(argv, "train", None)
    if source.startswith("-"):
        return argv, None
    s = open_run(source, peek(argv, "tokenizer", None))
    if s.run.task not in PRETRAINING:
        return argv, None
    s.run.task = "qa" if train == "python-docs" or train.endswith(".json") else "classify"
    classes = [CompressOptions, DistillConfig, DataConfig, OptimConfig, TrainConfig, TASK_CONFIGS[s.run.task]]
    (options, s.distill, *parts), s.given = parse_flags(argv, classes, distill_run.__doc__)
    if not options.out:
        raise UserError("name the run folder to make with --out")
    if s.distill.general:
        raise UserError(f"--general: {source} is pretrained and has that part; leave it out")
    check(s)
    flags = dict(task=s.run.task, init=source, out=f"{options.out}-teacher", overwrite=options.overwrite)
    flags |= {name: value for part in parts for name, value in dataclasses.asdict(part).items() if name in s.given}
    script = {"gpt": train_gpt, "bert": train_bert}[s.kind]
    settings = script.read([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    world = make_world(settings.train)
    world.say(f"TinyBERT, step 2 of 4 comes first: the teacher is fine-tuned, {settings.run.out}")
    script.learn(settings, world)
    return [settings.run.out, *argv[1:], "--general", source], world


def report(argv: list[str]) -> None:
    """Measure runs and compare them: size, speed, memory, quality, and what of it is real."""
    (options,), _ = parse_flags(argv, [compare.ReportOptions], compare.ReportOptions.__doc__)
    compare.compare(options)


def calibration(task, n: int) -> list:
    """The first n training examples, in batches."""
    n = min(n, task.data.n)
    return [task.data.batch(np.arange(i, min(i + CALIBRATION_BATCH, n))) for i in range(0, n, CALIBRATION_BATCH)]


COMMANDS = {
    "prune": (prune_run, prune_run.__doc__),
    "quantize": (quantize_run, quantize_run.__doc__),
    "reduce": (reduce_run, reduce_run.__doc__),
    "distill": (distill_run, distill_run.__doc__),
    "report": (report, report.__doc__),
}


def main(argv: list[str]) -> None:
    dispatch(argv, COMMANDS, "python compress.py")


if __name__ == "__main__":
    run_command(main)
