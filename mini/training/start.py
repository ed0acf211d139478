"""From a command line to a finished run: the steps that train_gpt.py, train_bert.py and compress.py share."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from mini.flags import Checked, UserError, field_names, nearest, option, parse_flags, peek
from mini.model import int8, sparse
from mini.model.config import OF_TRANSFORMERS, ModelConfig
from mini.model.transformer import Model
from mini.tasks import TASKS
from mini.tasks.base import Task
from mini.tensors import weights
from mini.text.corpus import DataConfig
from mini.text.tokenizer import Tokenizer, init_tokenizer, make_tokenizer
from mini.text.tokens import prepare_tokens
from mini.training import runs
from mini.training.checkpoints import drop_best, read_result
from mini.training.loop import TrainConfig, micro_batch_size, train
from mini.training.optim import OptimConfig
from mini.training.part import PartConfig, choose_part
from mini.training.ranks import World

FINETUNE = dict(optimizer="adamw", lr=1e-4, embed_lr=0.0, head_lr=0.0, schedule="linear", warmup=0.1,
                weight_decay=0.01, epochs=3.0, batch_size=32, eval_every=0, sample_every=0)  # fmt: skip
TEXT_FLAGS = {"data", "valid_fraction", "separator", "errors"}  # of text to pretrain on
MUON_FINETUNE = 0.002  # its learning rate there (docs/log.md)


@dataclass
class Job(Checked):
    """What to do, from what, and where the result goes."""

    task: str = option("", "what to learn: its flags are in the --help of that task")
    init: str | None = option(None, "a run, or a folder with published weights, to start from")
    out: str = option("", "the run folder; the same command goes on with an unfinished one")
    overwrite: bool = option(False, "delete the run in --out and begin anew")


@dataclass
class Settings:
    """What the command line said, and what it begins with."""

    kind: str  # gpt or bert
    job: Job
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    task_options: object  # of the task's Config, or None
    given: set[str]  # names of the flags that were given
    part: PartConfig = field(default_factory=PartConfig)  # what of the model of --init learns
    source: Model | None = None  # the model of --init
    tokenizer: Tokenizer | None = None  # its tokenizer; once the task is open, that of the run
    labels: list[str] = field(default_factory=list)  # its classes
    quant: dict | None = None  # the form of its matrices
    compression: dict = field(default_factory=dict)  # what compress.py does: RunConfig's field -> settings

    @property
    def task(self) -> type[Task]:
        return TASKS[self.job.task]


def read_settings(argv: list[str], description: str, kind: str, presets: dict, finetune: dict = FINETUNE) -> Settings:
    """Reads the flags. finetune: what tasks that do not pretrain have instead of a preset's values."""
    names = sorted((name for name, task in TASKS.items() if kind in task.kinds), key=lambda n: not TASKS[n].pretrains)
    name = peek(argv, "task", names[0])
    if name not in names:
        raise UserError(f"--task {name}: choose one of {', '.join(names)}{nearest(name, names)}")
    task, first = TASKS[name], next(iter(presets))
    preset = peek(argv, "preset", first)
    folder = f"out/{kind if preset == first else preset}"
    defaults = dict(task=name, out=folder if name == names[0] else f"{folder}-{name}")
    if not task.pretrains:
        defaults = finetune | defaults
    defaults |= other_optimizer(argv, presets.get(preset, {}) | defaults, task.pretrains)
    classes = [Job, ModelConfig, DataConfig, OptimConfig, TrainConfig, PartConfig, *filter(None, [task.Config])]
    description = f"{description}\n\n--task is one of {', '.join(names)}; each has flags and defaults of its own."
    objects, given = parse_flags(argv, classes, description, presets, **defaults)
    settings = Settings(kind, *objects[:5], *(objects[6:] or [None]), given, objects[5])
    if task.pretrains and (unused := given & {"train", "test"}):
        raise UserError(f"--{min(unused)} is a file to fine-tune on; --task {name} reads --data")
    if task.reads_text and not task.pretrains and (unused := given & TEXT_FLAGS):
        raise UserError(f"--{min(unused)} is of text to pretrain on; --task {name} needs --train FILE and --valid FILE")
    if not task.reads_text and (unused := given & (field_names(DataConfig) - {"tokenizer"})):
        raise UserError(f"--{min(unused)} has no effect here: --task {name} makes its examples itself; leave it out")
    if not settings.job.init and (unused := given & field_names(PartConfig)):
        raise UserError(f"--{min(unused)}: a part of what? It is for a model that has learnt already: give --init")
    if settings.model.block == "lstm" and (unused := given & OF_TRANSFORMERS):
        raise UserError(f"--{min(unused)} has no effect here: --block lstm has no attention and no MLP; leave it out")
    check_length(settings)
    if not settings.train.trains:
        raise UserError("--steps 0: must be at least 1")
    if init := settings.job.init:
        open_init(settings, init)
        if settings.train.shard and (settings.part.lora_rank or settings.quant or sparse.masks_of(settings.source)):
            raise UserError(
                "--shard: adapters, and weights that are pruned or int8, are not cut into shares; leave it out"
            )
    return settings


def other_optimizer(argv: list[str], defaults: dict, pretrains: bool, share: float = 1.0) -> dict:
    """Where --optimizer names another than the defaults do: its own learning rates, since theirs mean nothing to it."""
    mine = peek(argv, "optimizer", None)
    if mine not in ("muon", "adamw") or mine == defaults.get("optimizer", OptimConfig().optimizer):
        return {}
    usual = OptimConfig(optimizer=mine).lr if pretrains else MUON_FINETUNE if mine == "muon" else FINETUNE["lr"]
    return dict(lr=share * usual, embed_lr=0.0, head_lr=0.0)


def check_length(settings: Settings) -> None:
    """--steps, --epochs, --tokens or --flops, whichever was given."""
    if len(given := sorted({"steps", "epochs", "tokens", "flops"} & settings.given)) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: give one of them")
    for other in {"epochs", "tokens", "flops"} - set(given) if given else ():
        setattr(settings.train, other, 0.0)


def open_init(settings: Settings, init: str) -> None:
    """A run to begin with brings its shape, its tokenizer and what else it has settled; flags change the rest."""
    settings.source, settings.labels = runs.load_model(init, settings.kind), runs.read_labels(init)
    spec = settings.data.tokenizer if "tokenizer" in settings.given else None
    settings.tokenizer = init_tokenizer(init, spec, special_tokens(settings))
    shape, given = settings.source.config, settings.given
    if shape.positions == "learned" and "max_len" in given and settings.model.max_len > shape.max_len:
        raise UserError(f"--max_len {settings.model.max_len}: {init} has learned positions for {shape.max_len} tokens")
    refuse_fixed(settings.model, shape, given, init)
    settings.model = replace(shape, **{n: v for n, v in vars(settings.model).items() if n in given})
    if not runs.is_published(init):
        saved = runs.read_config(init)
        settings.quant = saved.quant
        if isinstance(saved.task_options, settings.task.Config or ()):
            refuse_fixed(settings.task_options, saved.task_options, given, init)
            fixed = {f.name for f in fields(saved.task_options) if f.metadata.get("fixed")}
            theirs = {name: getattr(saved.task_options, name) for name in fixed}
            settings.task_options = replace(settings.task_options, **theirs)


def refuse_fixed(mine, theirs, given: set[str], init: str) -> None:
    """Raises UserError for a given setting that a run has fixed for all that begins with it."""
    for f in fields(theirs):
        if f.metadata.get("fixed") and f.name in given and getattr(mine, f.name) != getattr(theirs, f.name):
            raise UserError(f"--{f.name} {getattr(mine, f.name)}: {init} has {getattr(theirs, f.name)}; leave it out")


def special_tokens(settings: Settings) -> tuple[str, ...]:
    """What the model and the task need beside text."""
    return (*runs.MODELS[settings.kind].special_tokens, *settings.task.special_tokens)


def open_run(source: str, tokenizer: str | None = None) -> Settings:
    """A run as it is, or published weights: the model, and what it was trained with and is judged by.

    tokenizer: which, for published weights that come without one.
    """
    model = runs.load_model(source)
    saved = published_config(model, source) if runs.is_published(source) else runs.read_config(source)
    settings = Settings(
        saved.kind, Job(saved.task, source), model.config, saved.data, saved.optim, saved.train, saved.task_options,
        set(), source=model, labels=runs.read_labels(source), quant=saved.quant,
    )  # fmt: skip
    settings.tokenizer = init_tokenizer(source, tokenizer, special_tokens(settings))
    runs.check_vocabulary(settings.model, settings.tokenizer, source)
    return settings


def published_config(model: Model, folder: str) -> runs.RunConfig:
    """What published weights can be judged by, and trained for."""
    name = next(name for name, task in TASKS.items() if model.kind in task.kinds and task.fits(model.config))
    options = TASKS[name].published_options(model.config, folder)
    optim = OptimConfig(**{k: FINETUNE[k] for k in ("optimizer", "lr", "weight_decay")})
    return runs.RunConfig(model.kind, name, model.config, DataConfig(), optim, TrainConfig(), options)


def make_world(options: TrainConfig) -> World:
    """The processes and their device; refuses a batch that cannot be shared out, before any work is done."""
    world = World(options.device)
    micro_batch_size(options, world)
    return world


def open_task(settings: Settings, world: World) -> Task:
    """Text -> tokens -> the examples of each step, with the losses and the figures they are for.

    settings.tokenizer is that of --init, or becomes that of --tokenizer: a BPE is trained on the texts to learn from.
    """
    task, data, model, training = settings.task, settings.data, settings.model, settings.train
    tokenizer, special = settings.tokenizer, special_tokens(settings)
    if not task.reads_text:
        train = valid = None
        tokenizer = tokenizer or make_tokenizer(data.tokenizer, lambda: task.texts(""), model.vocab_size, special)
    elif task.pretrains:
        asked = data, model.vocab_size, tokenizer, settings.given, special
        folder, tokenizer = world.main_first(lambda: prepare_tokens(*asked))
        train, valid = folder.train, folder.valid
    else:
        builtin = [name for name in task.files if not name.startswith(".")]
        if builtin and not data.train and not data.valid:
            data.train = data.valid = builtin[0]
        if not data.train:
            raise UserError(f"--task {settings.job.task} needs --train FILE and --valid FILE (or holds out a tenth)")
        train, valid = data.train, data.valid
        tokenizer = tokenizer or make_tokenizer(data.tokenizer, lambda: task.texts(train), model.vocab_size, special)
    settings.tokenizer = tokenizer
    seed = training.seed if training.data_seed is None else training.data_seed
    return task(train, valid, tokenizer, model.max_len, seed, training.batch_size, settings.task_options)


def open_test(settings: Settings, path: str, batch_size: int) -> Task:
    """The task that a run has learnt, to judge it on a file."""
    task, model, tokenizer = settings.task, settings.model, settings.tokenizer
    if not task.reads_text:
        raise UserError(f"--task {settings.job.task} has no files that it could be judged on")
    valid = path
    if task.pretrains:
        data = replace(settings.data, data=path, valid=path)
        folder, _ = prepare_tokens(data, model.vocab_size, tokenizer, set(), special_tokens(settings))
        valid = folder.valid
    labels = {"labels": settings.labels} if settings.labels else {}
    options = task.judging(settings.task_options)
    return task(None, valid, tokenizer, model.max_len, 0, batch_size, options, **labels)


def open_own_task(settings: Settings, world: World) -> Task:
    """The task that the model of --init has learnt already: its classes have to be those of the data."""
    task = open_task(settings, world)
    n, init = settings.model.n_classes, settings.job.init
    if len(task.labels) != n or (settings.labels and list(task.labels) != settings.labels):
        knows = ", ".join(settings.labels) or f"{n} classes without names"
        raise UserError(f"{settings.data.train} has the labels {', '.join(task.labels)}, but {init} knows {knows}")
    return task


def make_model(settings: Settings, task: Task) -> Model:
    """The model with the heads that the task needs, its weights fresh from the seed or those of --init."""
    heads = {f.name: f.default for f in fields(ModelConfig) if f.metadata.get("head")} | task.heads()
    if not settings.source:
        heads["vocab_size"] = settings.tokenizer.vocab_size
    settings.model = replace(settings.model, **heads)
    runs.check_vocabulary(settings.model, settings.tokenizer, settings.job.init or settings.data.tokenizer)
    torch.manual_seed(settings.train.seed)
    model = runs.MODELS[settings.kind](settings.model)
    if settings.quant:
        int8.prepare(model, int8.ranges_of(weights(settings.source)))
    if settings.source:
        same = list(task.labels) == settings.labels
        runs.copy_weights(model, settings.source, settings.job.init, keep_classes=same)
    return model


def learn(settings: Settings, world: World) -> None:
    """The whole story of a training."""
    with world.together():
        task = open_task(settings, world)  # text -> tokens -> the examples of each step
        model = make_model(settings, task)
        methods = choose_part(model, settings.part, settings.job.init) if settings.job.init else []
        train_run(settings, model, task, world, methods=methods)


def train_run(
    settings: Settings, model: Model, task: Task, world: World, objective: object = None, methods: Sequence = ()
) -> None:
    """Trains in the run's folder, new or going on, and says how it went. The rest is as train() takes it."""
    s = settings
    config = runs.RunConfig(
        s.kind, s.job.task, s.model, s.data, s.optim, s.train, s.task_options, s.part, s.job.init, list(task.labels),
        task.checksum, **({"quant": s.quant} | s.compression),
    )  # fmt: skip
    task.check(model)
    out, test = Path(s.job.out), None
    if s.data.test:
        s.labels = list(task.labels)
        test = open_test(s, s.data.test, s.train.batch_size)
        task.notes += test.notes
    with runs.claim(out, config, s.tokenizer, s.job.overwrite, world):
        result = read_result(out)
        if result:
            try:
                epilogue(task, result)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{out / 'result.json'}: not the figures of such a run ({error!r})") from None
            world.say(f"{out} is finished already: --overwrite true trains it anew, another --out trains another")
            if world.main:
                drop_best(out)  # which a kill may have left
        else:
            if sparse.masks_of(model) and not any(isinstance(method, sparse.HoldMasks) for method in methods):
                methods = [*methods, sparse.HoldMasks(model)]
            world.say(prologue(model, task, world))
            result = train(model, task, s.train, s.optim, out, world, objective, methods, test)
        if world.main:
            print("\n" + epilogue(task, result))
            # What was sharded may be too large for one process.
            sample = None if world.sharded else task.sample(runs.load_run(out, world.device)[0])
            if sample:
                print("\nA sample:\n" + "\n".join("    " + line for line in sample.splitlines()))
            if task.command:
                words = " ".join(shlex.quote(word) for word in (task.command, str(out), *task.example()))
                print(f"\nThe run is in {out}. Next: python -m mini {words}")
            print(json.dumps(result))
    world.wait()


def prologue(model: Model, task: Task, world: World) -> str:
    c = model.config
    shape = f"{c.n_layers} layers, d_model {c.d_model}, max_len {c.max_len}, vocabulary {c.vocab_size:,}"
    name = f"{type(model).__name__} with {model.num_params():,} parameters"
    processes = f"{world.size} process{'es' * (world.size > 1)} on {world.device}"
    notes = [f"note: {note}" for note in task.notes]
    learn = [p.numel() for p in model.parameters() if p.requires_grad]
    part = f"; {sum(learn):,} parameters learn" if len(learn) < len([*model.parameters()]) else ""
    return "\n".join([*notes, f"{name}: {shape}{part}", f"{task.n:,} training examples; {processes}"])


def epilogue(task: Task, result: dict) -> str:
    lines = [*task.summary(result)]
    if "best_step" in result:
        lines.append(f"These are the figures, and the weights, of step {result['best_step']:,}: the best {task.best}")
    if tests := [f"{name.removeprefix('test_')} {value:.4f}" for name, value in result.items() if name[:5] == "test_"]:
        lines.append(f"On the test file: {', '.join(tests)}")
    if "sparsity" in result:
        lines.append(f"{result['sparsity']:.2%} of the weights in pruned matrices are zero")
    lines.append(f"{result['parameters']:,} parameters in {result['bytes']:,} bytes")
    if result["steps"]:
        share = f", {result['mfu']:.0%} of this device's {result['dtype']} matmul speed" if "mfu" in result else ""
        lines.append(
            f"{result['steps']:,} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s "
            f"({result['tokens_per_s']:,.0f} tokens/s while training{share})"
        )
    return "\n".join(lines)
