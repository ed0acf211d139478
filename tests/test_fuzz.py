"""Files as nobody wrote them: whatever is in them, they open, or are refused in one line, soon and in little memory.

`pytest -m fuzz` tries MINI_FUZZ (100,000) mutations, spread over all formats; the ordinary suite a few of each. Each is
made of its file's name and a number, which a failure shows: `attempt` makes it again.
"""

import contextlib
import gzip
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY

from mini import load_run
from mini.ablate import read_spec
from mini.compression.teacher_cache import TeacherCache
from mini.evaluate import columns_of, read_choices
from mini.flags import Checked, UserError, field_names, parse_flags
from mini.model.bert import Bert
from mini.model.config import ModelConfig
from mini.model.gpt import GPT
from mini.presets import BERT_PRESETS, GPT_PRESETS
from mini.tasks.pairs import PromptAnswers
from mini.tasks.qa import read_squad
from mini.tensors import load_tensors
from mini.text.corpus import DataConfig, open_corpus
from mini.text.rows import read_rows
from mini.text.tokenizer import load_tokenizer, make_tokenizer
from mini.text.tokenizer_base import ByteTokenizer
from mini.text.tokens import open_tokens
from mini.training import checkpoints
from mini.training.loop import TrainConfig
from mini.training.optim import OptimConfig
from mini.training.start import read_settings

ROOT = Path(__file__).parent
FEW, ALL = 40, int(os.environ.get("MINI_FUZZ", 100_000))
ODD = [
    None, True, -1, 0, 1e308, -0.0, 2**31, 2**63, 10**30, 0.5, "", "x", "\ud800", "\u0000", "1e9", [], {}, [[]], [1],
    {"a": 1}, "nan", float("nan"), float("inf"), [0, 10**30], "../../../etc/passwd", 257.0, [None] * 3, "a" * 10_000,
]  # fmt: skip


# ---------------------------------------------------------------- files and what opens them
@pytest.fixture(scope="module")
def seeds(gpt, text_file, labelled, command, tmp_path_factory) -> dict:
    """{name: (folder or file, the file in it that is mutated, what opens it)}"""
    base = tmp_path_factory.mktemp("seeds")
    unfinished = base / "unfinished"
    command("train_gpt.py", "--data", text_file, *TINY, "--steps", 4, "--checkpoint_every", 2, "--out", unfinished)
    for name in ("model.safetensors", "result.json"):
        (unfinished / name).unlink()
    packed, int8, tokens = base / "packed", base / "int8", base / "tokens"
    command("compress.py", "prune", gpt, "--sparsity", 0.5, "--out", packed)
    command("compress.py", "quantize", gpt, "--scheme", "static", "--out", int8)
    command("-m", "mini", "tokens", text_file, "--vocab_size", 300, "--out", tokens)
    bin = base / "bin"
    shutil.copytree(ROOT / "fixtures" / "gpt2", bin)
    torch.save(load_tensors(bin / "model.safetensors"), bin / "pytorch_model.bin")
    (bin / "model.safetensors").unlink()
    files = base / "files"
    files.mkdir()
    (files / "a.txt").write_text("Some text. Ein Stück Text, 文字.\n\n" * 30)
    (files / "a.jsonl").write_text('{"text": "a b c"}\n{"text": "d"}\n' * 20)
    with gzip.open(files / "a.txt.gz", "wb") as file:
        file.write(b"packed text. " * 50)
    (files / "rows.csv").write_text('text,label\n"a, b",x\nc,y\n' * 3)
    (files / "rows.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": 3}\n')
    (files / "pairs.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 3)
    qa = {"question": "Who?", "id": "1", "answers": [{"text": "Cora", "answer_start": 0}]}
    content = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "Cora came.", "qas": [qa]}]}]}
    (files / "squad.json").write_text(json.dumps(content))
    (files / "choices.jsonl").write_text('{"context": "a b", "choices": ["c", " d"], "answer": 1}\n' * 3)
    spec = ['script = "train_gpt.py"', 'figure = "val_bpb"', 'better = "lower"', "seeds = [1, 2]", 'baseline = "a"',
            "tokens = 1e6", "[arms]", 'a = "--lr 0.1"', "b = ''", "[sweep.b]", "lr = [0.1, 0.2]"]  # fmt: skip
    (files / "spec.toml").write_text("\n".join(spec))
    cache = base / "cache"
    teacher = GPT(load_run(gpt)[0].config)
    inputs = {"tokens": torch.zeros(1, 4, dtype=torch.long)}
    TeacherCache(cache, teacher, 3, 1.0)(inputs, lambda: torch.randn(4, 257))
    (entry,) = cache.rglob("*.safetensors")

    def corpus(path: Path) -> None:
        for split in open_corpus(DataConfig(str(path), valid_fraction=0.3)):
            list(split.pieces())

    def cached(path: Path) -> None:
        TeacherCache(path, teacher, 3, 1.0)(inputs, lambda: torch.randn(4, 257))

    def resumed(path: Path) -> None:
        for checkpoint in checkpoints.checkpoints(path):
            checkpoints.difference(checkpoint)
        checkpoints.read_metrics(path)
        load_run(path)

    tokenizer = ByteTokenizer()
    state = next((unfinished / "checkpoints").glob("step-*")).relative_to(unfinished)
    found = {f"run {name}": (gpt, name, load_run) for name in
             ("config.json", "tokenizer.json", "model.safetensors", "result.json")}  # fmt: skip
    found |= {f"unfinished {name}": (unfinished, name, resumed) for name in
              ("config.json", "metrics.jsonl", *(f"{state}/{file}" for file in
               ("state.json", "model.safetensors", "optimizer.safetensors")))}  # fmt: skip
    found |= {"packed": (packed, "model.safetensors", load_run), "int8": (int8, "model.safetensors", load_run)}
    found |= {f"tokens {name}": (tokens, name, open_tokens) for name in
              ("meta.json", "train.tokens", "train.documents", "tokenizer.json", "tokenizer.tiktoken")}  # fmt: skip
    found |= {f"gpt2 {name}": (ROOT / "fixtures" / "gpt2", name, GPT.from_published) for name in
              ("config.json", "model.safetensors")}  # fmt: skip
    found |= {f"bert {name}": (ROOT / "fixtures" / "bert", name, Bert.from_published) for name in
              ("config.json", "model.safetensors")}  # fmt: skip
    found |= {f"modernbert {name}": (ROOT / "fixtures" / "modernbert", name, Bert.from_published) for name in
              ("config.json", "model.safetensors")}  # fmt: skip
    found |= {"bin": (bin, "pytorch_model.bin", GPT.from_published)}
    for kind in ("gpt2", "bert"):
        for file in ("vocab.json", "vocab.txt", "tokenizer.json"):
            if (ROOT / "fixtures" / kind / file).exists():
                found[f"{kind} {file}"] = (ROOT / "fixtures" / kind, file, load_tokenizer)
    found |= {"bpe tokenizer.json": (tokens, "tokenizer.json", load_tokenizer)}
    found |= {"ranks": (tokens, "tokenizer.tiktoken", lambda p: make_tokenizer(str(p / "tokenizer.tiktoken"), list, 0))}
    found |= {name: (files, name, opener) for name, opener in {
        "a.txt": lambda p: corpus(p / "a.txt"), "a.jsonl": lambda p: corpus(p / "a.jsonl"),
        "a.txt.gz": lambda p: corpus(p / "a.txt.gz"),
        "rows.csv": lambda p: read_rows(p / "rows.csv", ["text", "label"]),
        "rows.jsonl": lambda p: read_rows(p / "rows.jsonl", ["text", "label"]),
        "squad.json": lambda p: read_squad(p / "squad.json", []),
        "choices.jsonl": lambda p: (columns_of(str(p / "choices.jsonl")), [*read_choices(str(p / "choices.jsonl"))]),
        "spec.toml": lambda p: read_spec(p / "spec.toml"),
        "pairs.jsonl": lambda p: PromptAnswers(p / "pairs.jsonl", p / "pairs.jsonl", tokenizer, 32, 1, 2),
    }.items()}  # fmt: skip
    return found | {"teacher cache": (cache, str(entry.relative_to(cache)), cached)}


# ---------------------------------------------------------------- mutations
def mutate(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, exchanged; or a value of a JSON file replaced by another type."""
    if content[:1] in (b"{", b"[") and rng.random() < 0.6:
        with contextlib.suppress(ValueError):
            return json.dumps(mutate_value(json.loads(content), rng)).encode(errors="surrogatepass")
    if content[8:9] == b"{" and rng.random() < 0.5:  # a safetensors header
        with contextlib.suppress(ValueError):
            length = int.from_bytes(content[:8], "little")
            header = json.dumps(mutate_value(json.loads(content[8 : 8 + length]), rng)).encode()
            return len(header).to_bytes(8, "little") + header + content[8 + length :]
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, n = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 100))
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + n]
        elif kind == 2:
            out[at:at] = rng.randbytes(n)
        elif kind == 3:
            out[at : at + n] = rng.randbytes(n)
        elif kind == 4:
            del out[at:]
        else:
            other = rng.randrange(len(out) + 1)
            out[at : at + n] = out[other : other + n]
    return bytes(out)


def mutate_value(value: object, rng: random.Random) -> object:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: v for name, v in value.items() if name != key} | ({"odd": 1} if rng.random() < 0.3 else {})
        return value | {key: mutate_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], mutate_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def attempt(seeds: dict, name: str, seed: int, folder: Path, memory: int) -> str | None:
    """What went wrong with one mutation, or None. memory: bytes that it may take beside four times its folder's."""
    source, file, opener = seeds[name]
    rng = random.Random(f"{name} {seed}")
    path = folder / file
    path.unlink()
    path.write_bytes(mutate((source / file).read_bytes(), rng))
    limit_memory(memory + 4 * sum(path.stat().st_size for path in folder.rglob("*")))
    os.environ["MINI_UNCHECKED"] = rng.choice(("", "1"))  # also what a checksum would tell at once
    try:
        signal.alarm(10)
        opener(folder)
    except UserError as error:
        return None if "\n" not in str(error) else f"a message of several lines: {error}"
    except Late:
        return "more than 10 s"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
        del os.environ["MINI_UNCHECKED"]
    return None


class Late(BaseException):
    """No Exception, which what opens a file may take for one of the file's."""


def campaign(seeds: dict, names: list[str], each: int, memory: int, tmp_path: Path) -> list[str]:
    def late(*_: object) -> None:
        raise Late

    previous, failures = signal.signal(signal.SIGALRM, late), []
    try:
        for name in names:
            folder = tmp_path / name.replace(" ", "_").replace("/", "_")
            shutil.copytree(seeds[name][0], folder)
            failures += [
                f"{name} {seed}: {what}" for seed in range(each) if (what := attempt(seeds, name, seed, folder, memory))
            ]
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGALRM, previous)
        limit_memory(None)
    return failures


def limit_memory(more: int | None) -> None:
    """Lets this process take so many bytes more, as address space; None: as many as it likes."""
    if os.path.exists("/proc/self/statm"):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if more is None else used + more, most))


def test_a_few_mutations_of_every_format(seeds, tmp_path):
    assert not campaign(seeds, list(seeds), FEW, 2**30, tmp_path)  # room for other machines' libraries


@pytest.mark.fuzz
def test_many_mutations_of_every_format(seeds, tmp_path):
    each = ALL // len(seeds)
    failures = campaign(seeds, list(seeds), each, 32 * 2**20, tmp_path)
    print(f"\n{each * len(seeds):,} mutations of {len(seeds)} files, {len(failures)} failures")
    assert not failures, "\n".join(failures[:40])


class Evil:
    def __reduce__(self):
        return os.system, ("touch $MINI_EVIL",)


def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_EVIL", str(tmp_path / "run"))
    shutil.copytree(ROOT / "fixtures" / "gpt2", tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Evil()}))
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        GPT.from_published(tmp_path / "a")
    torch.save({"wte.weight": Evil()}, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        GPT.from_published(tmp_path / "a")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- command lines
VALUES = ["0", "1", "-1", "1e18", "1e308", "nan", "inf", "", " ", "x", "true", "6,6,4", "\udcff", "0.5", "1e-46"]


def all_options(cls: type = Checked) -> set[type]:
    return {cls, *(c for below in cls.__subclasses__() for c in all_options(below))} - {Checked}


for module in ("compress", "mini.__main__"):  # from which every command is imported
    importlib.import_module(module)
OPTIONS = sorted(all_options(), key=lambda cls: cls.__name__)
TRAINING = sorted(set().union(*map(field_names, (ModelConfig, TrainConfig, OptimConfig, DataConfig))))


def attempt_lines(each: int, seed: int) -> list[str]:
    """What went wrong with so many command lines for each class of options, and for what train_gpt.py and _bert.py ask.

    None of them is begun: a line that is read would train, as it says.
    """
    readers = []
    for cls in OPTIONS:
        readers.append((cls.__name__, sorted(field_names(cls)), partial(parse_flags, classes=[cls], description="")))
    for kind, presets in (("gpt", GPT_PRESETS), ("bert", BERT_PRESETS)):
        readers.append((kind, TRAINING, partial(read_settings, description="", kind=kind, presets=presets)))
    failures = []
    for name, flags, read in readers:
        for n in range(each):
            rng = random.Random(f"{name} {seed} {n}")
            chosen = rng.sample(flags, min(len(flags), rng.choice((1, 2, 5))))
            line = [word for flag in chosen for word in (f"--{flag}", rng.choice(VALUES))]
            try:
                read(line)
            except UserError as error:
                failures += [f"{name} {line}: several lines: {error}"] * ("\n" in str(error))
            except BaseException as error:
                failures.append(f"{name} {line}: {type(error).__name__}: {error}")
    return failures


def test_a_few_command_lines():
    assert not attempt_lines(40, 0)


@pytest.mark.fuzz
def test_many_command_lines():
    each = ALL // 100
    assert not attempt_lines(each, 1)[:40]
    print(f"\n{each * (len(OPTIONS) + 2):,} command lines for {len(OPTIONS) + 2} kinds of options")
