"""From `compress.py COMMAND RUN --out RUN2 ...` to a run: the steps that its commands share."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mini.compression.activations import Examples
from mini.flags import Checked, UserError, field_names, option, parse_flags, peek
from mini.model.transformer import Model
from mini.tasks.base import Task
from mini.text.corpus import DataConfig
from mini.training.checkpoints import read_result
from mini.training.loop import TrainConfig, describe
from mini.training.optim import OptimConfig
from mini.training.ranks import World
from mini.training.start import Settings, check_length, open_run, other_optimizer, refuse_fixed, train_run

# Training after compression: with this share of the run's own learning rates, which fall to zero (docs/log.md).
HEAL_LR = 0.3
HEAL = dict(steps=0, epochs=0.0, tokens=0.0, flops=0.0, max_seconds=0.0, schedule="linear", warmup=0.05, min_lr=0.0,
            eval_every=0, sample_every=0, checkpoint_every=250)  # fmt: skip
NOT_SHOWN = ("seconds", "tokens_per_s", "mfu", "memory_mb", "sparsity")  # of the run before


@dataclass
class CompressOptions(Checked):
    """What to make smaller, and where the result goes."""

    run: str = option("", "a run, or a folder with published weights", positional="1")
    out: str = option("", "the run folder to make; the same command goes on with an unfinished one")
    overwrite: bool = option(False, "delete the run in --out and begin anew")


def read_compression(
    argv: list[str], name: str, description: str, recipe: type, training: dict = HEAL, lr_share: float = HEAL_LR
) -> tuple[Settings, object]:
    """Reads `RUN --out RUN2 ...`: the settings of a training, and the recipe, which RunConfig's field `name` records.

    Data, task and optimizer are the run's, learning rates times lr_share, unless `training` or flags say otherwise.
    """
    description += "\n\nRUN --help shows the values of that run, which are the defaults of training."
    source = argv[0] if argv and not argv[0].startswith("-") else None  # None: --help, or a RUN that is missing
    settings = open_run(source, peek(argv, "tokenizer", None)) if source else None
    parts = [settings.data, settings.optim, settings.train] if source else [DataConfig(), OptimConfig(), TrainConfig()]
    pretrains = not source or settings.task.pretrains
    if not pretrains and settings.task_options is not None:  # of pretraining, --nsp is settled by the heads
        parts.append(settings.task_options)
    defaults = {f: v for part in parts for f, v in asdict(part).items()}
    defaults |= {f: lr_share * defaults[f] for f in ("lr", "embed_lr", "head_lr")} | training
    defaults |= other_optimizer(argv, defaults, pretrains, lr_share)
    defaults = {f: v for f, v in defaults.items() if f not in field_names(recipe)}
    classes = [CompressOptions, recipe, *map(type, parts)]
    defaults["shard"] = False  # masks and int8 layers look at whole matrices
    (options, chosen, *parts), given = parse_flags(argv, classes, description, without={"shard"}, **defaults)
    if source != options.run:
        raise UserError(f"the run comes first: {sys.argv[0]} {options.run} ...")
    if not options.out:
        raise UserError("name the run folder to make with --out")
    if "train" in given and pretrains:
        raise UserError(f"--train is a file to fine-tune on; {source} is pretrained and reads --data")
    if "data" in given and not pretrains and getattr(chosen, "recipe", None) != "tinybert":
        raise UserError(f"--data is text to pretrain on; {source} is fine-tuned and reads --train and --valid")
    settings.data, settings.optim, settings.train, *rest = parts
    if rest:
        refuse_fixed(rest[0], settings.task_options, given, source)
        settings.task_options = rest[0]
    settings.job.out, settings.job.overwrite, settings.given = options.out, options.overwrite, given
    check_length(settings)
    if "schedule" in field_names(recipe):  # then the flag of this name is the recipe's
        settings.optim.schedule = HEAL["schedule"]
    settings.compression = {name: asdict(chosen)}
    return settings, chosen


def refuse_int8(s: Settings, what: str) -> None:
    if s.quant:
        raise UserError(f"{s.job.init} is quantized already: {what}")


def calibration(task: Task, n: int) -> Examples:
    """The first n training examples."""
    n = min(n, task.n)
    return Examples(task, [task.batch(np.arange(i, min(i + 32, n))) for i in range(0, n, 32)])


def run_compressed(s: Settings, model: Model, task: Task, world: World, methods: Sequence = ()) -> None:
    """Trains what compress.py has made of a run, and says how good that run was."""
    known = read_result(Path(s.job.init)) or {}  # of published weights nothing
    before = {name: value for name, value in known.items() if name not in NOT_SHOWN}
    world.say(f"Before, {s.job.init}: {describe(before)}" if before else f"From {s.job.init}")
    s.model = model.config
    torch.manual_seed(s.train.seed)
    with world.together():
        train_run(s, model, task, world, methods=methods)
    world.leave()
