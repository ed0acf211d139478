import os
import shutil

import pytest

from mini import storage
from mini.storage import atomic_file, atomic_folder, remove


def test_failed_writes_leave_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new, half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_what_may_not_be_deleted_stays_whole(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    (tmp_path / "b").write_text("b")
    monkeypatch.setattr(os, "access", lambda path, mode: "a" not in str(path)[-2:])
    with pytest.raises(PermissionError):
        remove(tmp_path, ["b", "a"])
    assert (tmp_path / "a" / "x").read_text() == "x" and (tmp_path / "b").read_text() == "b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_what_cannot_be_deleted_in_the_end_comes_back(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")

    def immutable(path, **_):
        raise PermissionError(1, "Operation not permitted", str(path / "a"))

    monkeypatch.setattr(shutil, "rmtree", immutable)
    with pytest.raises(PermissionError, match=str(tmp_path / "a")):
        remove(tmp_path, ["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_temporaries_of_dead_processes_go(tmp_path):
    dead = 2**22 + 1  # above the highest number of a process
    host = storage.machine()
    (tmp_path / f".a.{dead}-0@{host}.tmp").write_text("x")
    (tmp_path / f".b.{dead}-0@{host}.tmp").mkdir()
    (tmp_path / f".e.{os.getpid()}-0@{host}.tmp").mkdir()  # of an earlier process with this one's number
    (tmp_path / f".c.{os.getpid()}-{storage.START}@{host}.tmp").write_text("x")
    (tmp_path / f".d.{dead}-0@elsewhere.tmp").write_text("x")
    with atomic_file(tmp_path / "new") as path:
        path.write_text("y")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f".c.{os.getpid()}-{storage.START}@{host}.tmp", f".d.{dead}-0@elsewhere.tmp", "new"]


def test_a_folder_is_replaced_whole(tmp_path):
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("2")
    assert (tmp_path / "a" / "x").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["a"]
