"""What a run's folder holds while it trains and once it has: checkpoints, metrics.jsonl, the final weights."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mini import storage
from mini.flags import UserError, from_dict, of_type
from mini.model import int8, lora, sparse
from mini.tensors import Rows, held, load_tensors, load_weights, put, save_tensors, weights, write_tensors
from mini.training.ranks import World

LEARNING = "learning."  # before the names of what is never served
FINAL = ("config.json", "tokenizer.json", "tokenizer.tiktoken", "vocab.txt", "model.safetensors")  # a finished run
BEST = re.compile(r"best-\d+\.safetensors")  # the weights of the best step so far
CHANGED = (
    "damaged, or changed since the run was finished: copy it again (or, if it was meant to be, set MINI_UNCHECKED=1)"
)


@dataclass
class State:
    """state.json: how far a run has come, and checksums."""

    step: int
    tokens: int
    seconds: float
    train_seconds: float
    best: dict | None  # the figures of the best step so far, and
    sha256: dict[str, str]
    check: str  # of all the others
    best_sha256: str = ""  # of its weights, in best-STEP.safetensors
    config: str = ""  # SHA-256 of the config.json of the run that it belongs to
    scale: float = 1.0  # of the losses, whose gradients float16 would lose; and
    good: int = 0  # how many steps it has been right for


def served(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights without what exists only while they learn, which adapters have learnt in them."""
    return {
        name: tensor for name, tensor in lora.merged(weights(model), LEARNING).items() if not name.startswith(LEARNING)
    }


def save_model(model: nn.Module, folder: Path, world: World) -> dict:
    """Writes the final weights as they are served: int8, of masked matrices what stays. Returns figures of that."""
    figures = {"sparsity": sparse.sparsity(model)} if sparse.masks_of(model) else {}
    if not world.sharded:
        model.cpu()
    if int8.is_prepared(model):
        int8.convert(model)
    save_together(folder / "model.safetensors", sparse.pack(served(model)), world)
    return figures | {"bytes": (folder / "model.safetensors").stat().st_size}


def save_together(path: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Writes one file, atomically: the main process alone or, of what is sharded, each process its rows."""
    if not world.sharded:
        save_tensors(path, tensors)
        return
    with storage.atomic_file(path) if world.main else contextlib.nullcontext() as temporary:
        shared = Path(world.agree(str(temporary)))
        write_tensors(shared, {name: held(tensor) for name, tensor in tensors.items()}, lead=world.main)
        storage.fsync(shared)
        world.wait()
    world.wait()  # until it has its name


def write_result(folder: Path, result: dict) -> None:
    """result.json: the final figures, and checksums of all that the finished run is."""
    files = [folder / name for name in FINAL if (folder / name).is_file()]
    content = {**result, "sha256": {path.name: storage.sha256(path) for path in files}}
    storage.write_json(folder / "result.json", {**content, "check": digest(content)})


def read_result(folder: Path, files: bool = False) -> dict | None:
    """The final figures of a finished run, None for an unfinished one.

    Raises UserError where they, or with files=True any file of the run, are not what they were then.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    result = storage.read_json(path)
    check, whole = result.pop("check", None), digest(result)
    checksums = of_type(result.pop("sha256", {}), dict[str, str], f"{path}: sha256")  # none in runs of older versions
    if os.environ.get("MINI_UNCHECKED") != "1":
        if check not in (None, whole) or "val_loss" not in result:
            raise UserError(f"{path}: {CHANGED}")
        for name, checksum in checksums.items() if files else ():
            if not (folder / name).is_file() or storage.sha256(folder / name) != checksum:
                raise UserError(f"{folder / name}: {CHANGED}")
    return result


# ---------------------------------------------------------------- checkpoints
class Writer:
    """Writes checkpoints beside the training, one at a time, from a copy of what they hold.

    The main process writes them or, of what is sharded, every process its rows into the same files. They talk through
    the files alone, for the training's own messages are on their way meanwhile: a process that has written its rows
    leaves the mark .done-RANK, or .failed-RANK, and the main one ends the checkpoint once all marks are there.
    """

    def __init__(self, folder: Path, keep: int, world: World):
        self.folder, self.keep, self.world = folder, keep, world
        self.made_by = world.agree(storage.maker()) if world.sharded else ""
        self.thread, self.pending, self.left = ThreadPoolExecutor(1), None, threading.Event()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is not None and self.world.sharded:  # the others' rows may never come
            self.left.set()
        self.thread.shutdown()

    def save(self, model: nn.Module, optimizers: list, state: dict) -> None:
        """Begins to write checkpoints/step-N, N = state["step"], whole or not at all."""
        self.wait()
        files = {"model.safetensors": weights(model), "optimizer.safetensors": optimizer_tensors(model, optimizers)}
        copies = {}
        for file, tensors in files.items():
            rows = {name: held(tensor) for name, tensor in tensors.items()}
            copies[file] = {name: r._replace(tensor=r.tensor.to("cpu", copy=True)) for name, r in rows.items()}
        self.pending = self.thread.submit(self.write, copies, dict(state))

    def check(self) -> None:
        """Raises what went wrong, as soon as it has."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self) -> Path | None:
        """Until the last one is on the disk; returns it. Raises what went wrong there."""
        pending, self.pending = self.pending, None
        return pending.result() if pending else None

    def write(self, files: dict[str, dict[str, Rows]], state: dict) -> Path:
        path = self.folder / "checkpoints" / f"step-{state['step']:08d}"
        if not self.world.main:
            temporary = storage.beside(path.resolve(), self.made_by)
            try:
                with storage.naming(path):
                    temporary.mkdir(parents=True, exist_ok=True)
                    for name, rows in files.items():
                        write_tensors(temporary / name, rows, lead=False)
                        storage.fsync(temporary / name)
                (temporary / f".done-{self.world.rank}").touch()
            except OSError:
                (temporary / f".failed-{self.world.rank}").touch()
                raise
            return path
        with storage.atomic_folder(path) as temporary:
            for name, rows in files.items():
                write_tensors(temporary / name, rows)
            for rank in range(1, self.world.size if self.world.sharded else 1):
                while not (mark := temporary / f".done-{rank}").exists():
                    if (temporary / f".failed-{rank}").exists() or self.left.wait(0.02):
                        raise UserError(f"{path}: not written, as the rows of rank {rank} did not come")
                mark.unlink()
            checksums = {file.name: storage.sha256(file) for file in sorted(temporary.iterdir())}
            content = {**state, "config": storage.sha256(self.folder / "config.json"), "sha256": checksums}
            storage.write_json(temporary / "state.json", {**content, "check": digest(content)})
        for old in checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)
        drop_best(self.folder, best_steps(self.folder))
        return path


def best_file(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}.safetensors"


def best_steps(folder: Path) -> set[int]:
    """The steps whose weights were the best when a checkpoint was written, which goes on with them."""
    steps = set()
    for path in checkpoints(folder):
        with contextlib.suppress(UserError, KeyError, TypeError):  # damaged, or it has none
            steps.add(read_state(path).best["best_step"])
    return steps


def drop_best(folder: Path, keep: set[int] = frozenset()) -> None:
    """Deletes the best weights of all steps but these."""
    kept = {best_file(folder, step).name for step in keep}
    for path in folder.glob("best-*.safetensors"):
        if BEST.fullmatch(path.name) and path.name not in kept and path.is_file():
            path.unlink()


def keep_best(folder: Path, model: nn.Module, step: int, world: World) -> str:
    """Writes the weights of the best step so far; returns their checksum."""
    save_together(best_file(folder, step), served(model), world)
    if world.main:
        drop_best(folder, best_steps(folder) | {step})
    return storage.sha256(best_file(folder, step)) if world.main else ""


def load_best(folder: Path, model: nn.Module, state: dict) -> None:
    """Puts the weights of the best step into place. Raises UserError where they are not those that were measured."""
    path = best_file(folder, state["best"]["best_step"])
    if not path.is_file() or storage.sha256(path) != state["best_sha256"]:
        raise UserError(
            f"{path}: missing or damaged: the weights of the best step are lost; --overwrite true begins anew"
        )
    load_weights(model, load_tensors(path), path)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name))


def newest_checkpoint(folder: Path, say: Callable = lambda text: None, before: int | None = None) -> Path | None:
    """The newest checkpoint, of a step before `before`, whose checksums hold; says which damaged ones it passed."""
    for path in reversed(checkpoints(folder)):
        if before is not None and step_of(path) >= before:
            continue
        if not (wrong := difference(path)):
            return path
        say(f"{path} {wrong} and is passed over")
    return None


def difference(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    folder = path.parents[1]
    try:
        state, content = read_state(path), storage.read_json(path / "state.json")
        files = {path / name: checksum for name, checksum in state.sha256.items()}
        if state.best and state.best_sha256:
            files[best_file(folder, state.best["best_step"])] = state.best_sha256
        whole = content.pop("check") == digest(content) and step_of(path) == state.step
        whole = whole and all(storage.sha256(file) == checksum for file, checksum in files.items())
    except (UserError, OSError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        return "is damaged (its checksums do not match)"
    if state.config not in ("", storage.sha256(folder / "config.json")) and os.environ.get("MINI_UNCHECKED") != "1":
        return "belongs to another run, or config.json was changed (MINI_UNCHECKED=1 takes it all the same)"
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
            optimizer.state[parameter] = {key: state_like(parameter, t) for key, t in found.items()}
    state = vars(read_state(path))
    return {name: value for name, value in state.items() if name not in ("config", "sha256", "check")}


def state_like(parameter: nn.Parameter, saved: torch.Tensor) -> torch.Tensor:
    """A quantity of an optimizer: a number, or as large as the parameter, and then where that is."""
    if saved.shape != parameter.shape:
        return saved.to(parameter.device, copy=True)
    state = torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False)
    put(state, saved)
    return state


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
    path = folder / "metrics.jsonl"
    with storage.naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the line during which the process was killed
            break
        if isinstance(row, dict) and type(row.get("step")) is int and "loss" in row:
            losses = [value for name, value in row.items() if name.endswith("loss")]
            rows += [row] * all(isinstance(loss, float) for loss in losses)
    return rows


def rewind(folder: Path, step: int) -> None:
    """Drops what came after the checkpoint from which a run goes on: log lines, damaged and unfinished checkpoints."""
    later = [path for path in checkpoints(folder) if step_of(path) > step]
    for path in [*later, *(folder / "checkpoints").glob(".step-*.tmp")]:  # of a machine that is gone, too
        storage.delete(path)
    drop_best(folder, best_steps(folder))
    text = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step)
    storage.write_text(folder / "metrics.jsonl", text)
