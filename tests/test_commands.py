"""What a user types, bad input included."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, last_json, metrics

from mini import bench, load_run

FIXTURE = Path(__file__).parent / "fixtures" / "gpt2"


@pytest.fixture(scope="module")
def run(text_file, command, tmp_path_factory):
    """A small pretrained run."""
    folder = tmp_path_factory.mktemp("runs") / "gpt"
    flags = ["train_gpt.py", "--data", text_file, *TINY, "--steps", 60, "--sample_every", 30, "--out", folder]
    done = command(*flags)
    assert "A sample:" in done.stdout and "python -m mini sample" in done.stdout
    return folder


def test_sample(run, command):
    greedy = [command("-m", "mini", "sample", run, "The cat", "--temperature", 0, "--max_new_tokens", 40).stdout]
    greedy.append(
        command(
            "-m", "mini", "sample", run, "The cat", "--temperature", 0, "--max_new_tokens", 40, "--use_cache", "false"
        ).stdout
    )
    assert greedy[0] == greedy[1] and greedy[0].startswith("The cat") and len(greedy[0]) > 20
    several = command("-m", "mini", "sample", run, "The cat", "A dog ran", "--temperature", 0, "--max_new_tokens", 40)
    assert several.stdout.startswith(greedy[0].rstrip("\n")) and "\nA dog ran" in several.stdout
    long = command("-m", "mini", "sample", run, "The cat " * 20, "--max_new_tokens", 1).stderr
    assert "of its 160 tokens only the last 32 are seen" in long
    drawn = [command("-m", "mini", "sample", run, "The", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_classify(run, labelled, tmp_path, command):
    flags = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv", "--out", tmp_path / "c"]
    more = ["--epochs", 6, "--lr", 3e-3, "--device", "cpu", "--dtype", "float32"]  # as the command classifies
    done = command("train_gpt.py", "--task", "classify", "--init", run, *flags, *more)
    result = last_json(done)
    assert set(result["classes"]) == {"good", "bad"} and result["classes"]["good"]["n"] == 6
    answer = command("-m", "mini", "classify", tmp_path / "c", "a lovely film number 3", "a dull film number 4").stdout
    assert answer.startswith("label\tprobability\ttext\n") and len(answer.splitlines()) == 3
    rows = command("-m", "mini", "classify", tmp_path / "c", labelled / "valid.tsv").stdout.splitlines()
    truth = [line.split("\t")[1] for line in (labelled / "valid.tsv").read_text().splitlines()[1:]]
    hits = [row.split("\t")[0] == label for row, label in zip(rows[1:], truth, strict=True)]
    assert result["accuracy"] == sum(hits) / 12 == sum(result["confusion"][i][i] for i in (0, 1)) / 12
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "a", "text_b": "b"}\n{"text": "c"}\n')
    assert "unlike in" in command("-m", "mini", "classify", tmp_path / "c", mixed, status=2).stderr
    refused = command("-m", "mini", "classify", run, "text", status=2)
    assert "is not a classifier" in refused.stderr


def test_pairs(run, tmp_path, command):
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--train", tmp_path / "pairs.jsonl", "--valid", tmp_path / "pairs.jsonl", "--out", tmp_path / "p"]
    more = ["--epochs", 40, "--optimizer", "muon", "--lr", 0.02, "--batch_size", 25, "--device", "cpu"]
    result = last_json(command("train_gpt.py", "--task", "pairs", "--init", run, *flags, *more))
    assert result["val_loss"] < metrics(tmp_path / "p")[0]["loss"]
    model, tokenizer = load_run(tmp_path / "p")
    prompt = torch.tensor([tokenizer.encode("3+4=")])
    answer = model.generate(prompt, 20, stop=[tokenizer.eot])[0].tolist()
    shown = command("-m", "mini", "sample", tmp_path / "p", "3+4=", "--temperature", 0, "--max_new_tokens", 20).stdout
    assert shown.removesuffix("\n") == tokenizer.decode([i for i in answer if i != tokenizer.eot])


def test_steps_instead_of_epochs(run, labelled, tmp_path, command):
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv", "--device", "cpu"]
    more = ["--init", run, "--steps", 2, "--out", tmp_path / "c"]
    assert last_json(command("train_gpt.py", "--task", "classify", *files, *more))["steps"] == 2


def test_fine_tuning_from_published_weights(labelled, tmp_path, command):
    """The fixture has 61 tokens, fewer than any byte-level tokenizer: a table of the right size is put in."""
    from mini.tensors import load_tensors, save_tensors

    published = tmp_path / "published"
    published.mkdir()
    config = json.loads((FIXTURE / "config.json").read_text()) | {"vocab_size": 300}
    (published / "config.json").write_text(json.dumps(config))
    tensors = load_tensors(FIXTURE / "model.safetensors")
    name = next(name for name in tensors if name.endswith("wte.weight"))
    save_tensors(published / "model.safetensors", tensors | {name: tensors[name][:1].repeat(300, 1)})
    files = ["--train", labelled / "train.tsv", "--valid", labelled / "valid.tsv", "--device", "cpu"]
    argv = ["train_gpt.py", "--task", "classify", "--init", published, *files, "--steps", 2, "--out", tmp_path / "c"]
    assert "no tokenizer" in command(*argv, status=2).stderr
    command(*argv, "--tokenizer", "bytes")
    assert json.loads((tmp_path / "c" / "config.json").read_text())["model"]["d_model"] == 16


def test_tokens_then_train(text_file, tmp_path, command):
    made = command("-m", "mini", "tokens", text_file, "--out", tmp_path / "tokens", "--vocab_size", 300)
    assert last_json(made)["train"] > 1000
    small = ["--n_layers", 1, "--n_heads", 2, "--d_model", 16, "--max_len", 16, "--steps", 2, "--out", tmp_path / "run"]
    command("train_gpt.py", "--data", tmp_path / "tokens", *small)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["vocab_size"] == 300


def test_bench_measures(command):
    small = ["--n_layers", 1, "--d_model", 32, "--n_heads", 2, "--max_len", 32, "--vocab_size", 64, "--new_tokens", 8]
    figures = last_json(command("-m", "mini", "bench", *small, "--steps", 20, "--repeats", 1, "--compile", "false"))
    assert figures["train_tokens_per_s"] > 0 and figures["generate_tokens_per_s_batch_8"] > 0
    size = [*small[:-2], "--batch_size", 2, "--steps", 20]
    figures = last_json(command("-m", "mini", "bench", "--what", "distill", *size, "--vocab_size", 260))
    ratio = (figures["minilm_ms"] - figures["teacher_ms"]) / figures["plain_ms"]
    assert figures["minilm"] == pytest.approx(ratio) and figures["plain_ms"] > 0


def test_bench_of_presets_and_profiles(command, tmp_path, monkeypatch):
    """--what gpu, with presets that a CPU can train."""
    monkeypatch.setattr(bench, "ON_GPUS", ("char", "bert-laptop"))
    few = ["--what", "gpu", "--device", "cpu", "--batch_size", 1, "--steps", 20, "--compile", "false"]
    figures = last_json(command("-m", "mini", "bench", *few))
    assert all(figures[f"{name}_{of}"] > 0 for name in bench.ON_GPUS for of in ("tokens_per_s", "mfu", "memory_mb"))
    small = ["--n_layers", 1, "--d_model", 32, "--n_heads", 2, "--max_len", 32, "--vocab_size", 64, "--steps", 20]
    done = command("-m", "mini", "bench", "--what", "train", *small, "--profile", tmp_path / "profile")
    calls = [line for line in done.stdout.splitlines() if " x " in line]
    assert len(calls) == 10 and any("aten::addmm" in line or "aten::mm" in line for line in calls)
    assert json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert (
        "--profile: of a training"
        in command("-m", "mini", "bench", "--what", "tokens", "--profile", "x", status=2).stderr
    )


def refusals(folder):
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("too short")
    (folder / "plenty.txt").write_text("more than enough " * 100)
    (folder / "latin.txt").write_bytes("naïve ".encode("latin-1") * 100)
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text(
        '{"format": 1, "task": "lm", "kind": "parrot", "model": {}, "data": {}, "optim": {}, "train": {}}'
    )
    config = json.loads((FIXTURE / "config.json").read_text())
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text(json.dumps(config))
    (folder / "published").mkdir()
    (folder / "published" / "config.json").write_text('{"model_type": "t5"}')
    lm = ["train_gpt.py", *TINY, "--steps", 1, "--out", folder / "run", "--data"]
    return {
        "missing": ([*lm, folder / "nowhere.txt"], "nowhere.txt"),
        "empty": ([*lm, folder / "empty.txt"], "empty.txt"),
        "short": ([*lm, folder / "short.txt"], "smaller --max_len"),
        "not utf-8": ([*lm, folder / "latin.txt"], "--errors replace"),
        "unknown flag": (["train_gpt.py", "--n_layer", 3], "did you mean --n_layers?"),
        "unknown preset": (["train_gpt.py", "--preset", "gpt3"], "unknown preset gpt3"),
        "unknown task": (["train_gpt.py", "--task", "sing"], "--task sing: choose one of lm, denoise, classify, pairs"),
        "indivisible width": (["train_gpt.py", "--d_model", 100, "--n_heads", 3], "not divisible by --n_heads 3"),
        "indivisible batch": ([*lm, folder / "short.txt", "--max_len", 4, "--accumulation", 3], "cannot be cut"),
        "no device": (["train_gpt.py", "--device", "cuda:99"], "--device cuda:99"),
        "no files": (["train_gpt.py", "--task", "classify"], "needs --train FILE and --valid FILE"),
        "unknown tokenizer": (["train_gpt.py", "--tokenizer", "nonsense"], "nonsense"),
        "no such run": (["-m", "mini", "sample", folder / "gone", "x"], "no such run folder"),
        "not a run": (["-m", "mini", "sample", folder, "x"], "not a run folder"),
        "another kind": (["-m", "mini", "sample", folder / "other", "x"], "a run of kind 'parrot'"),
        "no weights": (["-m", "mini", "sample", folder / "half", "x"], "no model.safetensors"),
        "steps and epochs": (["train_gpt.py", "--steps", 5, "--epochs", 2], "give one of them"),
        "negative rate": (["train_gpt.py", "--lr", -1], "--lr -1.0: must be at least 0"),
        "not a number": (["train_gpt.py", "--lr", "nan"], "--lr nan"),
        "a file as --out": ([*lm[:-2], folder / "empty.txt", "--data", folder / "plenty.txt"], "empty.txt"),
        "another architecture": (["-m", "mini", "sample", folder / "published", "x"], "t5"),
        "unknown command": (["-m", "mini", "smaple"], "did you mean sample?"),
    }


CASES = [
    "missing", "empty", "short", "not utf-8", "unknown flag", "unknown preset", "unknown task", "indivisible width",
    "indivisible batch", "no device", "no files", "unknown tokenizer", "no such run", "not a run", "another kind",
    "another architecture", "unknown command", "no weights", "steps and epochs", "negative rate", "not a number",
    "a file as --out",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_status_2(case, tmp_path, command):
    argv, message = refusals(tmp_path)[case]
    before = sorted(tmp_path.rglob("*"))
    done = command(*argv, status=2)
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_empty_prompt(run, command):
    done = command("-m", "mini", "sample", run, "", status=2)
    assert "PROMPTS: it is empty" in done.stderr


def test_errors_replace_goes_on(tmp_path, command):
    (tmp_path / "latin.txt").write_bytes("naïve ".encode("latin-1") * 100)
    small = [*TINY, "--steps", 1, "--data", tmp_path / "latin.txt", "--out", tmp_path / "run"]
    command("train_gpt.py", *small, "--errors", "replace")


def test_damaged_weights_file(run, tmp_path, command):
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    done = command("-m", "mini", "sample", tmp_path / "run", "x", status=2)
    assert "model.safetensors" in done.stderr and done.stderr.count("\n") == 1
