"""Runs side by side: each measured in a process of its own, one table, and a picture of size, speed and quality."""

import gc
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from mini.flags import Checked, UserError, option
from mini.model import int8, sparse
from mini.model.attention import KVCache
from mini.model.transformer import Model
from mini.storage import read_json, write_json, write_text
from mini.tensors import digest_tensors, load_tensors, save_tensors
from mini.training.devices import can_compile, device_name, keep_memory, peak_memory, pick_device
from mini.training.loop import evaluate
from mini.training.ranks import World
from mini.training.runs import check_output, load_model
from mini.training.speed import call_times, load_pyplot
from mini.training.start import open_own_task, open_run

CONTEXT = 64  # tokens before the one that a GPT's single step adds
BUSY = 2.0  # the slowest tenth of the times of one measurement over the fastest tenth
LEGEND = (
    "MB: on disk, as stored, or as this form would be. torch-int8: PyTorch's own quantize_dynamic of the first run. "
    "int8, bf16: int8 matrices, the rest in bfloat16. Nonzeros: parameters that are not masked. Times: medians of "
    "forward passes of (batch, tokens); (1, 1) is a further token. Memory: the most held beside what was held before. "
    "Change, largest difference: to the first row, where both are judged on the same data; the latter of outputs for "
    "8 of its texts. Speed: zeros in dense matrices, or int8 without int8 products, make nothing faster: simulated."
)


@dataclass
class ReportOptions(Checked):
    """Measure runs and compare them with the first, which is also shown in bfloat16 and by torch's own int8.

    Int8 runs are shown as they are, and with whatever is not int8 in bfloat16.
    """

    runs: list[str] = option([], "runs, or folders with published weights; the uncompressed one first", positional="+")
    out: str = option("out/report", "the folder for report.md, report.json and, with matplotlib, report.png")
    repeats: int = option(20, "forward passes, of which the median counts", low=1)
    lengths: int | list[int] = option(0, "tokens of the timed texts, one number or several: 512,4096; 0: 128", low=0)
    compile: bool = option(False, "run every model through torch.compile")
    device: str = option("auto", "auto, cpu, cuda, mps")

    def __post_init__(self):
        super().__post_init__()
        if 1 in self.all_lengths:
            raise UserError("--lengths 1: a further token is timed anyway; give texts of 2 tokens or more")

    @property
    def all_lengths(self) -> list[int]:
        return self.lengths if isinstance(self.lengths, list) else [self.lengths]


def compare(options: ReportOptions) -> None:
    """Measures, prints the table and writes it."""
    device, forms, out = pick_device(options.device), [], Path(options.out)
    for name in ("report.json", "report.md", "report.png"):
        check_output(out / name, lambda path: is_report(path.with_name("report.json")))
    for i, run in enumerate(options.runs):
        model = load_model(run)
        quantized = int8.is_int8(model)
        if i == 0 and (longest := max(options.all_lengths)) > longest_text(model):
            raise UserError(f"--lengths {longest}: {run} reads {model.config.max_len} tokens at most")
        if i == 0 and (quantized or sparse.masks_of(model)):
            raise UserError(f"{run}: the first run is what the others are compared with; name the uncompressed one")
        forms += [(run, "saved")] + [(run, "bf16")] * (quantized or i == 0)
        forms += [(run, "torch-int8")] * (i == 0 and device.type == "cpu")  # torch has it for CPUs
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        for run, form in tqdm(forms, unit="row", leave=False):
            outputs = reference if not rows else Path(folder) / "outputs"
            row = in_own_process(run, form, outputs, options)
            if row is None:
                continue
            row["difference"] = difference(reference, outputs)
            if options.compile and not row["compiled"]:
                tqdm.write(f"{run} as {form}: not compiled, as torch.compile does not work here")
            if row["spread"] > BUSY:
                tqdm.write(f"{run} as {form}: its times vary {row['spread']:.1f}-fold; is the machine busy?")
            rows.append(row)
    head = heading(options, device, rows)
    text = f"{head}\n\n{table(rows)}\n\n{LEGEND}\n"
    print("\n" + text)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", {"heading": head, "rows": rows})
    write_text(out / "report.md", text)
    plot(rows, out / "report.png")
    print(json.dumps({"out": str(out), "rows": len(rows)}))


def is_report(path: Path) -> bool:
    return path.is_file() and read_json(path).keys() == {"heading", "rows"}


def in_own_process(run: str, form: str, outputs: Path, options: ReportOptions) -> dict | None:
    """The figures of one row; None where torch's own int8 does not work here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(measure, run, form, outputs, options).result()
        except Exception as error:  # whatever another process fails of is one line
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if form != "torch-int8":  # which not every version of PyTorch has
                raise UserError(f"{run}: it could not be measured ({reason})") from None
            tqdm.write(f"{run} as {form}: not measured ({reason})")
            return None


def difference(a: Path, b: Path) -> float | None:
    """The largest difference of two runs' outputs for the same texts; None where they are of another shape."""
    x, y = (load_tensors(path)["outputs"] for path in (a, b))
    return float((x - y).abs().max()) if x.shape == y.shape else None


def heading(options: ReportOptions, device: torch.device, rows: list[dict]) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    compiled = ", compiled" if all(row["compiled"] for row in rows) else ""
    products = f"; {int8.backend(device.type)}" if any(row["int8"] for row in rows) else ""
    return (
        f"{device} ({device_name(device)}), {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}{compiled}; runs of seed {seeds}; p50 of {options.repeats} forward passes of "
        f"(batch, tokens) from seed 0{products}"
    )


def table(rows: list[dict]) -> str:
    first = rows[0]  # the rows as a Markdown table
    latencies = [name for name in first if name.startswith("ms_")]
    shapes = [f"({name[3:].replace('_', ', ')}) ms" for name in latencies]
    judged = first["judged_by"]
    titles = ["run", "form", "MB", "parameters", "nonzeros", *shapes, "tokens/s", "memory MB", judged, "change",
              "largest difference", "speed"]  # fmt: skip
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        alike = judged in row and row["judged_on"] == first["judged_on"]
        change = row[judged] - first[judged] if alike else None
        lines.append(
            [row["run"], form_name(row), f"{row['bytes'] / 1e6:.2f}", f"{row['parameters']:,}",
             f"{row['nonzeros']:,}", *(shown(row.get(name), ".2f") for name in latencies),
             shown(row.get("tokens_per_s"), ",.0f"), f"{row['memory_mb']:,.0f}", shown(row.get(judged), ".4f"),
             shown(change, "+.4f"), shown(row["difference"], ".3g"), row["speed"]]
        )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: float | None, form: str) -> str:
    """A figure, or a dash where a run has none of that name: another task, or another length."""
    return "-" if value is None else format(value, form)


def form_name(row: dict) -> str:
    if row["int8"]:
        return "int8" if row["form"] == "saved" else "int8, bf16"
    return "fp32" if row["form"] == "saved" else row["form"]


def plot(rows: list[dict], path: Path) -> None:
    """Quality against size and against latency, where matplotlib is installed."""
    pyplot = load_pyplot()
    if pyplot is None:
        return
    judged = rows[0]["judged_by"]
    latency = max((n for n in rows[0] if n.startswith("ms_8_")), key=lambda n: int(n.removeprefix("ms_8_")))
    figure, both = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    sides = [("bytes", 1e6, "MB on disk"), (latency, 1, f"ms for (8, {latency.removeprefix('ms_8_')}) tokens")]
    for axes, (name, unit, label) in zip(both, sides, strict=True):
        for i, row in enumerate(rows):
            if name in row and row["judged_on"] == rows[0]["judged_on"]:
                real = not row["speed"].endswith("simulated")
                known = f"{Path(row['run']).name}, {form_name(row)}" + ("" if real else " (zeros make nothing faster)")
                color = pyplot.cm.tab20(i % 20)
                axes.plot(row[name] / unit, row[judged], "o" if real else "x", color=color, label=known)
        axes.set(xlabel=label, xscale="log")
        for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            formatter("{x:g}")
        axes.grid(alpha=0.3)
    both[0].set_ylabel(judged)
    both[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------- one row
def measure(run: str, form: str, outputs: Path, options: ReportOptions) -> dict:
    """Size, speed, memory and quality of a run; its outputs for a few texts go to a file, to be compared with others'.

    form: "saved", as it is; "bf16", whatever of it is float32 in bfloat16; "torch-int8", torch's own dynamic int8.
    """
    warnings.simplefilter("ignore")  # of this process alone
    world = World(options.device)
    empty = peak_memory(world.device)
    settings = open_run(run)
    model = settings.source.eval()
    compiled = options.compile and can_compile(world.device, lambda why: None)
    figures = {"run": run, "form": form, "compiled": compiled, "seed": settings.train.seed}
    figures |= size(model, run, form, world.device)
    if form == "bf16":
        model.bfloat16()
    if form == "torch-int8":
        model = torch_int8(model)
    model.to(world.device)
    settings.source = None
    gc.collect()

    peak_memory(world.device)  # loading does not count
    keep_memory()
    with torch.inference_mode():
        figures |= latencies(model, options, compiled, world.device)
    figures["memory_mb"] = peak_memory(world.device) - empty
    task = open_own_task(settings, world)
    judged = evaluate(model, task, world, torch.float32, 8)
    figures |= {name: value for name, value in judged.items() if isinstance(value, float)}
    judged_on = [digest_tensors(batch.inputs) for batch in task.validation(32)]
    figures |= {"judged_by": task.best or "val_loss", "judged_on": digest_tensors({}, *judged_on)}
    model.eval()
    inputs = next(iter(task.validation(8))).to(world.device).inputs
    with torch.inference_mode():
        save_tensors(outputs, {"outputs": model.answer(inputs).float().cpu()})
    return figures


def size(model: Model, run: str, form: str, device: torch.device) -> dict:
    """Bytes on disk, parameters, those that are not zero; and whether the speed comes from what is stored."""
    masks, quantized, n = sparse.masks_of(model), int8.is_int8(model), model.num_params()
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    path = Path(run) / "model.safetensors"
    as_stored = path.is_file() and (form == "saved" or quantized)
    stored = path.stat().st_size if as_stored else n * (2 if form == "bf16" else 4)
    if form == "torch-int8":  # a byte for each weight of a linear layer; what is also an embedding stays, too
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


def longest_text(model: Model) -> float:
    return math.inf if model.config.endless else model.config.max_len


def latencies(model: Model, options: ReportOptions, compiled: bool, device: torch.device) -> dict:
    """p50 latencies in ms: of a GPT's next token, and of (1, T) and (8, T) tokens for each length T that it can read.

    tokens_per_s: with 8 texts of the first length. spread: the largest ratio of the slowest tenth to the fastest of one
    of these; near 1 on an idle machine.
    """
    most, repeats = longest_text(model), options.repeats
    figures, spreads = {}, []
    if model.kind == "gpt" and not model.config.n_classes:
        figures["ms_1_1"], spread = latency(single_step(model, device, compiled), repeats, device)
        spreads.append(spread)
    inductor = int8.INDUCTOR if int8.is_int8(model) else None
    answer = torch.compile(model.answer, dynamic=False, options=inductor) if compiled else model.answer
    lengths = [T or min(128, model.config.max_len) for T in options.all_lengths if T <= most]
    for T, batch in itertools.product(lengths, (1, 8)):
        asked = [T - 1] if model.kind == "gpt" else range(0, T, 7)  # the next token; one in seven is masked
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (batch, T), generator=generator).to(device)
        positions = torch.tensor(asked, device=device).expand(batch, -1)  # (B, M)
        inputs = {"tokens": tokens, "lengths": torch.full((batch,), T, device=device), "positions": positions}
        ms, spread = latency(lambda inputs=inputs: answer(inputs), repeats, device)
        figures[f"ms_{batch}_{T}"] = ms
        spreads.append(spread)
        if batch == 8:
            figures.setdefault("tokens_per_s", 8 * T / ms * 1000)
    return figures | {"spread": max(spreads, default=1.0)}


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
