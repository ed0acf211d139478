"""Pretrain or fine-tune a GPT. Without arguments: a small one on Python's own documentation, minutes on a laptop."""

import dataclasses
import json
import math
import shlex
from pathlib import Path

import torch

from mini import runs, tasks
from mini.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunOptions,
    TrainConfig,
    UserError,
    parse_flags,
    peek,
    run_command,
)
from mini.data import (
    LabelledTexts,
    LMWindows,
    PromptAnswers,
    init_tokenizer,
    labelled_tokenizer,
    prepare_tokens,
)
from mini.devices import World
from mini.gpt import GPT
from mini.train import part_size, train

FINETUNE = dict(
    optimizer="adamw", lr=1e-4, schedule="linear", warmup=0.1, weight_decay=0.01,
    epochs=3.0, batch_size=32, eval_every=0, sample_every=0,
)  # fmt: skip
# What a run to start from has settled.
SHAPE = {"n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_ff", "vocab_size", "activation", "tied", "bias"}


def main(argv: list[str]) -> None:
    task_name = peek(argv, "task", "lm")
    preset = peek(argv, "preset", "laptop")
    name = "gpt" if preset == "laptop" else preset
    defaults = dict(out=f"out/{name}") if task_name == "lm" else FINETUNE | dict(out=f"out/{name}-{task_name}")
    classes = [RunOptions, ModelConfig, DataConfig, OptimConfig, TrainConfig]
    (run, model_config, data, optim, training), given = parse_flags(argv, classes, __doc__, "laptop", **defaults)
    if "steps" in given:
        if training.epochs and "epochs" in given:
            raise UserError("--steps and --epochs: give one of them")
        training.epochs = 0.0
    world = World(training.device)
    part_size(training, world)  # refuses a batch that cannot be shared out, before any work is done

    # A run to start from brings its model's shape and its tokenizer; flags that were given change the rest.
    start, tokenizer, start_labels = None, None, []
    if run.init:
        start, start_labels = runs.load_model(run.init, kind="gpt"), runs.read_labels(run.init)
        tokenizer = init_tokenizer(run.init, data.tokenizer if "tokenizer" in given else None)
        flags = {name: getattr(model_config, name) for name in given if hasattr(model_config, name)}
        for name in SHAPE & flags.keys():
            if flags[name] != getattr(start.config, name):
                raise UserError(f"--{name} {flags[name]}: {run.init} has {getattr(start.config, name)}; leave it out")
        model_config = dataclasses.replace(start.config, n_classes=0, **flags)

    # Text -> tokens -> the examples of each step.
    if task_name == "lm":
        vocab_size = model_config.vocab_size
        folder, tokenizer = world.main_first(lambda: prepare_tokens(data, vocab_size, tokenizer, given))
        examples = LMWindows(folder.train, folder.valid, tokenizer, model_config.max_len, training.seed)
        task = tasks.LanguageModelling(examples, tokenizer)
        tokens, labels = f"{folder.train.sha256}-{folder.valid.sha256}", []
    else:
        if not data.train or not data.valid:
            raise UserError(f"--task {task_name} needs --train FILE and --valid FILE")
        columns = ["text"] if task_name == "classify" else ["prompt", "answer"]
        tokenizer = tokenizer or labelled_tokenizer(data, columns, model_config.vocab_size)
        kind = LabelledTexts if task_name == "classify" else PromptAnswers
        examples = kind(data.train, data.valid, tokenizer, model_config.max_len, training.seed)
        task = tasks.Classification(examples) if task_name == "classify" else tasks.Answering(examples, tokenizer)
        tokens, labels = examples.checksum, examples.labels if task_name == "classify" else []

    # The model.
    if not start:
        model_config.vocab_size = tokenizer.vocab_size
    runs.check_vocabulary(model_config, tokenizer, run.init or data.tokenizer)
    model_config.n_classes = len(labels)
    torch.manual_seed(training.seed)
    model = GPT(model_config)
    if start:
        runs.start_from(model, start, run.init, keep_head=labels == start_labels)
    if task_name == "classify" and not model_config.tied:
        model.head.requires_grad_(False)  # a classifier predicts no tokens

    # The folder, new or going on.
    config = runs.RunConfig("gpt", task_name, model_config, data, optim, training, run.init, labels, tokens)
    out = Path(run.out)
    locked = world.main_first(lambda: runs.start_run(out, config, tokenizer, run.overwrite, world.main))
    result = runs.read_result(out)
    if result:
        world.say(f"{out} is finished already: --overwrite true trains it anew, another --out trains another")
    else:
        world.say(prologue(model, task, world))
        result = train(model, task, config, out, world)

    if world.main:
        print("\n" + epilogue(result))
        model, _ = runs.load_run(out, world.device)
        if sample := task.sample(model):
            print("\nA sample:\n" + "\n".join("    " + line for line in sample.splitlines()))
        command = "classify" if task_name == "classify" else "sample"
        print(f"\nThe run is in {out}. Next: python -m mini {command} {out} {shlex.quote(task.example())}")
        print(json.dumps(result))
    world.leave()
    if locked:
        locked.close()


def prologue(model: GPT, task, world: World) -> str:
    c = model.config
    return (
        f"GPT with {model.num_params():,} parameters: {c.n_layers} layers, d_model {c.d_model}, "
        f"max_len {c.max_len}, vocabulary {c.vocab_size:,}\n"
        f"{task.data.n:,} training examples; {world.size} process{'es' * (world.size > 1)} on {world.device}"
    )


def epilogue(result: dict) -> str:
    lines = [f"Validation loss {result['val_loss']:.4f} nats"]
    if "val_bpb" in result:
        perplexity = math.exp(min(result["val_loss"], 99))
        lines[0] += f" per token (perplexity {perplexity:.4g}), {result['val_bpb']:.4f} bits per byte"
    if "accuracy" in result:
        lines[0] += f", accuracy {result['accuracy']:.4f} (always the largest class: {result['majority']:.4f})"
        lines[0] += f", macro F1 {result['f1']:.4f}"
        lines.append(f"{'':16} precision  recall      F1  | predicted {', '.join(result['classes'])}")
        for (name, row), counts in zip(result["classes"].items(), result["confusion"], strict=True):
            rates = f"{row['precision']:9.4f} {row['recall']:7.4f} {row['f1']:7.4f}"
            lines.append(f"{name[:16]:16} {rates}  | {' '.join(map(str, counts))}")
    lines.append(f"{result['steps']:,} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s")
    lines[-1] += f" ({result['tokens_per_s']:,.0f} tokens/s while training"
    if "mfu" in result:
        lines[-1] += f", {result['mfu']:.0%} of this device's {result['dtype']} matmul speed"
    return "\n".join(lines) + ")"


if __name__ == "__main__":
    run_command(main)
