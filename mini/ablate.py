"""Ablations: arms that differ in some flags, each trained with several seeds, and what can be concluded from them.

A spec (TOML) names the script, the flags of every arm, those of each arm, the seeds and the figure that is compared:

    script = "train_gpt.py"                    # or train_bert.py, compress.py
    flags = "--preset char --steps 600"        # of every arm; {seed} in them is the seed
    figure = "val_bpb"                         # of the final JSON line
    better = "lower"
    seeds = [1, 2, 3, 4, 5]
    baseline = "adamw"
    tokens = 2e6                               # or flops = 1e14: instead of --steps, the same for arms of all sizes
    sweep_figure = "val_loss"                  # by which a sweep chooses, if not by the figure
    sweep_seed = 0                             # and on which seed, that is not among those reported
    [arms]
    adamw = "--optimizer adamw --lr 3e-3"
    muon = "--optimizer muon --lr 0.02"
    [sweep]                                    # values to try for all arms, or in [sweep.muon] for one
    lr = [1e-3, 3e-3]

Every arm and seed is an ordinary run folder, OUT/runs/ARM/SEED. Where all of an arm fail, the exit status is 2.
"""

import contextlib
import ctypes
import itertools
import json
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from mini.compression.distill import DistillConfig
from mini.compression.prune import PruneConfig
from mini.compression.quantize import QuantConfig
from mini.compression.shrink import ReduceConfig
from mini.compression.start import CompressOptions
from mini.flags import Checked, UserError, field_names, from_dict, nearest, option
from mini.model.config import ModelConfig
from mini.storage import locked, read_json, write_json, write_text
from mini.tasks import TASKS
from mini.text.corpus import DataConfig
from mini.training.checkpoints import read_metrics, read_result
from mini.training.devices import device_name, progress_bar
from mini.training.loop import TrainConfig
from mini.training.optim import OptimConfig
from mini.training.part import PartConfig
from mini.training.speed import load_pyplot
from mini.training.start import Job
from mini.verdict import ALPHA, compare, mean_sd

TRAINING = [Job, ModelConfig, DataConfig, OptimConfig, TrainConfig, PartConfig]
SCRIPTS: dict[str, list[type]] = {  # and whose fields are its flags, beside those of tasks
    "train_gpt.py": TRAINING,
    "train_bert.py": TRAINING,
    "compress.py": [
        CompressOptions,
        PruneConfig,
        QuantConfig,
        ReduceConfig,
        DistillConfig,
        DataConfig,
        OptimConfig,
        TrainConfig,
    ],
}
NAME = re.compile(r"\w[\w.+-]*")  # of an arm, which is a folder too
DONE = re.compile(r"(\d+)/(\d+) \[[^\]]*step")  # in a training's progress bar
METHOD = (
    "±: standard deviation over the seeds. Intervals: Student's t over the differences of pairs of runs with the same "
    f"seed, taken to be independent and near to normally distributed; {1 - ALPHA:.0%}, or more where Holm's correction "
    "for several arms asks for it."
)


@dataclass
class AblateOptions(Checked):
    """Train the arms of a spec with several seeds each, and tell which differences are real."""

    spec: str = option("", "the .toml file (its form: mini/ablate.py)", positional="1")
    out: str = option("", "the folder of the runs and the result; the same command goes on")
    workers: int = option(1, "runs side by side, which share the cores", low=1, high=1024)


@dataclass
class Spec:
    """What the file says."""

    script: str
    figure: str
    better: str
    seeds: list[int]
    baseline: str
    arms: dict[str, str]
    flags: str = ""
    tokens: float = 0.0
    flops: float = 0.0
    sweep: dict = field(default_factory=dict)
    sweep_seed: int | None = None  # on which each arm's best is chosen; None: 0
    sweep_figure: str = ""  # and by which figure; none: by the one that is compared

    def budget(self) -> list[str]:
        return [word for name in ("tokens", "flops") if (n := getattr(self, name)) for word in (f"--{name}", str(n))]

    def settings(self, arm: str) -> list[dict[str, str]]:
        """What a sweep tries in an arm: {flag: value} of every combination; [{}] without one."""
        values = {name: v for name, v in self.sweep.items() if isinstance(v, list)}
        values |= self.sweep.get(arm, {})
        return [dict(zip(values, map(str, chosen), strict=True)) for chosen in itertools.product(*values.values())]


@dataclass
class Run:
    """One training."""

    arm: str
    seed: int
    folder: Path
    argv: list[str]
    process: subprocess.Popen | None = None
    failure: str = ""

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


# ---------------------------------------------------------------- the spec
def read_spec(path: str | Path) -> Spec:
    """Raises UserError for whatever could not be run or compared."""
    try:
        values = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None

    def refuse(what: str) -> None:
        raise UserError(f"{path}: {what}")

    if unknown := sorted(values.keys() - field_names(Spec)):
        refuse(f"{unknown[0]}: no such entry{nearest(unknown[0], field_names(Spec))}; the form: mini/ablate.py")
    spec = from_dict(Spec, values, path)

    if spec.script not in SCRIPTS:
        refuse(f"script {spec.script!r}{nearest(spec.script, SCRIPTS)}: one of {', '.join(SCRIPTS)}")
    if spec.better not in ("lower", "higher"):
        refuse(f"better = {spec.better!r}: lower or higher")
    if not spec.seeds or len(set(spec.seeds)) < len(spec.seeds) or min(spec.seeds) < 0:
        refuse(f"seeds = {spec.seeds}: numbers of 0 or more, each once")
    if spec.sweep_seed is None:
        spec.sweep_seed = max(spec.seeds) + 1 if 0 in spec.seeds else 0
    if spec.sweep_seed in spec.seeds:
        refuse(f"sweep_seed = {spec.sweep_seed}: the seed on which a sweep chooses cannot be one of those reported")
    if bad := [name for name, text in spec.arms.items() if not isinstance(text, str) or not NAME.fullmatch(name)]:
        refuse(f"arm {bad[0]!r}: letters, digits and . + - _ as its name, and its flags as a text")
    if spec.baseline not in spec.arms:
        refuse(
            f"baseline {spec.baseline!r}{nearest(spec.baseline, spec.arms)}: one of {', '.join(spec.arms) or 'no arms'}"
        )
    if not all(0 <= n < math.inf for n in (spec.tokens, spec.flops)) or (spec.tokens and spec.flops):
        refuse("tokens and flops: give one of them, more than 0")
    for name, value in spec.sweep.items():
        for flag, values in value.items() if isinstance(value, dict) else [(name, value)]:
            if not isinstance(values, list) or not values or not all(isinstance(v, str | int | float) for v in values):
                refuse(f"sweep: {flag} = {values!r}: a list of texts and numbers")
        if isinstance(value, dict) and name not in spec.arms:
            refuse(f"sweep.{name}: no such arm{nearest(name, spec.arms)}")
    classes = SCRIPTS[spec.script] + [task.Config for task in TASKS.values() if task.Config]
    known = {"preset"}.union(*map(field_names, classes)) - {"out", "seed", "overwrite"}
    for arm in spec.arms:
        for setting in spec.settings(arm):
            for word in split(spec.flags, path) + split(spec.arms[arm], path) + [f"--{name}" for name in setting]:
                flag = word.partition("=")[0].removeprefix("--")
                if word.startswith("--") and flag in ("out", "seed", "overwrite"):
                    refuse(f"--{flag} is given by ablate; leave it out")
                if word.startswith("--") and flag not in known:
                    refuse(f"arm {arm}: {spec.script} has no flag --{flag}{nearest(flag, known)}")
    return spec


def split(text: str, path: str | Path) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{path}: {text!r}: {error}") from None


def find_script(name: str) -> Path:
    for folder in (Path.cwd(), Path(__file__).parents[1]):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{name} is not here: ablate works in a checkout of the project")


def make_run(spec: Spec, script: Path, out: Path, arm: str, seed: int, setting: dict[str, str], sweeps: bool) -> Run:
    tried = ",".join(f"{name}={value}" for name, value in setting.items())
    folder = out / "runs" / arm / (re.sub(r"[^\w.,=+-]", "_", f"sweep-{tried}") if sweeps else str(seed))
    words = [*split(spec.flags, ""), *split(spec.arms[arm], ""), *spec.budget()]
    words += [word for n, v in setting.items() for word in (f"--{n}", v)] + ["--seed", str(seed), "--out", str(folder)]
    return Run(arm, seed, folder, [sys.executable, str(script), *(word.replace("{seed}", str(seed)) for word in words)])


def check_flags(spec: Spec, script: Path, out: Path, path: str) -> None:
    """Reads what will be given to train_gpt.py or train_bert.py as they would, before the first of them begins.

    Not what begins with another run, which may not be there yet.
    """
    read = runpy.run_path(str(script)).get("read", lambda argv: None)  # each command of compress.py has its own way
    for arm in spec.arms:
        for setting in spec.settings(arm):
            argv = make_run(spec, script, out, arm, spec.seeds[0], setting, False).argv[2:]
            try:
                if not any(word.partition("=")[0] == "--init" for word in argv):
                    read(argv)
            except UserError as error:
                raise UserError(f"{path}: arm {arm}: {error}") from None


# ---------------------------------------------------------------- the runs
def die_with_parent() -> None:
    """Else the trainings of a killed ablation would go on, and their folders be locked when it is given again."""
    with contextlib.suppress(AttributeError, OSError):  # Linux alone has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def begin(run: Run, threads: int) -> None:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with open(run.log, "wb") as log:
        run.process = subprocess.Popen(run.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                       env=environment, preexec_fn=die_with_parent)  # fmt: skip


def share_done(run: Run) -> float:
    """How much of its steps a run has made, by its progress bar."""
    with open(run.log, "rb") as file:
        file.seek(max(0, run.log.stat().st_size - 2000))
        found = DONE.findall(file.read().decode(errors="replace"))
    return int(found[-1][0]) / max(1, int(found[-1][1])) if found else 0.0


def last_words(run: Run) -> str:
    """What a training that failed said."""
    lines = [line.strip() for line in re.split(r"[\r\n]", run.log.read_text(errors="replace")) if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it was killed"])[-1][:300]


def train_all(runs: list[Run], workers: int, spec: Spec) -> None:
    """Makes all runs that are not finished, so many at a time; one that fails says why in its `failure`.

    Raises UserError as soon as a run has no such figure.
    """
    for run in runs:
        figure_of(run, spec)
    waiting, running = [run for run in runs if not finished(run)], []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    done, form = len(runs) - len(waiting), "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with progress_bar(total=len(runs), initial=done, bar_format=form, disable=not waiting) as bar, stopping(running):
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(waiting.pop(0))
                begin(running[-1], max(1, cores // workers))
            time.sleep(0.2)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                done += 1
                if run.process.returncode:
                    run.failure = last_words(run)
                    bar.write(f"{run.arm}, seed {run.seed}: {run.failure}")
                figure_of(run, spec)
            bar.set_description_str(f"{done} of {len(runs)} runs", refresh=False)
            bar.update(done + sum(map(share_done, running)) - bar.n)


def finished(run: Run) -> dict | None:
    """The result of a run, if it is there."""
    return read_result(run.folder) if run.folder.is_dir() else None


@contextlib.contextmanager
def stopping(running: list[Run]) -> Iterator[None]:
    """However this ends, no training goes on alone: each is asked to write a checkpoint and leave."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("\nstopping; the same command goes on", file=sys.stderr)
        raise
    finally:
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()
        signal.signal(signal.SIGTERM, before)


def figure_of(run: Run, spec: Spec, name: str = "") -> float | None:
    """The figure of a run, or another of this name; None where it is not finished."""
    if (result := finished(run)) is None:
        return None
    name = name or spec.figure
    value = result.get(name)
    if type(value) not in (int, float):
        has = ", ".join(name for name, v in result.items() if type(v) in (int, float))
        raise UserError(f"figure {name!r}{nearest(name, result)}: {run.folder} has {has}")
    return float(value)


def choose(spec: Spec, script: Path, out: Path, workers: int) -> tuple[dict[str, dict[str, str]], list[str]]:
    """For each arm the setting that did best on the sweep's seed, and a line about what was tried."""
    tried = {arm: spec.settings(arm) for arm in spec.arms}
    runs = {arm: [make_run(spec, script, out, arm, spec.sweep_seed, setting, True) for setting in settings]
            for arm, settings in tried.items() if len(settings) > 1}  # fmt: skip
    train_all([run for several in runs.values() for run in several], workers, spec)
    chosen, lines = {arm: settings[0] for arm, settings in tried.items()}, []
    for arm, several in runs.items():
        figures = [figure_of(run, spec, spec.sweep_figure) for run in several]
        found = [(value, i) for i, value in enumerate(figures) if value is not None]
        if found:
            chosen[arm] = tried[arm][(min if spec.better == "lower" else max)(found)[1]]
        pairs = zip(tried[arm], figures, strict=True)
        all_of_them = "; ".join(f"{show(s)}: {'failed' if v is None else f'{v:.4f}'}" for s, v in pairs)
        has = f"{arm} has {show(chosen[arm])}, chosen" if found else f"{arm}: nothing chosen"
        by = spec.sweep_figure or spec.figure
        lines.append(f"{has} on seed {spec.sweep_seed}, which is not reported, by {by}: {all_of_them}")
        if found and (edge := at_the_edge(chosen[arm], tried[arm])):
            lines[-1] += f". At the edge of what was tried, beyond which may be better: {edge}"
    return chosen, lines


def at_the_edge(chosen: dict[str, str], tried: list[dict[str, str]]) -> str:
    """Of a setting the numbers that are the least or the largest of several."""
    edges = {}
    for name, value in chosen.items():
        with contextlib.suppress(ValueError):  # not numbers
            numbers = {float(setting[name]) for setting in tried}
            if len(numbers) > 1 and float(value) in (min(numbers), max(numbers)):
                edges[name] = value
    return show(edges)


def show(setting: dict[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in setting.items())


# ---------------------------------------------------------------- the result
def judge(spec: Spec, runs: list[Run]) -> dict[str, dict]:
    """For each arm its values by seed (null where a run failed), mean, sd, and the comparison with the baseline."""
    values = {arm: [figure_of(run, spec) for run in runs if run.arm == arm] for arm in spec.arms}
    base = values[spec.baseline]
    differences = {
        arm: [b - a for a, b in zip(base, mine, strict=True) if a is not None and b is not None]
        for arm, mine in values.items() if arm != spec.baseline
    }  # fmt: skip
    compared = compare(differences, spec.better)
    arms = {}
    for arm, mine in values.items():
        there = [value for value in mine if value is not None]
        mean, sd = mean_sd(there) if there else (None, None)
        found = vars(compared[arm]) if arm in compared else {}
        arms[arm] = {"values": mine, "mean": mean, "sd": sd if len(there) > 1 else None}
        arms[arm] |= {name: found.get(name) for name in ("difference", "low", "high", "level", "p", "verdict")}
        if failures := {str(run.seed): run.failure for run in runs if run.arm == arm and run.failure}:
            arms[arm]["failures"] = failures
    return arms


def table(spec: Spec, arms: dict[str, dict], notes: list[str]) -> str:
    """The result as Markdown."""
    lines = [["arm", "seeds", f"{spec.figure} ({spec.better} is better)", "difference", "interval", "verdict"]]
    lines.append(["---"] * len(lines[0]))
    for name, arm in sorted(arms.items(), key=lambda item: item[0] != spec.baseline):
        n, total = sum(value is not None for value in arm["values"]), len(arm["values"])
        mean = "-" if not n else f"{arm['mean']:.4f}" + ("" if arm["sd"] is None else f" ± {arm['sd']:.4f}")
        line = [name, str(n) if n == total else f"{n} of {total}", mean]
        if arm["difference"] is None:
            why = "it failed" if "failures" in arm else "too few seeds"
            line += ["", "", "baseline" if name == spec.baseline else f"none: {why}"]
        else:
            bounds = f"[{arm['low']:+.4f}, {arm['high']:+.4f}], {arm['level']:.1%}"
            line += [f"{arm['difference']:+.4f}", bounds, arm["verdict"]]
        lines.append(line)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    failures = []
    for name, arm in arms.items():
        for why in dict.fromkeys(arm.get("failures", {}).values()):
            seeds = [seed for seed, other in arm["failures"].items() if other == why]
            failures.append(f"{name}, seed {', '.join(seeds)}: {why}")
    return "\n\n".join([text, *notes, *failures, METHOD]) + "\n"


def plot(spec: Spec, runs: list[Run], arms: dict[str, dict], path: Path) -> None:
    """Curves, with the range over the seeds as bands, and differences with their intervals; with matplotlib.

    Where runs are judged only once, the values of all seeds stand in the curves' place.
    """
    pyplot = load_pyplot()
    if pyplot is None:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    metrics = {run.folder: read_metrics(run.folder) for run in runs if finished(run)}
    known = all(any(spec.figure in row for row in rows) for rows in metrics.values())
    shown = spec.figure if known else "loss"
    once = all(sum(shown in row for row in rows) < 2 for rows in metrics.values())
    for i, arm in enumerate(spec.arms):
        if once:
            there = [value for value in arms[arm]["values"] if value is not None]
            left.plot([i] * len(there), there, "o", color=f"C{i}", alpha=0.5)
            left.plot(i, arms[arm]["mean"] if there else math.nan, "_", color=f"C{i}", ms=30)
            continue
        curves = [{r["step"]: r[shown] for r in metrics[run.folder] if shown in r}
                  for run in runs if run.arm == arm and run.folder in metrics]  # fmt: skip
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        drawn = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, steps)
        if steps:
            left.plot(steps, drawn.mean(0), ".-", label=arm, color=f"C{i}")
            left.fill_between(steps, drawn.min(0), drawn.max(0), alpha=0.2, color=f"C{i}", lw=0)
    if once:
        left.set_xticks(range(len(spec.arms)), spec.arms, rotation=20)
        left.set(ylabel=spec.figure, title="each seed, and their mean")
    else:
        left.set(xlabel="step", ylabel=shown, title="mean, and range over the seeds")
        left.legend()
    compared = [(i, name, arms[name]) for i, name in enumerate(spec.arms) if arms[name]["difference"] is not None]
    for place, (i, _, arm) in enumerate(compared):
        right.plot([arm["low"], arm["high"]], [place, place], lw=3, color=f"C{i}")
        right.plot(arm["difference"], place, "o", color=f"C{i}")
    right.axvline(0, color="black", lw=1)
    right.set_yticks(range(len(compared)), [name for _, name, _ in compared])
    right.set(xlabel=f"{spec.figure} − that of {spec.baseline}", title=f"{spec.better} is better")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------- all of it
def ablate(options: AblateOptions) -> None:
    """Trains what is missing, prints the table and writes it."""
    spec, out = read_spec(options.spec), Path(options.out)
    if not options.out:
        raise UserError("name the folder of the runs with --out")
    script = find_script(spec.script)
    with locked(out.resolve(), wait=False) as free:
        if not free:
            raise UserError(f"{out}: another ablation is at work here")
        check_flags(spec, script, out, options.spec)
        keep_spec(spec, out)
        chosen, notes = choose(spec, script, out, options.workers)
        runs = [make_run(spec, script, out, arm, seed, chosen[arm], False) for seed in spec.seeds for arm in spec.arms]
        train_all(runs, options.workers, spec)
        arms = judge(spec, runs)
        results = [read_result(path.parent) for path in out.glob("runs/*/*/result.json")]
        hours = sum(result.get("seconds", 0.0) for result in results) / 3600
        devices = {device_name(torch.device(result.get("device", "cpu"))) for result in results}
        notes.append(f"{len(results)} runs, {hours:.2f} hours in all, on {' and '.join(sorted(devices))}.")
        text = table(spec, arms, notes)
        result = {name: getattr(spec, name) for name in ("figure", "better", "baseline", "seeds")}
        result |= {"hours": hours, "arms": arms}
        write_text(out / "table.md", text)
        plot(spec, runs, arms, out / "result.png")
        write_json(out / "result.json", result)
    print("\n" + text)
    print(json.dumps({"out": str(out), **result}))
    if failed := [name for name, arm in arms.items() if arm["mean"] is None]:
        raise UserError(f"{out}: every run of {', '.join(failed)} failed, as their .log files tell")


def keep_spec(spec: Spec, out: Path) -> None:
    """Writes the spec beside its runs, or checks that it is the same as there, but for seeds, arms without a run and,
    without a sweep, the figure."""
    path, mine = out / "spec.json", asdict(spec)
    if path.is_file():
        before = read_json(path)
        free = {"seeds", "arms"} | (set() if spec.sweep else {"figure", "better"})
        changed = [name for name in mine if name not in free and mine[name] != before.get(name)]
        old = {arm: text for arm, text in before.get("arms", {}).items() if any(out.glob(f"runs/{arm}/*/config.json"))}
        changed += [f"arm {arm}" for arm in spec.arms if arm in old and old[arm] != spec.arms[arm]]
        if changed:
            raise UserError(f"{out} is of another spec ({', '.join(changed)}): name another --out")
        mine["arms"] = old | mine["arms"]
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there, and no ablation: name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, mine)
