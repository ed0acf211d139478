"""Files that are whole or not there: written, replaced and removed at once, by one process at a time; and JSON."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from mini.errors import UserError

START = secrets.token_hex(4)  # tells this process from an earlier one of its number


def fsync(path: Path) -> None:
    """Asks the disk to keep a file's or a folder's entry even if the power goes now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def maker() -> str:
    """This process, in the names of what it has not finished."""
    return f"{os.getpid()}-{START}@{machine()}"


def beside(path: Path, made_by: str = "") -> Path:
    """A hidden name beside a file or folder, with the process and the machine that make it: this one, or made_by."""
    sweep(path.parent)
    return path.with_name(f".{path.name}.{made_by or maker()}.tmp")


@functools.cache  # once for a folder and a process: it may have many files
def sweep(folder: Path) -> None:
    """Removes what processes of this machine that are gone have left in a folder, half written."""
    for left in folder.glob(".*.tmp"):
        made_by = re.fullmatch(r"\..+\.(\d+)-(\w+)@(.+)\.tmp", left.name)
        if made_by and made_by[3] == machine() and not running(int(made_by[1]), made_by[2]):
            delete(left)


def delete(path: Path) -> None:
    """Deletes a file or a folder, if it is still there and may be."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


@functools.cache
def machine() -> str:
    """Where a number means the same process: a host, or a container on it."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}-{namespace.stat().st_ino if namespace.exists() else 0}"


def running(process: int, start: str) -> bool:
    """Whether there is a process of this number on this machine, and not this one with the number of an earlier."""
    if process == os.getpid():
        return start == START
    try:
        if os.name == "posix":
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError names this path where it names none, as of a full disk, or what hides beside it."""
    try:
        yield
    except OSError as error:
        if not error.filename or re.search(r"\.tmp(/|$)|\.lock$", str(error.filename)):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renamed to `path` when the block ends well, removed when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with naming(path):
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """The same for a whole folder: what stands at `path` is complete at any time, the old one, the new one or none.

    Others that know maker() may write into it, too.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    temporary.mkdir(exist_ok=True)
    try:
        with naming(path):
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
    names, aside = list(names), beside(folder / "removed")
    aside.mkdir()
    try:
        for name in names:
            if any(not os.access(d, os.W_OK | os.X_OK) for d, _, _ in os.walk(folder / name)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / name))
            os.replace(folder / name, aside / name)
        shutil.rmtree(aside)
    except OSError as error:  # what is still there goes back to its place
        error.filename = str(error.filename).replace(str(aside), str(folder))
        for name in os.listdir(aside):
            os.replace(aside / name, folder / name)
        aside.rmdir()
        raise


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Keeps other processes from the same block for this path; yields False where one is in it, unless told to wait.

    The lock lies beside the path, so that it outlives it. Some systems and network disks have none, and where nothing
    may be written there is none: then all may enter.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        if not lock.exists() and not os.access(path.parent, os.W_OK):
            yield True
            return
        with naming(path), open(lock, "w") as file:
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
            try:
                held = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            except FileNotFoundError:
                held = False
            if held:  # and not one that who had it has removed
                try:
                    yield True
                finally:
                    lock.unlink(missing_ok=True)
                return


def write_text(path: str | Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    try:
        write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    except UnicodeEncodeError:  # half a character, which UTF-8 has not: written as \ud800
        write_text(path, json.dumps(value, indent=1) + "\n")


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
