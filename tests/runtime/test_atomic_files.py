"""Drafts are on the disk before they become targets, with few calls of the system."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from build_tasks.runtime import atomic_files

if os.name != "posix":
    pytestmark = pytest.mark.skip("links and clones as Linux has them")


def test_every_file_is_flushed_except_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gets a second name, an artifact or a published file, is on the disk already."""
    (tmp_path / "artifact").write_bytes(b"artifact")
    draft = tmp_path / "draft"
    (draft / "1").mkdir(parents=True)
    own = [draft / "config.pbtxt", draft / "labels.txt", draft / "1/bom.cdx.json"]
    for path in own:
        path.write_text(path.name, encoding="utf-8")
    os.link(tmp_path / "artifact", draft / "1/model.pt")
    flushed: list[int] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    atomic_files.flush(str(draft))
    assert sorted(flushed) == sorted(path.stat().st_ino for path in own)
    flushed.clear()
    atomic_files.flush(str(own[0]))
    assert flushed == [own[0].stat().st_ino]


def test_clones_are_tried_once_where_the_file_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def unsupported(clone: Any, number: int, original: int) -> None:
        calls.append(number)
        raise OSError(errno.EOPNOTSUPP, "not supported")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "ioctl", unsupported)
    monkeypatch.setattr(atomic_files, "WITHOUT_CLONES", set())
    (tmp_path / "source").write_bytes(b"source")
    for name in ("first", "second"):
        atomic_files.copy(str(tmp_path / "source"), str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == b"source"
    assert calls == [atomic_files.FICLONE]


def test_a_link_to_a_folder_is_removed_and_not_the_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "tree/inner/link").symlink_to(tmp_path / "folder")
    (tmp_path / "tree/dangling").symlink_to(tmp_path / "nothing")
    atomic_files.remove_tree(str(tmp_path / "tree"))
    atomic_files.remove_tree(str(tmp_path / "tree"))
    atomic_files.remove_tree(str(tmp_path / "folder/file/below"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
