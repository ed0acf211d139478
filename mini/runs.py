"""Run folders. Whatever was trained or made smaller is a folder, and load_run() opens every kind.

config.json        what the run is: kind, task, and every setting
tokenizer.json     (and what it names) the tokenizer
metrics.jsonl      one object for each logged step
checkpoints/       step-00000250/ ...: weights, optimizer, state.json with their checksums
best.safetensors   while training: the weights with the best validation figure, where the task keeps them
model.safetensors  the final weights, and
result.json        the final figures: both are there once the run is finished
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import nn

from mini import prune, quant
from mini.bert import Bert
from mini.config import (
    TASK_CONFIGS,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    PruneConfig,
    QuantConfig,
    ReduceConfig,
    TrainConfig,
    UserError,
    from_dict,
)
from mini.gpt import GPT
from mini.storage import (
    atomic_folder,
    load_tensors,
    load_weights,
    read_json,
    remove_folder,
    save_tensors,
    settings_of,
    sha256,
    weights,
    write_json,
    write_text,
)
from mini.tokenizer import Tokenizer, load_tokenizer

try:
    import fcntl
except ImportError:
    fcntl = None

MODELS = {"gpt": GPT, "bert": Bert}
FORMAT = 1
MANY = 8  # differences between two runs: the others are only counted


@dataclass
class RunConfig:
    """Everything that determines a run's result: the same config on the same machine gives the same weights."""

    kind: str  # a key of MODELS
    task: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    task_options: object = None  # the task's own settings, of a class in TASK_CONFIGS
    init: str | None = None  # the run or published folder that the weights started from
    labels: list[str] = field(default_factory=list)  # of a classifier
    tokens: str = ""  # checksum of the training and validation tokens
    prune: PruneConfig | None = None  # what compress.py has done to the weights of init
    reduce: ReduceConfig | None = None
    distill: DistillConfig | None = None
    quant: QuantConfig | None = None  # in what form the matrices are

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / "config.json", {"format": FORMAT, **dataclasses.asdict(self)})


def read_config(folder: str | Path) -> RunConfig:
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: {'is a file, not a run folder' if Path(folder).exists() else 'no such run folder'}")
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder (it has no config.json); name one, or a new folder for --out")
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not written by this version of mini")
    parts = dict(model=ModelConfig, data=DataConfig, optim=OptimConfig, train=TrainConfig)
    optional = dict(task_options=TASK_CONFIGS.get(values.get("task")), prune=PruneConfig, reduce=ReduceConfig,
                    distill=DistillConfig, quant=QuantConfig)  # fmt: skip
    parts |= {name: cls for name, cls in optional.items() if values.get(name)}
    with settings_of("run", path):
        return from_dict(RunConfig, values | {name: from_dict(cls, values[name]) for name, cls in parts.items()})


def is_published(folder: str | Path) -> bool:
    """Whether a folder holds published weights: a config.json that is not one of ours."""
    path = Path(folder) / "config.json"
    return path.is_file() and "format" not in read_json(path)


# ---------------------------------------------------------------- opening
def load_run(folder: str | Path, device: str | torch.device = "cpu", kind: str | None = None):
    """(model in eval mode, tokenizer) of a run folder of any kind, or of a folder with published weights.

    An unfinished run gives its newest checkpoint. kind: "gpt" or "bert" where nothing else will do.
    Raises UserError if the folder is no run, is of another kind, or is damaged.
    """
    model, tokenizer = load_model(folder, kind), load_tokenizer(folder)
    check_vocabulary(model.config, tokenizer, folder)
    return model.to(device), tokenizer


def load_model(folder: str | Path, kind: str | None = None) -> nn.Module:
    """The model alone, on the CPU: published weights may come without a tokenizer."""
    folder = Path(folder)
    if is_published(folder):
        model = MODELS[published_kind(folder)].from_published(folder)
    else:
        config = read_config(folder)
        model, path = build(config), newest_weights(folder)
        tensors = {n: t for n, t in load_tensors(path).items() if not n.startswith("projections.")}  # while distilling
        tensors = prune.unpack(model, tensors, path)
        if config.quant:
            quant.prepare(model, quant.ranges_of(tensors))
            if path.parent == folder:  # a checkpoint holds what still learns
                quant.convert(model)
        load_weights(model, tensors, folder)
    if kind and model.kind != kind:
        raise UserError(f"{folder} holds a {model.kind.upper()}, but this needs a {kind.upper()}")
    return model.eval()


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, where: str | Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model knows {config.vocab_size:,}: "
            f"they do not belong together"
        )


def build(config: RunConfig) -> nn.Module:
    if config.kind not in MODELS:
        raise UserError(f"a run of kind {config.kind!r} is not one of {', '.join(MODELS)}")
    return MODELS[config.kind](config.model)


def published_kind(folder: Path) -> str:
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "gpt2" if "n_embd" in config else "bert")
    kinds = {"gpt2": "gpt", "bert": "bert"}
    if kind not in kinds:
        raise UserError(f"{folder}/config.json describes a {kind!r}; mini opens {' and '.join(kinds)}")
    return kinds[kind]


def newest_weights(folder: Path) -> Path:
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder}: the run has no weights yet (no model.safetensors and no whole checkpoint)")
    return checkpoint / "model.safetensors"


def save_model(model: nn.Module, folder: Path) -> int:
    """The final weights in the form that is served: int8, and of masked matrices only what stays. Returns the bytes."""
    model.cpu()
    if quant.is_prepared(model):
        quant.convert(model)
    save_tensors(folder / "model.safetensors", prune.pack(weights(model)))
    return (folder / "model.safetensors").stat().st_size


def start_from(model: nn.Module, start: nn.Module, where: str | Path, keep_classes: bool) -> None:
    """Copies the weights of another run: its whole stack, and of its heads those that the model has too; with masks.

    Other heads keep their fresh weights, and without keep_classes so does one for classes. A shorter max_len takes
    the first of the learned positions.
    """
    if quant.is_int8(start):
        quant.restore(start)
    masks = {name: mask for name, mask in prune.masks_of(start).items() if name in weights(model)}
    if masks:
        model.masks = prune.Masks(masks)
    found = weights(start)
    for name, fresh in weights(model).items():
        if name.startswith("classifier.") and not keep_classes:
            found[name] = fresh
        elif not name.startswith("stack."):
            found.setdefault(name, fresh)
        elif name == "stack.positions.weight" and name in found:
            found[name] = found[name][: len(fresh)]
    mine = weights(model)
    load_weights(model, {n: t for n, t in found.items() if n in mine or n.startswith("stack.")}, where)


def init_of(folder: str | Path) -> str | None:
    """The run that a run was made from; None for published weights."""
    return None if is_published(folder) else read_config(folder).init


def read_quant(folder: str | Path) -> QuantConfig | None:
    """How a run's matrices are quantized; None where they are not."""
    return None if is_published(folder) else read_config(folder).quant


def read_labels(folder: str | Path) -> list[str]:
    """The labels of a run's classification head; none where it has no such head."""
    if is_published(folder):
        names = read_json(Path(folder) / "config.json").get("id2label")
        try:
            return [str(names[i]) for i in sorted(names, key=int)]
        except (TypeError, ValueError):  # there are none, or not as they should be
            return []
    return read_config(folder).labels


# ---------------------------------------------------------------- starting and going on
def start_run(
    folder: Path, config: RunConfig, tokenizer: Tokenizer, overwrite: bool = False, main: bool = True
) -> IO | None:
    """Makes a run folder, or checks that the one there is the same run; all but the main process only check.

    Returns the main process's lock, which holds as long as it stays open.
    Raises UserError with the differences if the folder holds another run, or something else altogether.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name another folder with --out")
    for source in (config.init, config.distill and config.distill.init):
        if source and Path(source).resolve() == folder.resolve():
            raise UserError(f"{folder}: --out is the run to start from, which stays; name another folder")
    locked = lock(folder) if main else None
    if overwrite and main and folder.exists() and any(folder.iterdir()):
        read_config(folder)  # only a run is ever deleted
        remove_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        differences = compare(read_config(folder), config)
        if differences:
            if len(differences) > MANY:
                differences = [*differences[:MANY], f"and {len(differences) - MANY} more"]
            raise UserError(
                f"{folder} holds another run: {'; '.join(differences)}. Give the same flags to go on, another --out, "
                f"or --overwrite true"
            )
    elif folder.exists():  # perhaps a link or a mounted disk: filled, not replaced; config.json last
        tokenizer.save(folder)
        config.save(folder)
    else:
        with atomic_folder(folder) as temporary:
            tokenizer.save(temporary)
            config.save(temporary)
    return locked


def lock(folder: Path) -> IO | None:
    """Keeps other processes from training in this folder for as long as the returned file stays open.

    The lock lies beside the folder, so that it outlives --overwrite.
    """
    if fcntl is None:  # Windows
        return None
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder}: another process is training here") from None
    except OSError:  # some network file systems have no locks
        file.close()
        return None
    return file


def read_result(folder: Path) -> dict | None:
    """The final figures of a finished run, None for an unfinished one."""
    return read_json(folder / "result.json") if (folder / "result.json").is_file() else None


def compare(old: RunConfig, new: RunConfig) -> list[str]:
    """'lr was 0.02, now 0.01' for everything that differs and would change the result."""
    free = {f"train.{f.name}" for f in dataclasses.fields(TrainConfig) if f.metadata.get("resume")}
    before, now = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    names = sorted(name for name in before | now if before.get(name) != now.get(name) and name not in free)
    short = {name: name.rpartition(".")[2] for name in names}
    changes = [f"{short[name]} was {before.get(name)}, now {now.get(name)}" for name in names if name != "tokens"]
    return changes + (["the training text is another"] if "tokens" in names else [])


def flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


# ---------------------------------------------------------------- checkpoints
def save_checkpoint(folder: Path, model: nn.Module, optimizers: list, state: dict, keep: int) -> Path:
    """Writes checkpoints/step-N, N = state["step"], whole or not at all; deletes all but the newest `keep`."""
    path = folder / "checkpoints" / f"step-{state['step']:08d}"
    with atomic_folder(path) as temporary:
        save_tensors(temporary / "model.safetensors", weights(model))
        save_tensors(temporary / "optimizer.safetensors", optimizer_tensors(model, optimizers))
        checksums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        content = {**state, "sha256": checksums}
        write_json(temporary / "state.json", {**content, "check": digest(content)})
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name))


def newest_checkpoint(folder: Path, say: Callable = lambda text: None, before: int | None = None) -> Path | None:
    """The newest checkpoint, of a step before `before`, whose checksums hold; says which damaged ones it passed."""
    for path in reversed(checkpoints(folder)):
        if before is not None and step_of(path) >= before:
            continue
        try:
            state = read_json(path / "state.json")
            check = state.pop("check", None)
            whole = check == digest(state)
            whole = whole and all(sha256(path / name) == value for name, value in state["sha256"].items())
        except (UserError, FileNotFoundError, KeyError, AttributeError):
            whole = False
        if whole:
            return path
        say(f"{path} is damaged (its checksums do not match) and passed over")
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_checkpoint(path: Path, model: nn.Module, optimizers: list) -> dict:
    """Puts a checkpoint's weights and optimizer state into place and returns the state it was saved with."""
    load_weights(model, load_tensors(path / "model.safetensors"), path)
    tensors = load_tensors(path / "optimizer.safetensors")
    for index, optimizer in enumerate(optimizers):
        for name, parameter in named(model, optimizer):
            prefix = f"{index}/{name}/"
            found = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            # Copies: the file is only mapped, and an optimizer writes into its state.
            optimizer.state[parameter] = {key: t.to(parameter.device, copy=True) for key, t in found.items()}
    state = read_json(path / "state.json")
    return {name: value for name, value in state.items() if name not in ("sha256", "check")}


def optimizer_tensors(model: nn.Module, optimizers: list) -> dict[str, torch.Tensor]:
    """The state of all optimizers as '<number of optimizer>/<parameter>/<quantity>'."""
    return {
        f"{index}/{name}/{key}": value
        for index, optimizer in enumerate(optimizers)
        for name, parameter in named(model, optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def named(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in mine]


# ---------------------------------------------------------------- metrics.jsonl
def append_metrics(folder: Path, row: dict) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the line during which the process was killed
            break
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def rewind(folder: Path, step: int) -> None:
    """Drops what came after the checkpoint from which a run goes on: log lines, damaged and unfinished checkpoints."""
    later = [path for path in checkpoints(folder) if step_of(path) > step]
    for path in [*later, *(folder / "checkpoints").glob(".step-*.tmp")]:
        shutil.rmtree(path)
    text = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step)
    write_text(folder / "metrics.jsonl", text)
