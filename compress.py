"""Make a run smaller: prune, quantize, reduce or distill it; each writes a run that every other command opens."""

import dataclasses

import train_bert
import train_gpt
from mini.compression import prune, report, shrink, teach
from mini.compression.distill import DistillConfig
from mini.compression.prune import CubicPruning, PruneConfig
from mini.compression.quantize import QuantConfig, calibrate
from mini.compression.shrink import ReduceConfig
from mini.compression.start import CompressOptions, calibration, read_compression, refuse_int8, run_compressed
from mini.flags import UserError, dispatch, parse_flags, peek, run_command
from mini.model import int8, sparse
from mini.tasks import TASKS
from mini.text.corpus import DataConfig
from mini.training.loop import TrainConfig
from mini.training.optim import OptimConfig
from mini.training.ranks import World
from mini.training.start import TEXT_FLAGS, learn, make_world, open_own_task, open_run

QAT_LR = 0.1  # of the run's own: int8 does little harm, which high learning rates would add to (docs/log.md)


def prune_run(argv: list[str]) -> None:
    """Take weights, heads or neurons out of a run, and train what stays for --steps."""
    s, options = read_compression(argv, "prune", prune_run.__doc__, PruneConfig)
    model, cubic = s.source, options.schedule == "cubic"
    refuse_int8(s, "prune first, then quantize")
    if options.units:
        shrink.check_units(model, options)
    if options.n_of_m and "sparsity" in s.given:
        raise UserError(f"--pattern {options.pattern} says how many weights go: leave --sparsity out")
    if cubic and not s.train.trains:
        raise UserError("--schedule cubic prunes while the model trains: say how long with --steps")
    first = options.first = sparse.sparsity(model)
    s.compression = {"prune": dataclasses.asdict(options)}
    if not options.units and options.sparsity < first - 1e-4:  # matrices round, each for itself
        raise UserError(f"--sparsity {options.sparsity}: {s.job.init} has {first:.4g} already")
    world = make_world(s.train)
    task = open_own_task(s, world)
    model.to(world.device)
    examples = calibration(task, options.calibrate) if options.method in ("wanda", "gradient") else None
    if options.units:
        gates = shrink.choose_units(model, options, s.train.seed, examples)
        model = shrink.without_units(model, options.pattern, world.agree([gate.cpu() for gate in gates]))
        return run_compressed(s, model, task, world)
    prune.prune(model, options, first if cubic else options.sparsity, s.train.seed, examples)
    masks = world.agree({name: mask.cpu() for name, mask in sparse.masks_of(model).items()})
    sparse.set_masks(model, {name: mask.to(world.device) for name, mask in masks.items()})
    run_compressed(s, model, task, world, [CubicPruning(model, options, s.train.seed)] if cubic else [])


def quantize_run(argv: list[str]) -> None:
    """Give a run int8 matrices, and with --steps train them in that form."""
    s, options = read_compression(argv, "quant", quantize_run.__doc__, QuantConfig, lr_share=QAT_LR)
    refuse_int8(s, "start from the run it was made of")
    if options.scheme == "qat" and not s.train.trains:
        raise UserError("--scheme qat trains: say how long with --steps, or take --scheme static")
    if options.scheme == "dynamic" and (unused := s.given & {"observer", "calibrate"}):
        raise UserError(f"--{min(unused)}: --scheme dynamic has no ranges to find; take static or qat, or leave it out")
    world = make_world(s.train)
    task = open_own_task(s, world)
    model, ranges = s.source.to(world.device), {}
    if options.scheme != "dynamic":
        ranges = world.agree(calibrate(model, options.observer, calibration(task, options.calibrate)))
    world.say(f"Served as int8: {int8.backend(world.device.type)}")
    run_compressed(s, int8.prepare(model, ranges), task, world)


def reduce_run(argv: list[str]) -> None:
    """Keep some of a run's layers, and train them for --steps."""
    s, options = read_compression(argv, "reduce", reduce_run.__doc__, ReduceConfig)
    keep = shrink.layers_to_keep(options, s.model.n_layers, s.given, s.job.init)
    refuse_int8(s, "reduce first, then quantize")
    world = make_world(s.train)
    task = open_own_task(s, world)
    if keep is None:
        s.source.to(world.device)
        values = world.agree(shrink.influence(s.source, calibration(task, options.calibrate)))
        world.say("Block influence: " + ", ".join(f"{i}: {value:.4f}" for i, value in enumerate(values)))
        order = sorted(range(len(values)), key=lambda i: -values[i])
        keep = sorted(order[: options.layers])
    world.say(f"Layers kept: {', '.join(map(str, keep))}")
    run_compressed(s, shrink.without_layers(s.source, keep), task, world)


def distill_run(argv: list[str]) -> None:
    """Teach a smaller model what a run computes."""
    argv, world = with_teacher(argv)
    s, options = read_compression(argv, "distill", distill_run.__doc__, DistillConfig, training={}, lr_share=1.0)
    teach.check(s, options)
    world = world or make_world(s.train)
    with world.together():
        if options.recipe == "tinybert" and not s.task.pretrains:
            teach.tinybert(s, options, world)
        else:
            teach.teach(s, options, world)
    world.leave()


def with_teacher(argv: list[str]) -> tuple[list[str], World | None]:
    """Where --recipe tinybert gets a pretrained RUN and files to fine-tune it on: makes its teacher, OUT-teacher.

    Returns the command line whose RUN is that teacher, and the processes that made it; any other as it is, and None.
    """
    train = peek(argv, "train", None)
    if not train or argv[0].startswith("-") or peek(argv, "recipe", None) != "tinybert":
        return argv, None
    source = argv[0]
    s = open_run(source, peek(argv, "tokenizer", None))
    if not s.task.pretrains:
        return argv, None
    kinds = [name for name, task in TASKS.items() if s.kind in task.kinds and train.endswith(task.files)]
    if not kinds:
        raise UserError(f"--train {train}: no file that a {s.kind.upper()} can be fine-tuned on")
    s.job.task = kinds[0]
    classes = [CompressOptions, DistillConfig, DataConfig, OptimConfig, TrainConfig, *filter(None, [s.task.Config])]
    (options, recipe, *training), s.given = parse_flags(argv, classes, distill_run.__doc__)
    if not options.out:
        raise UserError("name the run folder to make with --out")
    if recipe.general:
        raise UserError(f"--general: {source} is pretrained and has that part; leave it out")
    teach.check(s, recipe)
    flags = dict(task=s.job.task, init=source, out=f"{options.out}-teacher", overwrite=options.overwrite)
    flags |= {name: value for part in training for name, value in vars(part).items() if name in s.given - TEXT_FLAGS}
    read = {"gpt": train_gpt, "bert": train_bert}[s.kind].read
    settings = read([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    world = make_world(settings.train)
    world.say(f"TinyBERT, step 2 of 4 comes first: the teacher is fine-tuned, {settings.job.out}")
    learn(settings, world)
    return [settings.job.out, *argv[1:], "--general", source], world


def report_runs(argv: list[str]) -> None:
    """Measure runs and compare them: size, speed, memory, quality, and what of it is real."""
    (options,), _ = parse_flags(argv, [report.ReportOptions], report.ReportOptions.__doc__)
    report.compare(options)


COMMANDS = dict(prune=prune_run, quantize=quantize_run, reduce=reduce_run, distill=distill_run, report=report_runs)


def main(argv: list[str]) -> None:
    dispatch(argv, {name: (run, run.__doc__) for name, run in COMMANDS.items()}, "python compress.py")


if __name__ == "__main__":
    run_command(main)
