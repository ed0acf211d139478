"""Files that are whole or not there: atomic writes, checksums, and tensors as safetensors.

A safetensors file (https://github.com/huggingface/safetensors#format) is 8 bytes, the header's length, little-endian; a
JSON header with each tensor's dtype, shape and place; the raw bytes. It can run no code, and can be memory-mapped.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from mini.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def fsync(path: Path) -> None:
    """Asks the disk to keep a file's or a folder's entry even if the power goes now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def beside(path: Path) -> Path:
    """A hidden name beside a file or folder, with the process and the machine that make it."""
    sweep(path.parent)
    return path.with_name(f".{path.name}.{os.getpid()}@{socket.gethostname()}.tmp")


@functools.cache  # once for a folder and a process: it may have many files
def sweep(folder: Path) -> None:
    """Removes what processes of this machine that are gone have left in a folder, half written."""
    for left in folder.glob(".*.tmp"):
        made_by = re.fullmatch(r"\..+\.(\d+)@(.+)\.tmp", left.name)
        if made_by and made_by[2] == socket.gethostname() and not running(int(made_by[1])):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def running(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0) if os.name == "posix" else None
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renamed to `path` when the block ends well, removed when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """The same for a whole folder: what stands at `path` is complete at any time, the old one, the new one or none."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            fsync(file)
        if path.exists():
            remove(path.parent, [path.name])
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Deletes files and folders of a folder, all or none: they leave their names together, then the disk."""
    aside, moved = beside(folder / "removed"), []
    aside.mkdir()
    try:
        for name in names:
            if any(not os.access(d, os.W_OK | os.X_OK) for d, _, _ in os.walk(folder / name)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / name))
            os.replace(folder / name, aside / name)
            moved.append(name)
    except OSError:
        for name in moved:
            os.replace(aside / name, folder / name)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Keeps other processes from the same block for this path; yields False where one is in it, unless told to wait.

    The lock lies beside the path, so that it outlives it. Some systems and network disks have none: then all may enter.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "w") as file:
            free = True
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    free = False
            if not free:
                yield False
                return
            if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                continue  # who had it has removed it
            try:
                yield True
            finally:
                lock.unlink(missing_ok=True)
            return


def check_output(path: Path, mine: Callable[[Path], bool] = lambda path: False) -> None:
    """Refuses to write over anything but an earlier output of the same kind, which mine(path) tells."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"--out {path}: is no regular file; name a new one")
    if path.exists() and not mine(path):
        raise UserError(f"--out {path}: exists already and is not what this command writes; name another, or delete it")


def begins(path: Path, mark: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark


def write_text(path: str | Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if not all(map(str.isprintable, text.split())):  # half a character, which UTF-8 has not, is written as \ud800
        text = json.dumps(value, indent=1)
    write_text(path, text + "\n")


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object {{...}}")
    return value


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tensors(tensors: dict[str, torch.Tensor], *words: str) -> str:
    """A checksum of tensors and words."""
    h = hashlib.sha256("|".join(words).encode())
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(tensor.flatten().view(torch.uint8).numpy())
    return h.hexdigest()[:32]


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes named tensors as one safetensors file, atomically. The same tensors give the same bytes."""
    header, offset = {}, 0
    # Widest types first keeps every tensor aligned to its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor, end = tensors[name], offset + tensors[name].nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file, {name: tensor} on the CPU.

    The tensors share one memory map that is private to this process: writing to them does not change the file.
    Raises UserError where the file is missing, cut off, or its header does not describe its bytes.
    """
    path = Path(path)

    def refuse(what: str) -> UserError:
        return UserError(f"{path}: {what}; the file is damaged or not safetensors: copy or download it again")

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):  # the limit of the reference implementation
            raise refuse(f"its header should be {length:,} bytes long, but the file has {size:,}")
        text = file.read(length)
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    tensors, expected, total = {}, 0, len(data)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, end), shape, dtype = entry["data_offsets"], list(entry["shape"]), DTYPES[entry["dtype"]]
            if any(type(n) is not int or not 0 <= n < 2**63 for n in [begin, end, *shape]):
                raise ValueError(f"tensor {name!r} has a size that is no number")
            if begin != expected or end > total or end - begin != math.prod(shape) * dtype.itemsize:
                raise refuse(f"tensor {name!r} {shape} does not fit its place {begin}..{end} of {total} bytes")
            aligned = begin % dtype.itemsize == 0 and (8 + length) % 8 == 0
            raw = data[begin:end] if aligned else data[begin:end].clone()
            tensors[name] = raw.view(dtype).reshape(shape)
            expected = end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(f"its header cannot be read ({type(error).__name__}: {error})") from None
    if expected != total:
        raise refuse(f"{total - expected:,} bytes belong to no tensor")
    return tensors


# ---------------------------------------------------------------- weights of a model
def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model's file holds: each parameter once, though it may have two places (a tied head), and buffers."""
    persistent = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


def load_weights(model: torch.nn.Module, tensors: dict[str, torch.Tensor], where: str | Path) -> None:
    """Copies named tensors into a model. Raises UserError listing what is missing, extra or has another shape."""
    check_shapes(weights(model), tensors, where)
    if bad := [name for name, tensor in tensors.items() if not all_finite(tensor)]:
        raise UserError(f"{where}: {bad[0]} holds values that are no numbers (as do {len(bad) - 1} others): of no use")
    with torch.no_grad():
        for name, tensor in weights(model).items():
            tensor.copy_(tensors[name])


def check_shapes(wanted: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], where: str | Path) -> None:
    have, want = ({n: list(tensor.shape) for n, tensor in named.items()} for named in (tensors, wanted))
    problems = [f"missing {n} {shape}" for n, shape in want.items() if n not in have]
    problems += [f"extra {n} {shape}" for n, shape in have.items() if n not in want]
    problems += [f"{n} is {have[n]}, not {shape}" for n, shape in want.items() if have.get(n, shape) != shape]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise UserError(f"{where}: the weights do not fit the model: {shown}")


def loaded(make: Callable[[], torch.nn.Module], tensors: dict[str, torch.Tensor], where: str | Path) -> torch.nn.Module:
    """make() with these weights; it takes no memory before their shapes are known to fit."""
    check_shapes(weights_wanted(make, where), tensors, where)
    model = make()
    load_weights(model, tensors, where)
    return model


def weights_wanted(make: Callable[[], torch.nn.Module], where: str | Path) -> dict[str, torch.Tensor]:
    """The weights of make() without their values, which take no memory. Raises UserError where none can be so large."""
    try:
        with torch.device("meta"):
            return weights(make())
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"{where}: its settings are of no model ({str(error).splitlines()[0]})") from None


def all_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or not tensor.numel() or bool(torch.isfinite(tensor.abs().max()))
