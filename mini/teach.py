"""From a teacher's run to a student's: one lesson, or the four steps of TinyBERT (Jiao et al. 2020, §3.2).

teach() trains a student by the losses of --recipe. tinybert() begins with general distillation of the pretrained
teacher; the second step, fine-tuning the teacher, is behind it; the third and fourth distil that one on its task.
"""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from mini import distill, rewrite, runs
from mini.config import DataConfig, UserError
from mini.devices import World, pick_dtype
from mini.start import Settings, open_own_task, open_run, run_compressed
from mini.tokenizer import load_tokenizer
from mini.train import describe, evaluate

EVALUATION_BATCH = 32
PREDICTIONS = dict(recipe="hinton", soft=1.0, hard=0.0, temperature=1.0)  # TinyBERT's last step (eq. 10)


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
    if lesson.cache is not None:
        world.say(
            f"The teacher's answers are kept in {lesson.cache.folder}: {lesson.cache.batches():,} batches are there"
        )
    if not examined:
        examine(s, task, world)
    run_compressed(dataclasses.replace(s, start=student, quant=None), lesson, tokenizer, world)


def examine(s: Settings, task, world: World) -> None:
    """Refuses a teacher that has nothing to teach; where training has begun, it has been looked at."""
    out = Path(s.run.out)
    if runs.checkpoints(out) or runs.read_result(out):
        return
    dtype = pick_dtype(s.train.dtype, world.device)
    teacher = s.start.to(world.device)
    figures = evaluate(teacher, task, world, dtype, EVALUATION_BATCH, s.train.eval_tokens)
    teacher.eval()
    world.say(f"The teacher: {describe(figures)}")
    if not task.beats_chance(figures):
        raise UserError(f"{s.run.init} is no better than chance at this task: there is nothing to learn from it")


def going_on(s: Settings, init: str) -> nn.Module:
    """The student that another run has made, with heads for this teacher's task: fresh where it has not learnt it."""
    start, teacher = runs.load_model(init, s.kind), s.start
    if load_tokenizer(init).fingerprint != s.tokenizer.fingerprint:
        raise UserError(f"--init {init}: it has another tokenizer than {s.run.init}")
    heads = ("n_classes", "spans", "mlm", "nsp", "pooler", "pooling", "dropout")
    config = dataclasses.replace(start.config, **{name: getattr(teacher.config, name) for name in heads})
    if config.positions != "learned" or config.max_len > teacher.config.max_len:
        config.max_len = teacher.config.max_len
    student = type(teacher)(config)
    runs.start_from(student, start, init, keep_classes=runs.read_labels(init) == s.labels)
    return student


# ---------------------------------------------------------------- TinyBERT
def tinybert(s: Settings, world: World) -> None:
    """Three runs, none of which is repeated once it is finished:

    OUT-general    a student of the pretrained teacher, on its own plain text: embeddings, hidden states, attention
    OUT-layers     the same of the fine-tuned teacher, on the task's texts and copies of them (OUT-augmented)
    OUT            its predictions, at the temperature 1
    """
    out, options = s.run.out, s.distill
    copies = options.copies if s.run.task == "classify" else 0
    general = None if options.init and not copies else general_settings(s)
    if copies and getattr(general.start, "mlm", None) is None:
        world.say(f"note: {general.run.init} has no head for masked tokens, so texts are not written anew")
        copies = 0
    layers = dataclasses.replace(s, run=dataclasses.replace(s.run, out=f"{out}-layers"))
    answers = dataclasses.replace(s)
    layers.distill = dataclasses.replace(options, init=options.init or f"{out}-general")
    answers.distill = dataclasses.replace(options, init=layers.run.out, **PREDICTIONS)
    task, _ = open_own_task(s, world)
    if options.init:
        going_on(s, options.init)  # refuses what does not fit
    examine(layers, task, world)

    if not options.init:
        world.say(f"\nTinyBERT: general distillation, {general.run.out}")
        teach(general, world)
    if copies:
        layers.data = answers.data = written_anew(s, general, copies, world)
    world.say(f"\nTinyBERT: the teacher's embeddings, layers and attention on the task, {layers.run.out}")
    teach(layers, world, examined=True)
    world.say(f"\nTinyBERT: its predictions, {out}")
    teach(answers, world, examined=True)


def general_settings(s: Settings) -> Settings:
    """The first step's: the run that the teacher was fine-tuned from, and what that was trained with."""
    options = s.distill
    source = options.general or runs.init_of(s.run.init)
    if not source:
        raise UserError(f"{s.run.init}: name the pretrained run that it was fine-tuned from with --general")
    general = open_run(source, s.run.init if runs.is_published(source) else None)
    if general.run.task not in ("lm", "mlm"):
        raise UserError(f"--general {source} is fine-tuned itself: name the pretrained run that the teacher came from")
    if general.tokenizer.fingerprint != s.tokenizer.fingerprint:
        raise UserError(f"--general {source}: it has another tokenizer than {s.run.init}")
    mine, theirs = (distill.student_config(model.config, options) for model in (general.start, s.start))
    for name in ("n_layers", "n_heads", "d_model", "d_ff"):
        if getattr(mine, name) != getattr(theirs, name):
            raise UserError(f"--general {source}: its {name} is not that of {s.run.init}, nor its student's")
    general.run.out, general.run.overwrite = f"{s.run.out}-general", s.run.overwrite
    general.distill = dataclasses.replace(options)
    general.train = dataclasses.replace(general.train, seed=s.train.seed, device=s.train.device, dtype=s.train.dtype)
    if options.general_steps:
        general.train = dataclasses.replace(general.train, steps=options.general_steps, epochs=0.0)
    return general


def written_anew(s: Settings, general: Settings, copies: int, world: World) -> DataConfig:
    """The task's data with copies of its texts, by the pretrained teacher's head for masked tokens."""
    source = Path(s.data.train)
    path = Path(f"{s.run.out}-augmented{source.suffix}")
    if world.main and (s.run.overwrite or not Path(f"{s.run.out}-layers").exists()):
        path.unlink(missing_ok=True)  # made with other settings, perhaps

    def make() -> None:
        if not path.exists():
            options = rewrite.RewriteConfig(copies=copies, seed=s.train.seed)
            n = rewrite.rewrite(source, path, general.start.to(world.device), s.tokenizer, options)
            world.say(f"{path}: {n:,} texts, of which {copies} in {copies + 1} are written anew")

    world.main_first(make)
    return dataclasses.replace(s.data, train=str(path))
