"""Ablations: what a spec may say, runs that are made once, whatever happens, and the table they end in."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, command_line, environment, last_json, metrics, run_here

from mini import ablate
from mini.errors import UserError

SPEC = """
script = "train_gpt.py"
flags = "--steps 9"
figure = "val_bpb"
better = "lower"
seeds = [1, 2]
baseline = "a"
[arms]
a = "--lr 0.01"
b = "--lr 0.02"
"""


def read(tmp_path, text: str) -> ablate.Spec:
    (tmp_path / "spec.toml").write_text(text)
    return ablate.read_spec(tmp_path / "spec.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "ablations").glob("*.toml")), ids=lambda path: path.stem)
def test_the_specs_that_are_there(path):
    """And of those with a result, it is theirs."""
    spec, result = ablate.read_spec(path), path.parent / "results" / f"{path.stem}.json"
    if result.exists():
        found = json.loads(result.read_text())
        assert [found[name] for name in ("figure", "better", "baseline", "seeds")] == [
            spec.figure, spec.better, spec.baseline, spec.seeds]  # fmt: skip
        assert found["arms"].keys() == spec.arms.keys()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seeds", "seed", "seed: no such entry (did you mean seeds?)"),
        ('figure = "val_bpb"', "", "no 'figure'"),
        ("[1, 2]", '["1"]', "seeds[0] should be a whole number"),
        ("[1, 2]", "[1, 1]", "seeds = [1, 1]"),
        ("[1, 2]", "[]", "seeds = []"),
        ("[1, 2]", "[1, -2]", "seeds = [1, -2]"),
        ('"lower"', '"less"', "better = 'less'"),
        ("train_gpt.py", "train_gtp.py", "script 'train_gtp.py' (did you mean train_gpt.py?)"),
        ('"a"', '"c"', "baseline 'c'"),
        ("--lr 0.02", "--lrr 0.02", "arm b: train_gpt.py has no flag --lrr (did you mean lr?)"),
        ("--lr 0.02", "--seed 3", "--seed is given by ablate"),
        ("--steps 9", "--out x", "--out is given by ablate"),
        ("--lr 0.02", "--lr much", "arm b: --lr much: expected a number"),
        ("--lr 0.02", "--d_model 31 --n_heads 3", "arm b: --d_model 31 is not divisible by --n_heads 3"),
        ("--lr 0.02", "--preset laptpo", "arm b: unknown preset laptpo (did you mean laptop"),
        ("[arms]", "tokens = 1e5\n[arms]", "arm a: --steps and --tokens: give one of them"),
        ("[arms]", "[sweep]\nlr = [-1]\n[arms]", "arm a: --lr -1.0: must be at least 0"),
        ("--lr 0.02", "--lr '0.02", "No closing quotation"),
        ("b = ", '"../b" = ', "arm '../b'"),
        ("b = ", "b = = ", "not TOML"),
        ("better", "tokens = 1e5\nflops = 1e9\nbetter", "tokens and flops: give one"),
        ("[arms]", "[sweep]\nlr = 0.1\n[arms]", "sweep: lr = 0.1: a list of texts and numbers"),
        ("[arms]", "[sweep]\nlr = [1979-05-27]\n[arms]", "a list of texts and numbers"),
        ("better", "tokens = inf\nbetter", "tokens and flops: give one of them, more than 0"),
        ("[arms]", "[sweep.c]\nlr = [0.1]\n[arms]", "sweep.c: no such arm"),
        ("[arms]", "[sweep]\nlrr = [0.1]\n[arms]", "has no flag --lrr"),
        ("[arms]", "sweep_seed = 2\n[sweep]\nlr = [0.1]\n[arms]", "sweep_seed = 2"),
    ],
)
def test_specs_that_cannot_be_run(tmp_path, command, old, new, message):
    (tmp_path / "spec.toml").write_text(SPEC.replace(old, new, 1) if old in SPEC else "")
    done = command("-m", "mini", "ablate", tmp_path / "spec.toml", "--out", tmp_path / "out", status=2)
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_every_combination_and_may_be_of_one_arm(tmp_path):
    spec = read(tmp_path, SPEC + "[sweep]\nlr = [0.1, 0.2]\n[sweep.b]\nlr = [1]\nclip = [0, 1.5]\n")
    assert spec.settings("a") == [{"lr": "0.1"}, {"lr": "0.2"}]
    assert spec.settings("b") == [{"lr": "1", "clip": "0"}, {"lr": "1", "clip": "1.5"}]
    assert spec.sweep_seed == 0 and read(tmp_path, SPEC).settings("a") == [{}]
    made = ablate.make_run(spec, tmp_path / "s.py", tmp_path, "b", 7, spec.settings("b")[1], False)
    assert replace(spec, tokens=1234567.0).budget() == ["--tokens", "1234567.0"]  # to the last digit
    assert made.argv[2:] == ["--steps", "9", "--lr", "0.02", "--lr", "1", "--clip", "1.5", "--seed", "7",
                             "--out", str(tmp_path / "runs" / "b" / "7")]  # fmt: skip


def test_a_best_value_at_the_edge_of_a_sweep_is_told(tmp_path, monkeypatch):
    spec = read(tmp_path, SPEC + "[sweep]\nlr = [3e-3, 0.01, 1e-3]\nactivation = ['gelu', 'relu2']\nclip = [1]\n")
    best = {"a": "0.01", "b": "0.003"}  # of which one has 0.001 and 0.01 around it
    monkeypatch.setattr(ablate, "train_all", lambda runs, workers, spec: None)
    monkeypatch.setattr(
        ablate, "figure_of", lambda run, spec, name: float(f"lr={best[run.arm]}," not in str(run.folder))
    )
    chosen, (a, b) = ablate.choose(spec, tmp_path, tmp_path, 1)
    assert {arm: setting["lr"] for arm, setting in chosen.items()} == best
    assert a.endswith("may be better: --lr 0.01") and "edge" not in b


def test_the_verdict_of_made_up_runs(tmp_path, monkeypatch):
    spec = read(tmp_path, SPEC.replace("[1, 2]", "[1, 2, 3, 4]") + 'c = ""\nd = ""\n')
    figures = {"a": [2.0, 2.1, 1.9, 2.0], "b": [1.5, 1.61, 1.4, 1.49], "c": [2.1, None, 1.8, 2.0], "d": [None] * 4}
    runs = [ablate.make_run(spec, tmp_path, tmp_path, arm, seed, {}, False) for seed in spec.seeds for arm in spec.arms]
    for run in runs:
        if figures[run.arm][run.seed - 1] is None:
            run.failure = "it fell"
    monkeypatch.setattr(ablate, "figure_of", lambda run, spec: figures[run.arm][run.seed - 1])
    arms = ablate.judge(spec, runs)
    assert {name: arm["values"] for name, arm in arms.items()} == figures
    assert arms["b"]["difference"] == pytest.approx(-0.5) and arms["b"]["verdict"] == "better"
    assert arms["c"]["difference"] == pytest.approx(0) and arms["c"]["verdict"].startswith("no difference shown")
    assert arms["d"]["mean"] is None and arms["d"]["verdict"] is None and arms["a"]["difference"] is None
    text = ablate.table(spec, arms, ["a note"])
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "| 2.0000 ± 0.0816 |" in rows["a"] and rows["a"].endswith("| baseline |")
    assert "| 3 of 4 |" in rows["c"] and "-0.5000" in rows["b"] and "97.5%" in rows["b"]
    assert "a note" in text and text.count("it fell") == 2  # of c one seed, of d all in one line
    ablate.plot(spec, [], arms, tmp_path / "result.png")  # without curves


def test_an_ablation_that_is_killed_goes_on(text_file, tmp_path, cache, command, monkeypatch):
    """It trains what is missing and nothing twice; an arm that is refused is reported; other specs are refused."""
    path, out = tmp_path / "spec.toml", tmp_path / "out"
    tiny = " ".join(map(str, [*TINY, "--data", text_file, "--eval_every", 0, "--sample_every", 0, "--log_every", 1]))
    spec = SPEC.replace("--steps 9", tiny).replace("[1, 2]", "[1]").replace("better", "tokens = 2560\nbetter")
    path.write_text(spec.replace("tokens = 2560", "tokens = 1e9"))
    argv = command_line("-m", "mini", "ablate", path, "--out", out)
    first = subprocess.Popen(argv, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = out / "runs" / "a" / "1" / "metrics.jsonl"
    while not log.exists():
        time.sleep(0.05)
        assert first.poll() is None
    number = signal.SIGKILL if sys.platform == "linux" else signal.SIGTERM  # elsewhere its trainings outlive a kill
    os.kill(first.pid, number)
    first.wait()
    time.sleep(0.5)
    size = log.stat().st_size
    time.sleep(0.5)
    assert log.stat().st_size == size  # nobody goes on behind its back
    path.write_text(spec + 'c = "--data nofile.txt"\n')
    done = command("-m", "mini", "ablate", path, "--out", out, status=2)
    assert "is of another spec (tokens)" in done.stderr
    out = tmp_path / "again"
    done = command("-m", "mini", "ablate", path, "--out", out, "--workers", 3, status=2)
    assert "every run of c failed" in done.stderr
    result = last_json(done)
    assert {name: len(arm["values"]) for name, arm in result["arms"].items()} == {"a": 1, "b": 1, "c": 1}
    assert "nofile.txt" in result["arms"]["c"]["failures"]["1"]
    assert [arm["verdict"] for arm in result["arms"].values()] == [None, None, None]  # of one seed
    for arm in "ab":
        run = out / "runs" / arm / "1"
        assert metrics(run)[-1]["step"] == 10  # 2,560 tokens in batches of 8 x 32
        assert result["arms"][arm]["values"] == [json.loads((run / "result.json").read_text())["val_bpb"]]

    def begin(run: ablate.Run, threads: int) -> None:
        done = run_here([Path(run.argv[1]).name, *run.argv[2:]], cache)
        run.process = SimpleNamespace(poll=lambda: done.returncode, returncode=done.returncode)
        run.log.write_text(done.stderr)

    monkeypatch.setattr(ablate, "begin", begin)  # in this process: the others took long enough to start
    path.write_text(spec.replace("[1]", "[1, 2]"))
    before = (out / "runs" / "a" / "1" / "result.json").stat().st_mtime_ns
    more = last_json(command("-m", "mini", "ablate", path, "--out", out, "--workers", 2))
    assert (out / "runs" / "a" / "1" / "result.json").stat().st_mtime_ns == before
    assert more["arms"]["b"]["verdict"] and more["arms"]["a"]["values"][0] == result["arms"]["a"]["values"][0]
    assert json.loads((out / "result.json").read_text()) == {n: v for n, v in more.items() if n != "out"}
    path.write_text(spec.replace("--lr 0.02", "--lr 0.03"))
    assert "another spec (arm b)" in command("-m", "mini", "ablate", path, "--out", out, status=2).stderr
    path.write_text(spec.replace("val_bpb", "val_bbp") + 'c = ""\n')  # no run of c has begun
    done = command("-m", "mini", "ablate", path, "--out", out, status=2)
    assert "figure 'val_bbp' (did you mean val_bpb?)" in done.stderr


def test_a_folder_with_something_else_is_left_alone(tmp_path, command):
    (tmp_path / "spec.toml").write_text(SPEC)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    done = command("-m", "mini", "ablate", tmp_path / "spec.toml", "--out", tmp_path / "out", status=2)
    assert "no ablation" in done.stderr and [p.name for p in (tmp_path / "out").iterdir()] == ["note"]


def test_unreadable_specs(tmp_path, command):
    for name, content in (("none.toml", None), ("bytes.toml", b"\xff\xfe")):
        if content:
            (tmp_path / name).write_bytes(content)
        done = command("-m", "mini", "ablate", tmp_path / name, "--out", tmp_path / "out", status=2)
        assert name in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(UserError, match="train_gtp"):
        ablate.find_script("train_gtp.py")
