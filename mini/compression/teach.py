"""From a teacher's run to a student's.

teach() trains a student by the losses of --recipe. tinybert() begins with general distillation of the pretrained
teacher; the second step, fine-tuning the teacher, is behind it; the third and fourth distil that one on its task.
"""

import dataclasses
from pathlib import Path

import torch

from mini.compression import distill, rewrite
from mini.compression.distill import DistillConfig
from mini.errors import UserError
from mini.model.transformer import Model
from mini.storage import sha256
from mini.tasks.base import Task
from mini.tensors import digest_tensors, weights
from mini.text.corpus import DataConfig
from mini.text.tokenizer import load_tokenizer
from mini.training import checkpoints, runs
from mini.training.devices import pick_dtype
from mini.training.loop import describe, evaluate, micro_batch_size
from mini.training.ranks import World
from mini.training.start import Settings, open_own_task, open_run, train_run

STUDENT = ("student", "start", "n_layers", "n_heads", "d_model", "d_ff")  # flags that say what the student is
INSIDE = (*STUDENT, "layer_map", "embedding", "hidden", "attention")  # what TinyBERT's first and third step read


def check(s: Settings, options: DistillConfig) -> None:
    """Refuses flags that have no effect, and a student that does not fit its teacher, before anything is computed."""
    if not s.task.teaches:
        raise UserError(f"{s.job.init} has no head, so it has no answers to learn from: fine-tune it first")
    weights = options.weights()
    in_steps = options.recipe == "tinybert" and not s.task.pretrains
    others = ("soft", "alpha", "cosine", "relations", "relation_heads", "cache")
    outside = "it is for --recipe tinybert of a fine-tuned run, or with --train and --valid of a pretrained one"
    without_effect = [  # the flags, when, and why
        (others, in_steps, "tinybert has losses of its own"),
        (("general", "general_steps", "copies"), not in_steps, outside),
        (("layer_map",), not in_steps and not options.between_layers, "no loss between layers has a weight"),
        (("temperature", "cache"), not in_steps and not weights["soft"], "the soft targets have no weight"),
        (("relation_heads",), not weights["relations"], "--relations has no weight"),
        (STUDENT, options.init, f"the student is that of --init {options.init}"),
        (("general_steps",), options.init, "--init stands for the first step"),
        (("top_k",), not options.cache, "it is for --cache"),
    ]
    for names, here, why in without_effect:
        if here and (given := s.given.intersection(names)):
            raise UserError(f"--{min(given)} has no effect here: {why}; leave it out")
    if options.cache and Path(options.cache).exists() and not Path(options.cache).is_dir():
        raise UserError(f"--cache {options.cache}: is a file; name a folder")
    if not s.train.trains:
        raise UserError(f"{s.job.init} was made without training, so say how long the student learns with --steps")
    teacher = s.source.config
    student = going_on(s, options.init).config if options.init else distill.student_config(teacher, options)
    if not options.init:
        distill.first_layers(teacher, options)
    distill.matched_layers(student, teacher, options)


def teach(s: Settings, options: DistillConfig, world: World, examined: bool = False) -> None:
    """Trains a student of s.source. examined: the teacher is known to have something to teach."""
    teacher = s.source
    s.compression = {"distill": dataclasses.asdict(options)}
    if s.quant:  # whole numbers, from which nothing goes on learning
        if options.start not in ("auto", "random"):
            raise UserError(f"--start {options.start}: {s.job.init} is quantized, so its student begins at random")
        options = dataclasses.replace(options, start="random")
    torch.manual_seed(s.train.seed)
    student = going_on(s, options.init) if options.init else distill.make_student(teacher, options)
    task = open_own_task(s, world)
    lesson = distill.Distillation(task, student, teacher.to(world.device), options)
    if not examined:
        examine(s, task, world)
    world.say(about(lesson, student, options))
    s = dataclasses.replace(s, source=student, model=student.config, quant=None)
    torch.manual_seed(s.train.seed)
    train_run(s, student, task, world, objective=lesson)


def about(lesson: distill.Distillation, student: Model, options: DistillConfig) -> str:
    """What a person should know of the student before it learns."""
    begins = f"as {options.init} is" if options.init else "at random"
    if not options.init and (keep := distill.first_layers(lesson.teacher.config, options)):
        begins = f"with the teacher's layers {', '.join(map(str, keep))}"
    c = student.config
    lines = [f"The student: {c.n_layers} layers, n_heads {c.n_heads}, d_model {c.d_model}; it begins {begins}"]
    if lesson.pairs:
        lines.append("Layers, teacher:student: " + ", ".join(f"{t}:{m}" for m, t in lesson.pairs))
    if lesson.cache is not None:
        kept = f"The teacher's answers are kept in {lesson.cache.folder}"
        lines.append(f"{kept}: {lesson.cache.batches():,} batches are there")
    if not lesson.losses:
        lines.append("note: no loss has a teacher, so this is training without one")
    elif not (lesson.default_weight or "soft" in lesson.losses):
        lines.append("note: no loss here teaches the head, so the task's figures say little yet")
    return "\n".join(lines)


def examine(s: Settings, task: Task, world: World) -> None:
    """Refuses a teacher that has nothing to teach; where training has begun, it has been looked at."""
    out = Path(s.job.out)
    if world.agree(not s.job.overwrite and bool(checkpoints.checkpoints(out) or checkpoints.read_result(out))):
        return
    if not runs.is_published(s.job.init) and not checkpoints.read_result(Path(s.job.init)):
        world.say(f"note: {s.job.init} is unfinished")
    dtype = pick_dtype(s.train.dtype, world.device)
    figures = evaluate(s.source.to(world.device), task, world, dtype, 32, s.train.eval_tokens)
    s.source.eval()
    world.say(f"The teacher: {describe(figures)}")
    if not task.beats_chance(figures):
        raise UserError(f"{s.job.init} is no better than chance at this task: there is nothing to learn from it")


def going_on(s: Settings, init: str) -> Model:
    """The student that another run has made, with heads for this teacher's task: fresh where it has not learnt it."""
    begun, teacher = runs.load_model(init, s.kind), s.source.config
    if not runs.is_published(init) and runs.read_config(init).quant:
        raise UserError(f"--init {init}: is int8, from which no student goes on; start from the run it was made of")
    if load_tokenizer(init).fingerprint != s.tokenizer.fingerprint:
        raise UserError(f"--init {init}: it has another tokenizer than {s.job.init}")
    if begun.config.vocab_size != teacher.vocab_size:
        sizes = f"it knows {begun.config.vocab_size:,} tokens, {s.job.init} {teacher.vocab_size:,}"
        raise UserError(f"--init {init}: {sizes}; they have to be as many")
    if begun.config.positions == "learned" and begun.config.max_len < teacher.max_len:
        sizes = f"learned positions for {begun.config.max_len} tokens only, {s.job.init} for {teacher.max_len}"
        raise UserError(f"--init {init}: it has {sizes}")
    same = {f.name for f in dataclasses.fields(teacher) if f.metadata.get("head")} | {"pooling", "dropout", "max_len"}
    student = type(begun)(dataclasses.replace(begun.config, **{name: getattr(teacher, name) for name in same}))
    runs.copy_weights(student, begun, init, keep_classes=runs.read_labels(init) == s.labels)
    return student


# ---------------------------------------------------------------- TinyBERT
def tinybert(s: Settings, options: DistillConfig, world: World) -> None:
    """Three runs, none of which is repeated once it is finished:

    OUT-general    a student of the pretrained teacher, on its own plain text: embeddings, hidden states, attention
    OUT-layers     the same of the fine-tuned teacher, on the task's texts and copies of them (OUT-augmented-..)
    OUT            its predictions, at the temperature 1
    """
    out, copies = s.job.out, options.copies if s.labels else 0
    general = None if options.init and not copies else general_settings(s, options)
    if copies and getattr(general.source, "mlm", None) is None:
        world.say(f"note: {general.job.init} has no head for masked tokens, so texts are not written anew")
        copies = 0
    layers = dataclasses.replace(s, job=dataclasses.replace(s.job, out=f"{out}-layers"))
    answers = dataclasses.replace(s)
    inside = DistillConfig(recipe="tinybert", **{name: getattr(options, name) for name in INSIDE})
    further = dataclasses.replace(inside, init=options.init or f"{out}-general")
    temperature = options.temperature if "temperature" in s.given else 1.0
    predictions = DistillConfig(soft=1.0, hard=options.hard or 0.0, temperature=temperature, init=layers.job.out)
    steps = [] if options.init else [(general, inside)]
    for step, recipe in [*steps, (layers, further), (answers, predictions)]:
        micro_batch_size(step.train, world)
        if Path(step.job.out, "config.json").exists() and not s.job.overwrite:
            there = runs.read_config(step.job.out)
            if (there.distill, there.init) != (dataclasses.asdict(recipe), step.job.init):
                raise UserError(
                    f"{step.job.out} holds another run: give --overwrite true, or another --out (there, "
                    f"--init {out}-general goes on from the first step, if the student is the same)"
                )
    examine(layers, open_own_task(s, world), world)

    if not options.init:
        world.say(f"\nTinyBERT, step 1 of 4: general distillation, {general.job.out}")
        teach(general, inside, world)
    world.say(f"\nTinyBERT, step 2 of 4: the fine-tuned teacher is {s.job.init}")
    if copies:
        layers.data = answers.data = with_copies(s, general, copies, world)
    world.say(f"\nTinyBERT, step 3 of 4: its embeddings, layers and attention on the task, {layers.job.out}")
    teach(layers, further, world, examined=True)
    world.say(f"\nTinyBERT, step 4 of 4: its predictions, {out}")
    teach(answers, predictions, world, examined=True)


def general_settings(s: Settings, options: DistillConfig) -> Settings:
    """The first step's: the run that the teacher was fine-tuned from, and what that was trained with."""
    named = s.data.tokenizer if "tokenizer" in s.given else s.job.init  # for published weights that come without one
    source = options.general or runs.init_of(s.job.init)
    while source and not (general := open_run(source, named if runs.is_published(source) else None)).task.pretrains:
        if options.general:
            raise UserError(f"--general {source} is fine-tuned itself: name the pretrained run that it came from")
        source = runs.init_of(source)  # of a run that was pruned, say
    if not source:
        raise UserError(f"{s.job.init}: name the pretrained run that it was fine-tuned from with --general")
    if general.tokenizer.fingerprint != s.tokenizer.fingerprint:
        raise UserError(f"--general {source}: it has another tokenizer than {s.job.init}")
    for name in ("n_layers", "n_heads", "d_model", "d_ff"):
        if getattr(general.source.config, name) != getattr(s.source.config, name):
            raise UserError(f"--general {source}: its {name} is not that of {s.job.init}")
    general.job.out, general.job.overwrite = f"{s.job.out}-general", s.job.overwrite
    general.given = s.given & {"data", "valid_fraction", "separator", "errors"}
    general.data = dataclasses.replace(general.data, **{name: getattr(s.data, name) for name in general.given})
    loop = {name: getattr(s.train, name) for name in ("seed", "device", "dtype", "accumulation")}
    if options.general_steps:
        loop |= dict(steps=options.general_steps, epochs=0.0)
    general.train = dataclasses.replace(general.train, **loop)
    if not general.train.trains:
        raise UserError(f"{source} was made without training: say how long the first step is with --general_steps")
    return general


def with_copies(s: Settings, general: Settings, copies: int, world: World) -> DataConfig:
    """The task's data with copies of its texts, by the pretrained teacher's head for masked tokens."""
    source, options = Path(s.data.train), rewrite.RewriteConfig(copies=copies, seed=s.train.seed)
    made_of = digest_tensors(weights(general.source), sha256(source), str(options))
    path = Path(f"{s.job.out}-augmented-{made_of[:8]}{source.suffix}")

    def make() -> None:
        if not path.exists():
            n = rewrite.rewrite(source, path, general.source.to(world.device), s.tokenizer, options)
            world.say(f"{path}: {n:,} texts, of which {copies} in {copies + 1} are written anew")

    world.main_first(make)
    return dataclasses.replace(s.data, train=str(path))
