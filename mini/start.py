"""From a command line to a finished run: the steps that train_gpt.py, train_bert.py and compress.py share."""

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mini import quant, runs, tasks
from mini.config import (
    TASK_CONFIGS,
    CompressOptions,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    PruneConfig,
    QuantConfig,
    ReduceConfig,
    RunOptions,
    TrainConfig,
    UserError,
    field_names,
    nearest,
    parse_flags,
    peek,
)
from mini.data import ENCODER_TOKENS, LMWindows, MaskedSentences, init_tokenizer, prepare_tokens
from mini.devices import World
from mini.labelled import LabelledTexts, PromptAnswers, column_texts
from mini.squad import QuestionAnswers, squad_texts
from mini.storage import weights
from mini.tokenizer import Tokenizer, make_tokenizer
from mini.train import describe, part_size, train

FINETUNE = dict(
    optimizer="adamw", lr=1e-4, schedule="linear", warmup=0.1, weight_decay=0.01,
    epochs=3.0, batch_size=32, eval_every=0, sample_every=0,
)  # fmt: skip
PRETRAINING = ("lm", "mlm")  # tasks that read --data; the others read --train and --valid
SPECIAL = {"gpt": (), "bert": ENCODER_TOKENS}  # tokens that a model needs beside text
# Training after compression: with this share of the run's own learning rates, which fall to zero (docs/log.md).
HEAL_LR = 0.3
HEAL = dict(
    steps=0, epochs=0.0, schedule="linear", warmup=0.05, min_lr=0.0, eval_every=0, sample_every=0, checkpoint_every=250,
)  # fmt: skip
SHOWN = ("val_loss", "val_bpb", "mlm_accuracy", "nsp_accuracy", "accuracy", "exact_match", "f1")  # of the run before
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
    quant: QuantConfig | None = None  # the form of its matrices
    prune: PruneConfig | None = None  # what compress.py is to do with it
    reduce: ReduceConfig | None = None
    distill: DistillConfig | None = None


def read_settings(
    argv: list[str],
    description: str,
    kind: str,
    names: tuple[str, ...],
    presets: dict[str, dict],
    finetune: dict | None = None,
) -> Settings:
    """Reads the flags. names: of --task; the first of them pretrains, the others have the values of finetune."""
    task = peek(argv, "task", names[0])
    if task not in names:
        raise UserError(f"--task {task}: choose one of {', '.join(names)}{nearest(task, names)}")
    first = next(iter(presets))
    preset = peek(argv, "preset", first)
    name = kind if preset == first else preset
    defaults = dict(task=task, out=f"out/{name}")
    if task != names[0]:
        defaults = {**FINETUNE, **(finetune or {}), **defaults, "out": f"out/{name}-{task}"}
    classes = [RunOptions, ModelConfig, DataConfig, OptimConfig, TrainConfig]
    classes += [TASK_CONFIGS[task]] if task in TASK_CONFIGS else []
    description = f"{description}\n\n--task is one of {', '.join(names)}; each has flags and defaults of its own."
    objects, given = parse_flags(argv, classes, description, presets, **defaults)
    settings = Settings(kind, *objects[:5], *(objects[5:] or [None]), given)
    if task == names[0] and settings.data.train:
        raise UserError(f"--train is a file to fine-tune on; --task {task} reads --data")
    if {"steps", "epochs"} <= given:
        raise UserError("--steps and --epochs: give one of them")
    if "steps" in given:
        if not settings.train.steps:
            raise UserError("--steps 0: must be at least 1")
        settings.train.epochs = 0.0
    if init := settings.run.init:
        open_start(settings, init)
    return settings


def open_start(settings: Settings, init: str) -> None:
    """A run to start from brings its model's shape and its tokenizer; flags that were given change the rest."""
    settings.start, settings.labels = runs.load_model(init, settings.kind), runs.read_labels(init)
    settings.quant = runs.read_quant(init)
    shape = settings.start.config
    spec = settings.data.tokenizer if "tokenizer" in settings.given else None
    settings.tokenizer = init_tokenizer(init, spec, SPECIAL[settings.kind])
    flags = {name: getattr(settings.model, name) for name in settings.given if hasattr(settings.model, name)}
    for name in SHAPE & flags.keys():
        if flags[name] != getattr(shape, name):
            raise UserError(f"--{name} {flags[name]}: {init} has {getattr(shape, name)}; leave it out")
    if shape.positions == "learned" and flags.get("max_len", 0) > shape.max_len:
        raise UserError(f"--max_len {flags['max_len']}: {init} has learned positions for {shape.max_len} tokens")
    settings.model = dataclasses.replace(shape, **flags)


def open_run(source: str, tokenizer: str | None = None) -> Settings:
    """A run as it is, or published weights: the model, and what it was trained with and is judged by.

    tokenizer: which, for published weights that come without one.
    """
    model, published = runs.load_model(source), runs.is_published(source)
    saved = published_config(model) if published else runs.read_config(source)
    settings = Settings(
        saved.kind, RunOptions(saved.task, source), model.config, saved.data, saved.optim, saved.train,
        saved.task_options, set(), model, init_tokenizer(source, tokenizer, SPECIAL[saved.kind]),
    )  # fmt: skip
    runs.check_vocabulary(settings.model, settings.tokenizer, source)
    settings.labels, settings.quant = runs.read_labels(source), saved.quant
    return settings


def read_compression(
    argv: list[str], name: str, description: str, recipe: type, training: dict = HEAL, lr_share: float = HEAL_LR
) -> Settings:
    """Reads `RUN --out RUN2 ...` of compress.py into Settings, `name` the field for the recipe of that class.

    Data, task and optimizer are those of the run, learning rates times lr_share, unless `training` or flags say
    otherwise.
    """
    description += "\n\nRUN --help shows the values of that run, which are the defaults of training."
    source = next((word for word in argv[:1] if not word.startswith("-")), None)
    # Without a source: --help, or a RUN that is missing.
    settings = open_run(source, peek(argv, "tokenizer", None)) if source else None
    parts = [settings.data, settings.optim, settings.train] if source else [DataConfig(), OptimConfig(), TrainConfig()]
    if source and settings.run.task in ("classify", "qa"):  # of pretraining, --nsp is settled by the heads
        parts.append(settings.task_options)
    defaults = {f: v for part in parts for f, v in dataclasses.asdict(part).items()}
    defaults |= {f: lr_share * defaults[f] for f in ("lr", "embed_lr", "head_lr")} | training
    defaults = {f: v for f, v in defaults.items() if f not in field_names(recipe)}
    (options, chosen, *parts), given = parse_flags(
        argv, [CompressOptions, recipe, *map(type, parts)], description, **defaults
    )
    if source != options.run:
        raise UserError(f"the run comes first: {sys.argv[0]} {options.run} ...")
    if not options.out:
        raise UserError("name the run folder to make with --out")
    if "train" in given and settings.run.task in PRETRAINING:
        raise UserError(f"--train is a file to fine-tune on; {source} is pretrained and reads --data")
    if "data" in given and settings.run.task not in PRETRAINING and getattr(chosen, "recipe", None) != "tinybert":
        raise UserError(f"--data is text to pretrain on; {source} is fine-tuned and reads --train and --valid")
    if {"steps", "epochs"} <= given:
        raise UserError("--steps and --epochs: give one of them")
    settings.data, settings.optim, settings.train, *rest = parts
    settings.task_options = rest[0] if rest else settings.task_options
    if "steps" in given:
        settings.train.epochs = 0.0
    if "schedule" in field_names(recipe):  # then the flag of this name is the recipe's
        settings.optim.schedule = HEAL["schedule"]
    settings.run.out, settings.run.overwrite, settings.given = options.out, options.overwrite, given
    setattr(settings, name, chosen)
    return settings


def published_config(model: nn.Module) -> runs.RunConfig:
    """What published weights can be judged by, and trained for."""
    config = model.config
    heads = {"classify": config.n_classes, "qa": config.spans, "mlm": config.mlm, "lm": model.kind == "gpt"}
    task = next((name for name, has in heads.items() if has), None)
    if task is None:
        raise UserError("these weights have no head, so nothing tells how good they are: fine-tune them first")
    options = TASK_CONFIGS[task]() if task in TASK_CONFIGS else None
    if task == "mlm":
        options.nsp = config.nsp
    optim, training = OptimConfig(**{k: FINETUNE[k] for k in ("optimizer", "lr", "weight_decay")}), TrainConfig()
    return runs.RunConfig(model.kind, task, config, DataConfig(), optim, training, options)


def make_world(options: TrainConfig) -> World:
    """The processes and their device; refuses a batch that cannot be shared out, before any work is done."""
    world = World(options.device)
    part_size(options, world)
    return world


def open_task(settings: Settings, world: World) -> tuple:
    """Text -> tokens -> the examples of each step, with the loss and the figures they are for: (task, tokenizer).

    The tokenizer is that of --init, or without one that of --tokenizer; a BPE is trained on the texts to learn from.
    """
    name, data, model, options = settings.run.task, settings.data, settings.model, settings.task_options
    tokenizer, special = settings.tokenizer, SPECIAL[settings.kind]
    if name in PRETRAINING:
        folder, tokenizer = world.main_first(
            lambda: prepare_tokens(data, model.vocab_size, tokenizer, settings.given, special)
        )
        common = folder.train, folder.valid, tokenizer, model.max_len, settings.train.seed
        if name == "lm":
            return tasks.LanguageModelling(LMWindows(*common), tokenizer), tokenizer
        return tasks.MaskedLanguageModelling(MaskedSentences(*common, options), tokenizer), tokenizer

    if name == "qa" and not data.train and not data.valid:
        data.train = data.valid = "python-docs"
    if not data.train or not data.valid:
        raise UserError(f"--task {name} needs --train FILE and --valid FILE")
    texts = {
        "classify": lambda: column_texts(data.train, ["text"], ("text_b",)),
        "pairs": lambda: column_texts(data.train, ["prompt", "answer"]),
        "qa": lambda: squad_texts(data.train),
    }[name]
    if not tokenizer:
        tokenizer = make_tokenizer(data.tokenizer, texts, model.vocab_size, special)
    common = data.train, data.valid, tokenizer, model.max_len, settings.train.seed, settings.train.batch_size
    if name == "classify":
        return tasks.Classification(LabelledTexts(*common, options)), tokenizer
    if name == "qa":
        return tasks.QuestionAnswering(QuestionAnswers(*common, options)), tokenizer
    return tasks.Answering(PromptAnswers(*common), tokenizer), tokenizer


def open_own_task(settings: Settings, world: World) -> tuple:
    """The task that the model of --init has learnt already: its classes have to be those of the data."""
    task, tokenizer = open_task(settings, world)
    n, source = settings.model.n_classes, settings.run.init
    if len(task.labels) != n or (settings.labels and list(task.labels) != settings.labels):
        knows = ", ".join(settings.labels) or f"{n} classes without names"
        raise UserError(f"{settings.data.train} has the labels {', '.join(task.labels)}, but {source} knows {knows}")
    return task, tokenizer


def make_model(settings: Settings, task, tokenizer: Tokenizer, **heads) -> nn.Module:
    """The model with these heads, its weights fresh from the seed or those of --init."""
    labels = task.labels
    heads["n_classes"] = len(labels)
    if not settings.start:
        heads["vocab_size"] = tokenizer.vocab_size
    settings.model = dataclasses.replace(settings.model, **heads)
    runs.check_vocabulary(settings.model, tokenizer, settings.run.init or settings.data.tokenizer)
    torch.manual_seed(settings.train.seed)
    model = runs.MODELS[settings.kind](settings.model)
    if settings.quant:
        quant.prepare(model, quant.ranges_of(weights(settings.start)))
    if settings.start:
        runs.start_from(model, settings.start, settings.run.init, keep_classes=labels == settings.labels)
    return model


def run_compressed(s: Settings, task, tokenizer: Tokenizer, world: World) -> None:
    """Trains what compress.py has made of a run, s.start, and says how good that run was."""
    known = {} if runs.is_published(s.run.init) else runs.read_result(Path(s.run.init)) or {}
    before = {name: value for name, value in known.items() if name in SHOWN}
    world.say(f"Before, {s.run.init}: {describe(before)}" if before else f"From {s.run.init}")
    s.model = s.start.config
    torch.manual_seed(s.train.seed)
    run(s, s.start, task, tokenizer, world)


def run(settings: Settings, model: nn.Module, task, tokenizer: Tokenizer, world: World) -> None:
    """Trains in the run folder, new or going on, and says how it went."""
    s = settings
    config = runs.RunConfig(
        s.kind, s.run.task, s.model, s.data, s.optim, s.train, s.task_options, s.run.init, list(task.labels),
        task.data.checksum, s.prune, s.reduce, s.distill, s.quant,
    )  # fmt: skip
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
    if locked:
        locked.close()
    world.wait()


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
    if "sparsity" in result:
        lines.append(f"{result['sparsity']:.2%} of the weights in pruned matrices are zero")
    if "bytes" in result:
        lines.append(f"{result['parameters']:,} parameters in {result['bytes']:,} bytes")
    if result["steps"]:
        share = f", {result['mfu']:.0%} of this device's {result['dtype']} matmul speed" if "mfu" in result else ""
        lines.append(
            f"{result['steps']:,} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s "
            f"({result['tokens_per_s']:,.0f} tokens/s while training{share})"
        )
    return "\n".join(lines)
