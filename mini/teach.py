"""From a teacher's run to a student's.

teach() trains a student by the losses of --recipe. tinybert() begins with general distillation of the pretrained
teacher; the second step, fine-tuning the teacher, is behind it; the third and fourth distil that one on its task.
"""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from mini import distill, rewrite, runs
from mini.config import DataConfig, DistillConfig, UserError
from mini.devices import World, pick_dtype
from mini.start import PRETRAINING, Settings, open_own_task, open_run, run
from mini.storage import digest_tensors, sha256, weights
from mini.tokenizer import load_tokenizer
from mini.train import describe, evaluate, part_size

EVALUATION_BATCH = 32
SHAPE = ("student", "start", "n_layers", "n_heads", "d_model", "d_ff")
INSIDE = (*SHAPE, "layer_map", "embedding", "hidden", "attention")  # what TinyBERT's first and third step read


def check(s: Settings) -> None:
    """Refuses flags that have no effect, and a student that does not fit its teacher, before anything is computed."""
    options, four_steps = s.distill, s.distill.recipe == "tinybert" and s.run.task not in PRETRAINING
    loss_weights = options.weights()
    unused = dict.fromkeys(SHAPE, f"the student is that of --init {options.init}") if options.init else {}
    if options.init:
        unused["general_steps"] = "--init stands for the first step"
    if four_steps:
        unused |= dict.fromkeys(
            ("soft", "alpha", "cosine", "relations", "relation_heads", "cache"), "tinybert has losses of its own"
        )
    else:
        elsewhere = "it is for --recipe tinybert of a fine-tuned run, or with --train and --valid of a pretrained one"
        unused |= dict.fromkeys(("general", "general_steps", "copies"), elsewhere)
        if not any(loss_weights[name] for name in ("hidden", "attention", "relations")):
            unused["layer_map"] = "no loss between layers has a weight"
        if not loss_weights["soft"]:
            unused |= dict.fromkeys(("temperature", "cache"), "the soft targets have no weight")
        if not loss_weights["relations"]:
            unused["relation_heads"] = "--relations has no weight"
    if not options.cache:
        unused["top_k"] = "it is for --cache"
    elif Path(options.cache).exists() and not Path(options.cache).is_dir():
        raise UserError(f"--cache {options.cache}: is a file; name a folder")
    for name in sorted(s.given & unused.keys()):
        raise UserError(f"--{name} has no effect here: {unused[name]}; leave it out")
    if not (s.train.steps or s.train.epochs):
        raise UserError(f"{s.run.init} was made without training, so say how long the student learns with --steps")
    if options.init:
        student = going_on(s, options.init).config
    else:
        student = distill.student_config(s.start.config, options)
        distill.first_layers(s.start.config, options)
    distill.matched_layers(student, s.start.config, options)


def teach(s: Settings, world: World, examined: bool = False) -> None:
    """Trains a student of s.start. examined: the teacher is known to have something to teach."""
    options, teacher, source = s.distill, s.start, s.run.init
    if s.quant:  # whole numbers, from which nothing goes on learning
        if options.start not in ("auto", "random"):
            raise UserError(f"--start {options.start}: {source} is quantized, so its student begins at random")
        options = dataclasses.replace(options, start="random")
    torch.manual_seed(s.train.seed)
    student = going_on(s, options.init) if options.init else distill.make_student(teacher, options)
    task, tokenizer = open_own_task(s, world)
    lesson = distill.Distillation(task, student, teacher.to(world.device), options)
    if not examined:
        examine(s, task, world)
    world.say(about(lesson, student, options))
    s = dataclasses.replace(s, start=student, model=student.config, quant=None)
    torch.manual_seed(s.train.seed)
    run(s, student, lesson, tokenizer, world)


def about(lesson: distill.Distillation, student: nn.Module, options: DistillConfig) -> str:
    """What a person should know of the student before it learns."""
    begins = f"as {options.init} is" if options.init else "at random"
    if not options.init and (keep := distill.first_layers(lesson.teacher.config, options)):
        begins = f"with the teacher's layers {', '.join(map(str, keep))}"
    c = student.config
    lines = [f"The student: {c.n_layers} layers, n_heads {c.n_heads}, d_model {c.d_model}; it begins {begins}"]
    if lesson.pairs:
        lines.append("Layers, teacher:student: " + ", ".join(f"{t}:{m}" for m, t in lesson.pairs))
    if lesson.cache is not None:
        there = f"{lesson.cache.batches():,} batches are there"
        lines.append(f"The teacher's answers are kept in {lesson.cache.folder}: {there}")
    if not lesson.losses:
        lines.append("note: no loss has a teacher, so this is training without one")
    elif not (lesson.loss_weights["hard"] or lesson.loss_weights["soft"]):
        lines.append("note: no loss here teaches the head, so the task's figures say little yet")
    return "\n".join(lines)


def examine(s: Settings, task, world: World) -> None:
    """Refuses a teacher that has nothing to teach; where training has begun, it has been looked at."""
    out = Path(s.run.out)
    if world.agree(not s.run.overwrite and bool(runs.checkpoints(out) or runs.read_result(out))):
        return
    if not runs.is_published(s.run.init) and not runs.read_result(Path(s.run.init)):
        world.say(f"note: {s.run.init} is unfinished")
    dtype = pick_dtype(s.train.dtype, world.device)
    teacher = s.start.to(world.device)
    figures = evaluate(teacher, task, world, dtype, EVALUATION_BATCH, s.train.eval_tokens)
    teacher.eval()
    world.say(f"The teacher: {describe(figures)}")
    if not task.beats_chance(figures):
        raise UserError(f"{s.run.init} is no better than chance at this task: there is nothing to learn from it")


def going_on(s: Settings, init: str) -> nn.Module:
    """The student that another run has made, with heads for this teacher's task: fresh where it has not learnt it."""
    start, teacher = runs.load_model(init, s.kind), s.start.config
    if runs.read_quant(init):
        raise UserError(f"--init {init}: is int8, from which no student goes on; start from the run it was made of")
    if load_tokenizer(init).fingerprint != s.tokenizer.fingerprint:
        raise UserError(f"--init {init}: it has another tokenizer than {s.run.init}")
    if start.config.vocab_size != teacher.vocab_size:
        sizes = f"it knows {start.config.vocab_size:,} tokens, {s.run.init} {teacher.vocab_size:,}"
        raise UserError(f"--init {init}: {sizes}; they have to be as many")
    if start.config.positions == "learned" and start.config.max_len < teacher.max_len:
        sizes = f"learned positions for {start.config.max_len} tokens only, {s.run.init} for {teacher.max_len}"
        raise UserError(f"--init {init}: it has {sizes}")
    same = ("n_classes", "spans", "mlm", "nsp", "pooler", "pooling", "dropout", "max_len")
    student = type(start)(dataclasses.replace(start.config, **{name: getattr(teacher, name) for name in same}))
    runs.start_from(student, start, init, keep_classes=runs.read_labels(init) == s.labels)
    return student


# ---------------------------------------------------------------- TinyBERT
def tinybert(s: Settings, world: World) -> None:
    """Three runs, none of which is repeated once it is finished:

    OUT-general    a student of the pretrained teacher, on its own plain text: embeddings, hidden states, attention
    OUT-layers     the same of the fine-tuned teacher, on the task's texts and copies of them (OUT-augmented-..)
    OUT            its predictions, at the temperature 1
    """
    out, options = s.run.out, s.distill
    copies = options.copies if s.run.task == "classify" else 0
    general = None if options.init and not copies else general_settings(s)
    if copies and getattr(general.start, "mlm", None) is None:
        world.say(f"note: {general.run.init} has no head for masked tokens, so texts are not written anew")
        copies = 0
    layers = dataclasses.replace(s, run=dataclasses.replace(s.run, out=f"{out}-layers"))
    layers.distill = dataclasses.replace(inside(options), init=options.init or f"{out}-general")
    answers = dataclasses.replace(s)
    temperature = options.temperature if "temperature" in s.given else 1.0
    answers.distill = DistillConfig(soft=1.0, hard=options.hard or 0.0, temperature=temperature, init=layers.run.out)
    steps = [layers, answers] if options.init else [general, layers, answers]
    for step in steps:
        part_size(step.train, world)
        if Path(step.run.out, "config.json").exists() and not s.run.overwrite:
            there = runs.read_config(step.run.out)
            if (there.distill, there.init) != (step.distill, step.run.init):
                raise UserError(
                    f"{step.run.out} holds another run: give --overwrite true, or another --out (there, "
                    f"--init {out}-general goes on from the first step, if the student is the same)"
                )
    task, _ = open_own_task(s, world)
    examine(layers, task, world)

    if not options.init:
        world.say(f"\nTinyBERT, step 1 of 4: general distillation, {general.run.out}")
        teach(general, world)
    world.say(f"\nTinyBERT, step 2 of 4: the fine-tuned teacher is {s.run.init}")
    if copies:
        layers.data = answers.data = with_copies(s, general, copies, world)
    world.say(f"\nTinyBERT, step 3 of 4: its embeddings, layers and attention on the task, {layers.run.out}")
    teach(layers, world, examined=True)
    world.say(f"\nTinyBERT, step 4 of 4: its predictions, {out}")
    teach(answers, world, examined=True)


def inside(options: DistillConfig) -> DistillConfig:
    """What of the options TinyBERT's first and third step read."""
    return DistillConfig(recipe="tinybert", **{name: getattr(options, name) for name in INSIDE})


def general_settings(s: Settings) -> Settings:
    """The first step's: the run that the teacher was fine-tuned from, and what that was trained with."""
    options = s.distill
    named = s.data.tokenizer if "tokenizer" in s.given else s.run.init  # for published weights that come without one
    source = options.general or runs.init_of(s.run.init)
    while source:
        general = open_run(source, named if runs.is_published(source) else None)
        if general.run.task in PRETRAINING:
            break
        if options.general:
            raise UserError(f"--general {source} is fine-tuned itself: name the pretrained run that it came from")
        source = runs.init_of(source)  # of a run that was pruned, say
    else:
        raise UserError(f"{s.run.init}: name the pretrained run that it was fine-tuned from with --general")
    if general.tokenizer.fingerprint != s.tokenizer.fingerprint:
        raise UserError(f"--general {source}: it has another tokenizer than {s.run.init}")
    for name in ("n_layers", "n_heads", "d_model", "d_ff"):
        if getattr(general.start.config, name) != getattr(s.start.config, name):
            raise UserError(f"--general {source}: its {name} is not that of {s.run.init}")
    general.run.out, general.run.overwrite = f"{s.run.out}-general", s.run.overwrite
    general.distill = inside(options)
    text = {
        name: getattr(s.data, name) for name in ("data", "valid_fraction", "separator", "errors") if name in s.given
    }
    general.data, general.given = dataclasses.replace(general.data, **text), set(text)
    loop = {name: getattr(s.train, name) for name in ("seed", "device", "dtype", "accumulation")}
    if options.general_steps:
        loop |= dict(steps=options.general_steps, epochs=0.0)
    general.train = dataclasses.replace(general.train, **loop)
    if not (general.train.steps or general.train.epochs):
        raise UserError(f"{source} was made without training: say how long the first step is with --general_steps")
    return general


def with_copies(s: Settings, general: Settings, copies: int, world: World) -> DataConfig:
    """The task's data with copies of its texts, by the pretrained teacher's head for masked tokens."""
    source, options = Path(s.data.train), rewrite.RewriteConfig(copies=copies, seed=s.train.seed)
    made_of = digest_tensors(weights(general.start), sha256(source), str(options))
    path = Path(f"{s.run.out}-augmented-{made_of[:8]}{source.suffix}")

    def make() -> None:
        if not path.exists():
            n = rewrite.rewrite(source, path, general.start.to(world.device), s.tokenizer, options)
            world.say(f"{path}: {n:,} texts, of which {copies} in {copies + 1} are written anew")

    world.main_first(make)
    return dataclasses.replace(s.data, train=str(path))
