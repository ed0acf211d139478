"""The project's own side of its speed figures, measured by running the real loop and the real generate()."""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mini.compression.distill import RECIPES, Distillation, DistillConfig, make_student
from mini.flags import Checked, UserError, option
from mini.model.config import ModelConfig
from mini.model.gpt import GPT
from mini.model.transformer import Model
from mini.presets import GPT_PRESETS, model_preset
from mini.storage import atomic_file
from mini.tasks import TASKS
from mini.tasks.base import Task
from mini.tasks.masked import MLMConfig
from mini.text.corpus import DataConfig, open_corpus
from mini.text.tokenizer import ByteTokenizer, train_bpe
from mini.text.tokens import BPE_BYTES, TokenFile, write_tokens
from mini.training.checkpoints import read_metrics
from mini.training.devices import autocast, can_compile, device_name, peak_memory, pick_dtype
from mini.training.loop import TrainConfig, train
from mini.training.optim import OptimConfig
from mini.training.ranks import World
from mini.training.runs import MODELS
from mini.training.speed import call_times, matmul_speed

PROMPT = 8  # tokens that a generation goes on from
WHAT = ("all", "train", "generate", "mlm", "distill", "tokens", "gpu")
ON_GPUS = ("gpt2", "bert-base")  # presets


@dataclass
class BenchOptions(Checked):
    """Measure training, generation and tokenization. The sizes of the model are flags, its text is random."""

    what: str = option("all", "all: train, generate; mlm: a BERT's training; tokens: of --data; gpu: two presets", WHAT)
    batch_size: int = option(8, "sequences of a training step", low=1)
    steps: int = option(40, "training steps; the first quarter warms up", low=20)
    batches: str = option("1,8", "batch sizes to generate with")
    new_tokens: int = option(128, "tokens to generate greedily for each prompt", low=1)
    repeats: int = option(5, "generations, of which the median counts", low=1)
    optimizer: str = option("adamw", "of the training", ("adamw", "muon"))
    data: str = option("tinyshakespeare", "the text of tokens: a file, a folder or a known corpus")
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: str = option("auto", "as in training", ("auto", "bfloat16", "float16", "float32"))
    compile: str = option("auto", "torch.compile; auto: for generation, and on GPUs", ("auto", "true", "false"))
    profile: str = option(
        "", "a folder for trace.json (gpu: PRESET.json), for chrome://tracing, of five steps; prints the dearest calls"
    )

    def __post_init__(self):
        super().__post_init__()
        if not all(part.isdigit() and int(part) for part in self.batches.split(",")):
            raise UserError(f"--batches {self.batches}: expected numbers such as 1,8")


def bench(options: BenchOptions, config: ModelConfig) -> None:
    """Prints a line for each figure, then all of them as one JSON object."""
    if options.what in ("all", "generate") and config.max_len < options.new_tokens + PROMPT:
        new = f"--new_tokens {options.new_tokens} and a prompt of {PROMPT}"
        raise UserError(f"{new} do not fit --max_len {config.max_len}")
    if options.profile and options.what not in ("all", "train", "mlm", "gpu"):
        raise UserError(f"--profile: of a training, not of --what {options.what}")
    if options.profile:
        Path(options.profile).mkdir(parents=True, exist_ok=True)
    world = World(options.device)
    if options.what == "gpu" and options.device == "auto" and not world.on_gpu:
        raise UserError(
            "--what gpu: PyTorch finds no NVIDIA GPU here (--device cpu would take hours; --what train is quick)"
        )
    dtype = pick_dtype(options.dtype, world.device)
    figures = {
        "device": f"{world.device} ({device_name(world.device)}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_gflops": round(matmul_speed(world.device, dtype) / 1e9),
    }
    world.say(", ".join(f"{key} {value}" for key, value in figures.items()))
    parts = dict(train=training, mlm=training, generate=generation, distill=distillation_cost, tokens=tokenization,
                 gpu=presets_speed)  # fmt: skip
    for name in ("train", "generate") if options.what == "all" else (options.what,):
        found = parts[name](options, config, world)
        world.say(", ".join(f"{k} {v:,.0f}" if v > 99 else f"{k} {v:.3g}" for k, v in found.items()))
        figures |= found
    print(json.dumps(figures))


def random_task(options: BenchOptions, config: ModelConfig) -> tuple[Task, Model]:
    """The pretraining task of the model on random tokens."""
    rng = np.random.default_rng(0)
    n_tokens = (options.steps * options.batch_size + 1) * config.max_len
    firsts = np.arange(0, n_tokens, 20, dtype=np.uint64)  # sentences of 20 tokens, documents of 40 sentences
    ids = rng.integers(0, min(256, config.vocab_size), n_tokens).astype(np.uint32)
    train = TokenFile(ids, firsts[::40], firsts, n_tokens, "")
    valid = replace(train, tokens=ids[:1600], documents=firsts[:80:40], sentences=firsts[:80])
    name, kind = ("mlm", "bert") if options.what == "mlm" else ("lm", "gpt")
    own = MLMConfig(short_rate=0.0) if name == "mlm" else None
    tokenizer = ByteTokenizer().with_special(MODELS[kind].special_tokens)
    task = TASKS[name](train, valid, tokenizer, config.max_len, 0, options.batch_size, own)
    return task, MODELS[kind](replace(config, **task.heads()))


def training(options: BenchOptions, config: ModelConfig, world: World) -> dict:
    """Tokens/s, and the share of the matmul speed."""
    rate, share, _ = training_speed(options, *random_task(options, config), world)
    if options.profile:
        profile_training(options, config, world, "trace")
    return {"train_tokens_per_s": rate, "train_mfu": share}


def presets_speed(options: BenchOptions, config: ModelConfig, world: World) -> dict:
    """The training of presets of their full size: tokens/s, share of the device's matmul speed, memory in MB."""
    figures = {}
    for name in ON_GPUS:
        config, what = model_preset(name), "train" if name in GPT_PRESETS else "mlm"
        asked = replace(options, what=what)
        found = training_speed(asked, *random_task(asked, config), world)
        of = ("tokens_per_s", "mfu", "memory_mb")
        figures |= {f"{name}_{figure}": value for figure, value in zip(of, found, strict=True)}
        if options.profile:
            profile_training(asked, config, world, name)
    return figures


def profile_training(options: BenchOptions, config: ModelConfig, world: World, name: str) -> None:
    """Writes what each call of five more steps took, and prints the ten that took most by themselves."""
    out, kinds = Path(options.profile) / f"{name}.json", [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] * world.on_gpu
    with profile(activities=kinds) as watched:
        training_speed(options, *random_task(options, config), world, steps=5)
    with atomic_file(out) as temporary:
        watched.export_chrome_trace(str(temporary))
    calls, own = watched.key_averages(), "self_cpu_time_total"
    if world.on_gpu:  # its kernels alone: what calls them has their times too
        own = "self_device_time_total"
        calls = [call for call in calls if call.device_type == DeviceType.CUDA and not call.is_user_annotation]
    calls = sorted(calls, key=lambda call: -getattr(call, own))
    total = sum(getattr(call, own) for call in calls)
    world.say(f"{out}; of {total / 1e6:.3g} s in five steps and a judging, by themselves:")
    for call in calls[:10]:
        spent = getattr(call, own)
        world.say(f"  {spent / total:6.1%} {spent / 1e3:10,.1f} ms  {call.count:7,} x {call.key[:80]}")


def training_speed(options: BenchOptions, task: Task, model: Model, world: World, objective: object = None,
                   steps: int = 0) -> tuple:  # fmt: skip
    """Medians of the loop's own log lines after the warm-up: tokens/s, share of the device's matmul speed; MB."""
    loop = TrainConfig(
        steps=steps or options.steps, batch_size=options.batch_size, device=options.device, dtype=options.dtype,
        compile=options.compile, eval_every=0, sample_every=0, checkpoint_every=0, log_every=5,
    )  # fmt: skip
    optim = OptimConfig(optimizer=options.optimizer, lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        memory = train(model, task, loop, optim, Path(folder), world, objective)["memory_mb"]
        rows = [row for row in read_metrics(Path(folder)) if row["step"] > loop.steps // 4]
    return *(statistics.median(row.get(name, 0) for row in rows) for name in ("tokens_per_s", "mfu")), memory


def distillation_cost(options: BenchOptions, config: ModelConfig, world: World) -> dict:
    """ms of a step of a student of half the layers alone, of its teacher's forward pass, and of each recipe's step.

    The ratios are (a recipe's step - the teacher's forward pass) / the student's step alone.
    """
    task, teacher = random_task(options, config)
    teacher.to(world.device).eval()
    dtype = pick_dtype(options.dtype, world.device)
    numbers = np.arange(options.steps * options.batch_size).reshape(options.steps, -1)
    batches = iter([task.batch(row).to(world.device) for row in numbers])

    @torch.no_grad()
    def forward() -> None:
        with autocast(world.device, dtype):
            teacher.answers(next(batches).inputs)

    figures = {"teacher_ms": 1000 * statistics.median(call_times(forward, options.steps, world.device))}
    for name, recipe in {"plain": DistillConfig(alpha=0.0), **{name: DistillConfig(name) for name in RECIPES}}.items():
        student = make_student(teacher, recipe)
        speed, *_ = training_speed(options, task, student, world, Distillation(task, student, teacher, recipe))
        figures[f"{name}_ms"] = 1000 * options.batch_size * config.max_len / speed
    for name in RECIPES:
        figures[name] = (figures[f"{name}_ms"] - figures["teacher_ms"]) / figures["plain_ms"]
    return figures


def generation(options: BenchOptions, config: ModelConfig, world: World) -> dict:
    """New tokens per second over the whole batch, greedy, with the cache, the weights stored in --dtype.

    Where the hardware has no bfloat16, single tokens are computed in float32 from weights stored in bfloat16.
    """
    figures = {}
    compiled = options.compile != "false" and can_compile(world.device, world.say)
    for batch in map(int, options.batches.split(",")):
        torch.manual_seed(0)
        model = GPT(config).to(world.device, pick_dtype(options.dtype, world.device)).eval()
        prompt = torch.randint(config.vocab_size, (batch, PROMPT), device=world.device)
        if compiled and batch == 1 and options.dtype == "auto" and not world.on_gpu:
            model.store(torch.bfloat16)
        world.say(f"weights of batch {batch} are stored in {model.head.weight.dtype}")
        generate = partial(model.generate, prompt, options.new_tokens, compile=compiled)
        times = call_times(generate, 1 + options.repeats, world.device)[1:]  # the first warms up
        figures[f"generate_tokens_per_s_batch_{batch}"] = batch * options.new_tokens / statistics.median(times)
    return figures


def tokenization(options: BenchOptions, config: ModelConfig, world: World) -> dict:
    """BPE training and encoding of --data, nothing cached, and the most memory this process ever held."""
    train_split, valid_split = open_corpus(DataConfig(options.data))
    start = time.perf_counter()
    tokenizer = train_bpe(train_split.texts(limit=BPE_BYTES), config.vocab_size)
    trained = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        write_tokens({"train": train_split, "valid": valid_split}, tokenizer, Path(out) / "tokens")
    seconds = time.perf_counter() - trained
    return {
        "bpe_training_seconds": trained - start,
        "encoding_mb_per_s": (train_split.n_bytes + valid_split.n_bytes) / 1e6 / seconds,
        "peak_memory_mb": peak_memory(torch.device("cpu")),
    }
