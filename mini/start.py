"""From a command line to a finished run: the steps that train_gpt.py and train_bert.py share."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mini import runs
from mini.config import (
    TASK_CONFIGS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunOptions,
    TrainConfig,
    UserError,
    nearest,
    parse_flags,
    peek,
)
from mini.data import init_tokenizer
from mini.devices import World
from mini.tokenizer import Tokenizer, make_tokenizer
from mini.train import part_size, train

FINETUNE = dict(
    optimizer="adamw", lr=1e-4, schedule="linear", warmup=0.1, weight_decay=0.01,
    epochs=3.0, batch_size=32, eval_every=0, sample_every=0,
)  # fmt: skip
# What a run to start from has settled.
SHAPE = {"n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_ff", "vocab_size", "activation", "tied", "bias",
         "n_segments"}  # fmt: skip


@dataclass
class Settings:
    """What the command line said, and what it starts from."""

    kind: str  # gpt or bert
    run: RunOptions
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    task_options: object  # the task's own, of a class in TASK_CONFIGS, or None
    given: set[str]  # names of the flags that were given
    start: nn.Module | None = None  # the model of --init
    tokenizer: Tokenizer | None = None  # its tokenizer
    labels: list[str] = dataclasses.field(default_factory=list)  # its classes


def read_settings(
    argv: list[str],
    description: str,
    kind: str,
    tasks: tuple[str, ...],
    presets: dict[str, dict],
    special: tuple[str, ...] = (),
    finetune: dict | None = None,
) -> Settings:
    """Reads the flags. tasks: names of --task; the first of them pretrains, the others have the values of finetune."""
    task = peek(argv, "task", tasks[0])
    if task not in tasks:
        raise UserError(f"--task {task}: choose one of {', '.join(tasks)}{nearest(task, tasks)}")
    first = next(iter(presets))
    preset = peek(argv, "preset", first)
    name = kind if preset == first else preset
    defaults = dict(task=task, out=f"out/{name}")
    if task != tasks[0]:
        defaults = {**FINETUNE, **(finetune or {}), **defaults, "out": f"out/{name}-{task}"}
    classes = [RunOptions, ModelConfig, DataConfig, OptimConfig, TrainConfig]
    classes += [TASK_CONFIGS[task]] if task in TASK_CONFIGS else []
    description = f"{description}\n\n--task is one of {', '.join(tasks)}; each has flags and defaults of its own."
    objects, given = parse_flags(argv, classes, description, presets, **defaults)
    settings = Settings(kind, *objects[:5], *(objects[5:] or [None]), given)
    if task == tasks[0] and settings.data.train:
        raise UserError(f"--train is a file to fine-tune on; --task {task} reads --data")
    if "steps" in given:
        if settings.train.epochs and "epochs" in given:
            raise UserError("--steps and --epochs: give one of them")
        settings.train.epochs = 0.0
    if init := settings.run.init:
        open_start(settings, init, special)
    return settings


def open_start(settings: Settings, init: str, special: tuple[str, ...]) -> None:
    """A run to start from brings its model's shape and its tokenizer; flags that were given change the rest."""
    settings.start, settings.labels = runs.load_model(init, settings.kind), runs.read_labels(init)
    shape = settings.start.config
    spec = settings.data.tokenizer if "tokenizer" in settings.given else None
    settings.tokenizer = init_tokenizer(init, spec, special)
    flags = {name: getattr(settings.model, name) for name in settings.given if hasattr(settings.model, name)}
    for name in SHAPE & flags.keys():
        if flags[name] != getattr(shape, name):
            raise UserError(f"--{name} {flags[name]}: {init} has {getattr(shape, name)}; leave it out")
    if shape.positions == "learned" and flags.get("max_len", 0) > shape.max_len:
        raise UserError(f"--max_len {flags['max_len']}: {init} has learned positions for {shape.max_len} tokens")
    settings.model = dataclasses.replace(shape, **flags)


def make_world(options: TrainConfig) -> World:
    """The processes and their device; refuses a batch that cannot be shared out, before any work is done."""
    world = World(options.device)
    part_size(options, world)
    return world


def need_files(settings: Settings) -> None:
    if not settings.data.train or not settings.data.valid:
        raise UserError(f"--task {settings.run.task} needs --train FILE and --valid FILE")


def fine_tuning_tokenizer(
    settings: Settings, texts: Callable[[], Iterable[str]], special: tuple[str, ...] = ()
) -> Tokenizer:
    """That of --init, or without one that of --tokenizer; a BPE is trained on the texts to learn from."""
    if settings.tokenizer:
        return settings.tokenizer
    return make_tokenizer(settings.data.tokenizer, texts, settings.model.vocab_size, special)


def make_model(settings: Settings, tokenizer: Tokenizer, labels: list[str], **heads) -> nn.Module:
    """The model with these heads, its weights fresh from the seed or those of --init."""
    heads["n_classes"] = len(labels)
    if not settings.start:
        heads["vocab_size"] = tokenizer.vocab_size
    settings.model = dataclasses.replace(settings.model, **heads)
    runs.check_vocabulary(settings.model, tokenizer, settings.run.init or settings.data.tokenizer)
    torch.manual_seed(settings.train.seed)
    model = runs.MODELS[settings.kind](settings.model)
    if settings.start:
        runs.start_from(model, settings.start, settings.run.init, keep_classes=labels == settings.labels)
    return model


def run(settings: Settings, model: nn.Module, task, tokenizer: Tokenizer, tokens: str, labels: list[str], world: World):
    """Trains in the run folder, new or going on, and says how it went. tokens: checksum of what is learnt from."""
    s = settings
    config = runs.RunConfig(
        s.kind, s.run.task, s.model, s.data, s.optim, s.train, s.task_options, s.run.init, labels, tokens
    )
    out = Path(s.run.out)
    locked = world.main_first(lambda: runs.start_run(out, config, tokenizer, s.run.overwrite, world.main))
    result = runs.read_result(out)
    if result:
        world.say(f"{out} is finished already: --overwrite true trains it anew, another --out trains another")
    else:
        world.say(prologue(model, task, world))
        result = train(model, task, config, out, world)

    if world.main:
        print("\n" + epilogue(task, result))
        model, _ = runs.load_run(out, world.device)
        if sample := task.sample(model):
            print("\nA sample:\n" + "\n".join("    " + line for line in sample.splitlines()))
        example = " ".join(shlex.quote(part) for part in task.example())
        print(f"\nThe run is in {out}. Next: python -m mini {task.command} {out} {example}")
        print(json.dumps(result))
    world.leave()
    if locked:
        locked.close()


def prologue(model: nn.Module, task, world: World) -> str:
    c = model.config
    shape = (
        f"{type(model).__name__} with {model.num_params():,} parameters: {c.n_layers} layers, d_model {c.d_model}, "
        f"max_len {c.max_len}, vocabulary {c.vocab_size:,}"
    )
    processes = f"{world.size} process{'es' * (world.size > 1)} on {world.device}"
    notes = [f"note: {note}" for note in getattr(task.data, "notes", [])]
    return "\n".join([*notes, shape, f"{task.data.n:,} training examples; {processes}"])


def epilogue(task, result: dict) -> str:
    lines = [*task.summary(result)]
    if "best_step" in result:
        lines.append(f"These are the figures, and the weights, of step {result['best_step']:,}: the best {task.best}")
    lines.append(f"{result['steps']:,} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s")
    lines[-1] += f" ({result['tokens_per_s']:,.0f} tokens/s while training"
    if "mfu" in result:
        lines[-1] += f", {result['mfu']:.0%} of this device's {result['dtype']} matmul speed"
    return "\n".join(lines) + ")"
