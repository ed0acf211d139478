"""What a run's folder holds while it trains and once it has: checkpoints, metrics.jsonl, the final weights."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mini import storage
from mini.flags import UserError, from_dict
from mini.model import int8, sparse

LEARNING = "learning."  # before the names of what is never served


@dataclass
class State:
    """state.json: how far a run has come, and checksums."""

    step: int
    tokens: int
    seconds: float
    train_seconds: float
    best: dict | None
    sha256: dict[str, str]
    check: str  # of all of the above


def served(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights without what exists only while they learn."""
    return {name: tensor for name, tensor in storage.weights(model).items() if not name.startswith(LEARNING)}


def save_model(model: nn.Module, folder: Path) -> dict:
    """Writes the final weights as they are served: int8, of masked matrices what stays. Returns figures of that."""
    figures = {"sparsity": sparse.sparsity(model)} if sparse.masks_of(model) else {}
    model.cpu()
    if int8.is_prepared(model):
        int8.convert(model)
    storage.save_tensors(folder / "model.safetensors", sparse.pack(served(model)))
    return figures | {"bytes": (folder / "model.safetensors").stat().st_size}


def read_result(folder: Path) -> dict | None:
    """The final figures of a finished run, None for an unfinished one."""
    return storage.read_json(folder / "result.json") if (folder / "result.json").is_file() else None


# ---------------------------------------------------------------- checkpoints
def save_checkpoint(folder: Path, model: nn.Module, optimizers: list, state: dict, keep: int) -> Path:
    """Writes checkpoints/step-N, N = state["step"], whole or not at all; deletes all but the newest `keep`."""
    path = folder / "checkpoints" / f"step-{state['step']:08d}"
    with storage.atomic_folder(path) as temporary:
        storage.save_tensors(temporary / "model.safetensors", storage.weights(model))
        storage.save_tensors(temporary / "optimizer.safetensors", optimizer_tensors(model, optimizers))
        checksums = {file.name: storage.sha256(file) for file in sorted(temporary.iterdir())}
        content = {**state, "sha256": checksums}
        storage.write_json(temporary / "state.json", {**content, "check": digest(content)})
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
            state = vars(read_state(path))
            whole = state.pop("check") == digest(state)
            whole = whole and all(storage.sha256(path / name) == value for name, value in state["sha256"].items())
        except (UserError, FileNotFoundError):
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
    storage.load_weights(model, storage.load_tensors(path / "model.safetensors"), path)
    tensors = storage.load_tensors(path / "optimizer.safetensors")
    for index, optimizer in enumerate(optimizers):
        for name, parameter in named(model, optimizer):
            prefix = f"{index}/{name}/"
            found = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            # Copies: the file is only mapped, and an optimizer writes into its state.
            optimizer.state[parameter] = {key: t.to(parameter.device, copy=True) for key, t in found.items()}
    state = vars(read_state(path))
    return {name: value for name, value in state.items() if name not in ("sha256", "check")}


def read_state(checkpoint: Path) -> State:
    return from_dict(State, storage.read_json(checkpoint / "state.json"), checkpoint / "state.json")


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
    storage.write_text(folder / "metrics.jsonl", text)
