"""One run in one form, measured in a process of its own: what `compress.py report` starts for each row of its table."""

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mini.flags import Checked, option, parse_flags, run_command
from mini.model import int8, sparse
from mini.model.transformer import KVCache, Model
from mini.storage import digest_tensors, save_tensors
from mini.training.devices import World, can_compile, keep_memory
from mini.training.loop import evaluate
from mini.training.speed import synchronize
from mini.training.start import open_own_task, open_run

CONTEXT = 64  # tokens before the one that a GPT's single step adds


@dataclass
class MeasureOptions(Checked):
    """Size, speed, memory and quality of a run."""

    run: str = option("", "a run, or a folder with published weights", positional="1")
    form: str = option(
        "saved",
        "as it is; whatever of it is float32 in bfloat16; torch's own dynamic int8",
        ("saved", "bf16", "torch-int8"),
    )
    compile: bool = option(False, "through torch.compile")
    repeats: int = option(20, "forward passes, of which the median counts", low=1)
    device: str = option("auto", "auto, cpu, cuda, mps")
    outputs: str = option("", "a file for the outputs, to be compared with those of other runs")


def measure(options: MeasureOptions) -> dict:
    world = World(options.device)
    empty = memory(world.device)
    settings = open_run(options.run)
    model = settings.source.eval()
    compiled = options.compile and can_compile(world.device, world.say)
    figures = {"run": options.run, "form": options.form, "compiled": compiled, "seed": settings.train.seed}
    figures |= size(model, options, world.device)
    if options.form == "bf16":
        model.bfloat16()
    if options.form == "torch-int8":
        model = torch_int8(model)
    model.to(world.device)
    settings.source = None
    gc.collect()

    memory(world.device)  # loading does not count
    keep_memory()
    with torch.inference_mode():
        figures |= speed(model, options.repeats, compiled, world.device)
    figures["memory_mb"] = memory(world.device) - empty
    task, _ = open_own_task(settings, world)
    judged = evaluate(model, task, world, torch.float32, 8)
    figures |= {name: value for name, value in judged.items() if isinstance(value, float)}
    judged_on = [digest_tensors(batch.inputs) for batch in task.validation(32)]
    figures |= {"judged_by": task.best or "val_loss", "judged_on": digest_tensors({}, *judged_on)}
    if options.outputs:
        model.eval()
        inputs = next(iter(task.validation(8))).to(world.device).inputs
        with torch.inference_mode():
            save_tensors(options.outputs, {"outputs": model.answer(inputs).float().cpu()})
    return figures


def size(model: Model, options: MeasureOptions, device: torch.device) -> dict:
    """Bytes on disk, parameters, those that are not zero; and whether the speed comes from what is stored."""
    masks, quantized, n = sparse.masks_of(model), int8.is_int8(model), model.num_params()
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    path = Path(options.run) / "model.safetensors"
    as_stored = path.is_file() and (options.form == "saved" or quantized)
    stored = path.stat().st_size if as_stored else n * (2 if options.form == "bf16" else 4)
    if options.form == "torch-int8":  # a byte for each weight of a linear layer; what is also an embedding stays, too
        shared = model.stack.tokens.weight
        for layer in int8.matrices(model).values():
            stored += layer.weight.numel() * (1 if layer.weight is shared else 1 - 4)
    real = int8.int8_units(device.type) if quantized else not masks
    speed = "real" if real else "simulated"
    if quantized and masks:
        speed = f"int8 {speed}, zeros simulated"
    return {"bytes": stored, "parameters": n, "nonzeros": n - zeros, "speed": speed, "int8": quantized}


def torch_int8(model: Model) -> Model:
    """torch's own dynamic quantization of the linear layers: one scale for each matrix, embeddings left alone."""
    from torch.ao.quantization import quantize_dynamic

    for name, layer in int8.matrices(model).items():
        plain = nn.Linear(*layer.weight.t().shape, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        int8.put(model, name, plain)
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


# ---------------------------------------------------------------- speed
def speed(model: Model, repeats: int, compiled: bool, device: torch.device) -> dict:
    """p50 latencies in ms: of (1, T) and (8, T) tokens, T = 128 or max_len, and of a GPT's next token.

    spread: the largest ratio of the slowest tenth to the fastest of one of these; near 1 on an idle machine.
    """
    T = min(128, model.config.max_len)
    figures, spreads = {"length": T}, []
    if model.kind == "gpt" and not model.config.n_classes:
        figures["ms_1_1"], spread = latency(single_step(model, device, compiled), repeats, device)
        spreads.append(spread)
    inductor = int8.INDUCTOR if int8.is_int8(model) else None
    answer = torch.compile(model.answer, dynamic=False, options=inductor) if compiled else model.answer
    asked = [T - 1] if model.kind == "gpt" else range(0, T, 7)  # the next token; one in seven is masked
    for batch in (1, 8):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (batch, T), generator=generator).to(device)
        positions = torch.tensor(asked, device=device).expand(batch, -1)  # (B, M)
        inputs = {"tokens": tokens, "lengths": torch.full((batch,), T, device=device), "positions": positions}
        ms, spread = latency(lambda inputs=inputs: answer(inputs), repeats, device)
        figures[f"ms_{batch}_{T}"] = ms
        spreads.append(spread)
    return figures | {"tokens_per_s": 8 * T / ms * 1000, "spread": max(spreads)}


def single_step(model: Model, device: torch.device, compiled: bool) -> Callable:
    """A generation's step: one token after CONTEXT others, whose keys and values are kept."""
    length = min(CONTEXT, model.config.max_len)
    cache = KVCache(model.config, 1, length, device, model.stack.norm.weight.dtype)
    new, positions = torch.zeros(1, 1, dtype=torch.long, device=device), torch.full((1, 1), length - 1, device=device)
    step = torch.compile(model._step) if compiled else model._step
    return lambda: step(new, positions, cache)


def latency(call: Callable, repeats: int, device: torch.device) -> tuple[float, float]:
    """(median time of a call in ms, after a few that warm up; how many times the slowest tenth is the fastest)."""
    times = call_times(call, repeats + 3, device)[3:]
    fast, *_, slow = statistics.quantiles(times, n=10) if repeats > 1 else times * 2
    return 1000 * statistics.median(times), slow / fast


def call_times(call: Callable, n: int, device: torch.device) -> list[float]:
    """The seconds that each of n calls takes."""
    times = []
    for _ in range(n):
        synchronize(device)
        begun = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return times


def memory(device: torch.device) -> float:
    """The most memory this process has held since the last call, in MB; of a GPU, what tensors take there."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e6
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        return int(status.split("VmHWM:")[1].split()[0]) / 1000
    except (OSError, IndexError):  # not Linux: the peak since the process began
        unit = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [MeasureOptions], __doc__)
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    run_command(main)
