"""Files that are whole or not there: written, replaced and removed at once, by one process at a time; and JSON."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mini.errors import UserError


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
