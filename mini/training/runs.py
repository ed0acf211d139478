"""Run folders. Whatever was trained or made smaller is a folder, and load_run() opens every kind.

config.json        what the run is: kind, task, and every setting
tokenizer.json     (and what it names) the tokenizer
metrics.jsonl      one object for each logged step
checkpoints/       step-00000250/ ...: weights, optimizer, state.json with their checksums
best-00000120.safetensors   while training: the weights of the step with the best figure, where the task keeps them
model.safetensors  the final weights, and
result.json        the final figures: both are there once the run is finished
"""

import contextlib
import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mini.flags import UserError, from_dict
from mini.model import int8, lora, sparse
from mini.model.bert import Bert
from mini.model.config import ModelConfig
from mini.model.gpt import GPT
from mini.model.published import published_kind
from mini.model.transformer import Model
from mini.storage import atomic_folder, locked, read_json, remove, sweep, write_json
from mini.tasks import TASKS
from mini.tensors import load_tensors, load_weights, loaded, weights, weights_wanted
from mini.text.corpus import DataConfig
from mini.text.tokenizer import Tokenizer, load_tokenizer
from mini.training.checkpoints import LEARNING, newest_checkpoint, read_result
from mini.training.loop import TrainConfig
from mini.training.optim import OptimConfig
from mini.training.part import PartConfig
from mini.training.ranks import World

MODELS: dict[str, type[Model]] = {"gpt": GPT, "bert": Bert}
FORMAT = 5  # of older ones finished runs open, but one that is not finished cannot go on, as training has changed
BEGUN = r"tokenizer\.(json|tiktoken)|vocab\.txt"  # what is there before config.json
RUN_FILES = re.compile(  # and folders, of which a run consists
    BEGUN + r"|(config|result)\.json|metrics\.jsonl|loss\.png|checkpoints|(model|best(-\d+)?)\.safetensors"
)
CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANY = 8  # differences between two runs: the others are only counted


@dataclass
class RunConfig:
    """Everything that determines a run's result: the same config on the same machine gives the same weights."""

    kind: str  # a key of MODELS
    task: str  # a key of TASKS
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    task_options: object = None  # of the task's Config
    part: PartConfig = field(default_factory=PartConfig)  # what of init learns
    init: str | None = None  # the run or published folder that the weights started from
    labels: list[str] = field(default_factory=list)  # of a classifier
    tokens: str = ""  # checksum of the training and validation tokens
    prune: dict | None = None  # what compress.py has done to the weights of init, in its own words
    reduce: dict | None = None
    distill: dict | None = None
    quant: dict | None = None  # in what form the matrices are

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / "config.json", {"format": FORMAT, "made_by": made_by(), **asdict(self)})


@functools.cache
def made_by() -> dict:
    """What a run's figures may depend on beside its settings: a record, which nothing compares."""
    record = {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository, or not of this code
        git("ls-files", "--error-unmatch", Path(__file__).name)
        record |= {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno", ":/"))}
    return record


def read_config(folder: str | Path) -> RunConfig:
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: {'is a file, not a run folder' if Path(folder).exists() else 'no such run folder'}")
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder (it has no config.json); name one, or a new folder for --out")
    values = read_json(path)
    if values.pop("format", None) not in range(1, FORMAT + 1):
        raise UserError(f"{path}: not written by this version of mini")
    values.pop("made_by", None)
    config = from_dict(RunConfig, values, path)
    if config.kind not in MODELS or config.task not in TASKS:
        raise UserError(f"{path}: a run of kind {config.kind!r} and task {config.task!r}, which mini does not know")
    own, given = TASKS[config.task].Config, config.task_options
    if given is not None and own is None:
        raise UserError(f"{path}: task_options, which {config.task!r} has not")
    if own:  # none are those of before the task had any
        config.task_options = from_dict(own, {} if given is None else given, f"{path}: task_options")
    return config


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
    read_result(folder, files=True)
    if is_published(folder):
        model = MODELS[published_kind(folder)].from_published(folder)
    else:
        config = read_config(folder)
        path = newest_weights(folder)
        tensors = lora.merged(load_tensors(path), path)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(LEARNING)}
        plain = partial(MODELS[config.kind], config.model)
        tensors = sparse.unpack(tensors, lambda: weights_wanted(plain, folder), path)

        def make() -> Model:
            model = plain()
            sparse.take_masks(model, tensors)
            if config.quant:
                int8.prepare(model, int8.ranges_of(tensors))
                if path.parent == folder:  # a checkpoint holds what still learns
                    int8.convert(model)
            return model

        model = loaded(make, tensors, folder)
    if kind and model.kind != kind:
        raise UserError(f"{folder} holds a {model.kind.upper()}, but this needs a {kind.upper()}")
    return model.eval()


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, where: str | Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model knows {config.vocab_size:,}"
        raise UserError(f"{where}: {sizes}: they do not belong together")


def newest_weights(folder: Path) -> Path:
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder}: the run has no weights yet (no model.safetensors and no whole checkpoint)")
    return checkpoint / "model.safetensors"


def copy_weights(model: nn.Module, source: nn.Module, where: str | Path, keep_classes: bool) -> None:
    """Copies the weights of another run: its whole stack, and of its heads those that the model has too; with masks.

    Other heads keep their fresh weights, and without keep_classes so does one for classes. A shorter max_len takes
    the first of the learned positions.
    """
    if int8.is_int8(source):
        int8.restore(source)
    masks = {name: mask for name, mask in sparse.masks_of(source).items() if name in weights(model)}
    if masks:
        model.masks = sparse.Masks(masks)
    found = weights(source)
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


def read_labels(folder: str | Path) -> list[str]:
    """The labels of a run's classification head; none where it has no such head."""
    if is_published(folder):
        names = read_json(Path(folder) / "config.json").get("id2label")
        if not isinstance(names, dict) or not all(map(str.isdigit, names)):  # none, or not as they should be
            return []
        return [str(names[i]) for i in sorted(names, key=int)]
    return read_config(folder).labels


# ---------------------------------------------------------------- beginning and going on
@contextlib.contextmanager
def claim(folder: Path, config: RunConfig, tokenizer: Tokenizer, overwrite: bool, world: World) -> Iterator[None]:
    """Makes the run's folder, or checks that the one there is the same run; while active, no other trains in it.

    Raises UserError with the differences if the folder holds another run, or something else altogether.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name another folder with --out")
    tokenizer_of = config.data.tokenizer if Path(config.data.tokenizer, "tokenizer.json").is_file() else None
    for source in (config.init, config.distill and config.distill.get("init"), overwrite and tokenizer_of):
        if source and Path(source).resolve() == folder.resolve():
            raise UserError(f"{folder}: --out is the run to start from, which stays; name another folder")
    if not folder.resolve().name:
        raise UserError(f"{folder}: no place for a run; name a folder")
    for place in (folder.parent, folder, folder / "checkpoints"):
        sweep(place)
    with contextlib.ExitStack() as held:

        def make() -> None:
            if world.main and not held.enter_context(locked(folder.resolve(), wait=False)):
                raise UserError(f"{folder}: another process is training here")
            make_folder(folder, config, tokenizer, overwrite and world.main)

        world.main_first(make)
        yield


def make_folder(folder: Path, config: RunConfig, tokenizer: Tokenizer, overwrite: bool) -> None:
    is_run = (folder / "config.json").exists()
    if is_run and not overwrite:
        differences = compare(read_config(folder), config)
        if read_json(folder / "config.json")["format"] != FORMAT and not (folder / "result.json").exists():
            differences = ["it was begun by an older version, whose training was another"]
        if differences:
            if len(differences) > MANY:
                differences = [*differences[:MANY], f"and {len(differences) - MANY} more"]
            how = "Give the same flags to go on, another --out, or --overwrite true"
            raise UserError(f"{folder} holds another run: {'; '.join(differences)}. {how}")
    elif folder.exists():  # perhaps a link or a mounted disk: filled, not replaced; config.json last
        names = [path.name for path in folder.iterdir()]
        if is_run:
            discard(folder, config)
        elif strange := [name for name in names if not re.fullmatch(BEGUN + r"|\..*\.tmp", name)]:
            raise UserError(f"{folder}: not a run folder (there is {strange[0]!r}, and no config.json): name another")
        tokenizer.save(folder)
        config.save(folder)
    else:
        with atomic_folder(folder) as temporary:
            tokenizer.save(temporary)
            config.save(temporary)


def discard(folder: Path, config: RunConfig) -> None:
    """Deletes the files of the run in a folder, or where that is refused none; config.json stays, to be replaced.

    Raises UserError where it is no run, or something lies in it that the new run reads, or another run.
    """
    read_config(folder)
    inside = [path for path in (folder / "checkpoints").rglob("*") if path.is_file() and path.suffix != ".tmp"]
    if strange := [path for path in inside if path.name not in CHECKPOINT_FILES]:
        raise UserError(f"--overwrite true: {strange[0]} is no file of a run, and would be lost: name another --out")
    read = [Path(value) for value in flatten(asdict(config)).values() if isinstance(value, str)]  # not all are paths
    for path in [*read, *(found.parent for found in folder.rglob("*/config.json"))]:
        with contextlib.suppress(OSError, ValueError):  # a text that cannot be one
            if path.exists() and folder.resolve() in path.resolve().parents:
                raise UserError(f"--overwrite true: {path} lies in {folder}, which it empties: name another --out")
    remove(folder, [p.name for p in folder.iterdir() if RUN_FILES.fullmatch(p.name) and p.name != "config.json"])


def check_output(out: Path, mine: Callable[[Path], bool] | None = None, read: Iterable[str] = ()) -> None:
    """Refuses to write over what is read, a file of a run, or what this command has not written, as mine(out) tells."""
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise UserError(f"--out {out}: is no regular file; name a new one")
    if RUN_FILES.fullmatch(out.name) and (out.parent / "config.json").exists():
        raise UserError(f"--out {out}: would be a file of the run in {out.parent}; name another")
    if out.exists() and any(os.path.exists(name) and out.samefile(name) for name in read):
        raise UserError(f"--out {out}: is the file to read; name another")
    if out.exists() and not (mine and mine(out)):
        what = " and is not what this command writes" if mine else ""
        raise UserError(f"--out {out}: exists already{what}; name another, or delete it")


def compare(old: RunConfig, new: RunConfig) -> list[str]:
    """'lr was 0.02, now 0.01' for everything that differs and would change the result."""
    free = {f"train.{f.name}" for f in fields(TrainConfig) if f.metadata.get("resume")}
    before, now = flatten(asdict(old)), flatten(asdict(new))
    names = sorted(name for name in before | now if before.get(name) != now.get(name) and name not in free)
    changes = [f"{n.rpartition('.')[2]} was {before.get(n)}, now {now.get(n)}" for n in names if n != "tokens"]
    return changes + ["the training text is another"] * ("tokens" in names)


def flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
