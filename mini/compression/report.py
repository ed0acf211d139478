"""Runs side by side: each measured in a process of its own, one table, and a picture of size, speed and quality."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mini.errors import UserError
from mini.flags import Checked, option
from mini.model import int8, sparse
from mini.storage import load_tensors, write_json, write_text
from mini.training.devices import device_name, pick_device
from mini.training.runs import load_model
from mini.training.speed import load_pyplot

BUSY = 2.0  # the slowest tenth of the times of one measurement over the fastest tenth
LEGEND = (
    "MB: on disk, as stored, or as this form would be. torch-int8: PyTorch's own quantize_dynamic of the first run. "
    "int8, bf16: int8 matrices, the rest in bfloat16. Nonzeros: parameters that are not masked. Times: the median of "
    "forward passes of (batch, tokens); (1, 1) is a further token of a text. Memory: the most held beside what the "
    "process began with. Change, largest difference: to the first row, where both are judged on the same data; the "
    "latter of the outputs for 8 of its texts. Speed: zeros in dense matrices, or int8 without int8 products, make "
    "nothing faster; what would is simulated."
)


@dataclass
class ReportOptions(Checked):
    """Measure runs and compare them with the first, which is also shown in bfloat16 and by torch's own int8.

    Int8 runs are shown as they are, and with whatever is not int8 in bfloat16.
    """

    runs: list[str] = option([], "runs, or folders with published weights; the uncompressed one first", positional="+")
    out: str = option("out/report", "the folder for report.md, report.json and, with matplotlib, report.png")
    repeats: int = option(20, "forward passes, of which the median counts", low=1)
    compile: bool = option(False, "run every model through torch.compile")
    device: str = option("auto", "auto, cpu, cuda, mps")


def compare(options: ReportOptions) -> None:
    """Measures, prints the table and writes it."""
    device, forms = pick_device(options.device), []
    for i, run in enumerate(options.runs):
        model = load_model(run)
        quantized = int8.is_int8(model)
        if i == 0 and (quantized or sparse.masks_of(model)):
            raise UserError(f"{run}: the first run is what the others are compared with; name the uncompressed one")
        forms += [(run, "saved")] + [(run, "bf16")] * (quantized or i == 0)
        forms += [(run, "torch-int8")] * (i == 0 and device.type == "cpu")  # torch has it for CPUs
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        for run, form in tqdm(forms, unit="row", leave=False):
            outputs = reference if not rows else Path(folder) / "outputs"
            row = measured(run, form, outputs, options)
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
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.md", text)
    write_json(out / "report.json", {"heading": head, "rows": rows})
    plot(rows, out / "report.png")
    print(json.dumps({"out": str(out), "rows": len(rows)}))


def measured(run: str, form: str, outputs: Path, options: ReportOptions) -> dict | None:
    """The figures of one row; None where torch's own int8 does not work here."""
    home = str(Path(__file__).parents[2])  # where `mini` is, whatever folder this one was called from
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "mini.compression.measure", run, "--form", form, "--outputs", str(outputs)]
    command += ["--repeats", str(options.repeats), "--compile", str(options.compile), "--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
    if form == "torch-int8":  # not every version of PyTorch has it
        tqdm.write(f"{run} as {form}: not measured ({reason})")
        return None
    raise UserError(f"{run}: it could not be measured ({reason.removeprefix('error: ')})")


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
    """The rows as a Markdown table."""
    first = rows[0]
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
             f"{row['tokens_per_s']:,.0f}", f"{row['memory_mb']:,.0f}", shown(row.get(judged), ".4f"),
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
    latency = next(name for name in rows[0] if name.startswith("ms_8_"))
    figure, both = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    sides = [("bytes", 1e6, "MB on disk"), (latency, 1, f"ms for (8, {rows[0]['length']}) tokens")]
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
