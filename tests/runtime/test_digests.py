"""The cache of digests: a file is read once, and keeps its digest through renames, links, copies and clones."""

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_tasks.runtime import atomic_files
from build_tasks.runtime.digests import RACY_WINDOW_NS, TABLE, Digests
from tests.support.project import mounted, overwrite_byte

if os.name != "posix":
    pytestmark = pytest.mark.skip("hard links, and renames of open files, as Linux has them")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a large file `a` whose digest is cached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(atomic_files, "digest", Digests())
    Path("a").write_bytes(bytes(atomic_files.LINKED_FROM))
    atomic_files.digest("a")
    atomic_files.digest.save()
    return tmp_path


def cached(path: str) -> bool:
    """Whether the digest of a file is cached for this process and for the next one."""
    atomic_files.digest.save()
    return all(table._cached_digest(path, os.stat(path))[0] for table in (atomic_files.digest, Digests()))


def test_a_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashlib.sha256(Path("a").read_bytes()).hexdigest()
    monkeypatch.setattr(Digests, "_read", lambda *_: pytest.fail("it is read again"))
    assert atomic_files.digest("a") == expected
    assert Digests()("a") == expected, "in the next process"


def test_an_edit_is_seen_although_size_and_mtime_are_the_same(folder: Path) -> None:
    before = atomic_files.digest("a")
    overwrite_byte(Path("a"))
    assert before != atomic_files.digest("a") == hashlib.sha256(Path("a").read_bytes()).hexdigest()


def test_a_file_that_has_just_changed_is_not_cached(folder: Path) -> None:
    """It could change again within the resolution of its timestamps."""
    small = Path("small")
    small.write_bytes(b"1")
    first = atomic_files.digest("small")
    assert atomic_files.digest.identity("small") is None
    small.write_bytes(b"2")
    assert atomic_files.digest("small") != first
    time.sleep(2 * RACY_WINDOW_NS / 1e9)
    atomic_files.digest("small")
    assert atomic_files.digest.identity("small") is not None


def test_a_folder_is_its_names_and_contents(folder: Path) -> None:
    """Bytecode counts, because Python runs it in place of a source file."""
    os.makedirs("model/1/__pycache__")
    Path("model/1/model.py").write_text("pass\n")
    before = atomic_files.digest("model")
    Path("model/1/__pycache__/model.pyc").write_bytes(b"bytecode")
    assert atomic_files.digest("model") != before
    os.remove("model/1/__pycache__/model.pyc")
    assert atomic_files.digest("model") == before
    os.rename("model/1/model.py", "model/1/other.py")
    assert atomic_files.digest("model") != before


def test_a_damaged_table_is_replaced(folder: Path) -> None:
    Path(TABLE).write_bytes(b"no database" * 1000)
    assert Digests()("a") == atomic_files.digest("a")
    digests = Digests()
    digests("a")
    digests.save()
    assert Digests().identity("a") is not None


def test_a_file_keeps_its_digest_through_names_and_modes(folder: Path) -> None:
    atomic_files.copy("a", "b")
    assert cached("a")
    atomic_files.replace("b", "folder/c")
    assert cached("a")
    assert atomic_files.digest("folder/c") == atomic_files.digest("a")
    atomic_files.remove_tree("a")
    assert cached("folder/c")


def test_a_write_during_a_rename_is_seen(folder: Path) -> None:
    before = atomic_files.digest("a")
    with atomic_files.digest.preserve_digest("a"):
        with open("a", "r+b") as file:
            file.write(b"other")
        os.rename("a", "b")
    assert atomic_files.digest("b") != before


def test_a_write_during_a_copy_is_seen_even_with_its_mtime_restored(folder: Path) -> None:
    before = atomic_files.digest("a")
    with atomic_files.digest.copy_digest("a", "b"):
        overwrite_byte(Path("a"))
        shutil.copyfile("a", "b")
    assert atomic_files.digest("b") != before


def test_a_file_with_the_largest_number_of_links_is_copied(folder: Path) -> None:
    names = folder / "names"
    names.mkdir()
    try:
        for number in range(66_000):  # ext4 allows 65000
            os.link("a", names / str(number))
    except OSError:
        atomic_files.copy("a", "b")
        assert not os.path.samefile("a", "b")
        assert atomic_files.digest("b") == atomic_files.digest("a")
    else:
        pytest.skip("this file system has no such limit")


@pytest.fixture
def cloning(tmp_path: Path) -> Iterator[Path]:
    """A file system that has clones: XFS in a file."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 400 << 20)
    try:
        subprocess.run(["mkfs.xfs", "-q", image], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine cannot make an XFS: {error}")
    with mounted(tmp_path / "xfs", "-o", "loop", str(image)) as folder:
        yield folder


def test_an_edit_of_a_clone_leaves_the_original(cloning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cloning)
    monkeypatch.setattr(atomic_files, "digest", Digests())
    Path("a").write_bytes(os.urandom(atomic_files.LINKED_FROM))
    digest = atomic_files.digest("a")
    free = os.statvfs(cloning).f_bavail
    atomic_files.copy("a", "b")
    os.sync()
    assert free - os.statvfs(cloning).f_bavail < 1000, "blocks of 4 KB: the clone shares those of the original"
    assert atomic_files.digest._cached_digest("b", os.stat("b"))[0] == digest
    overwrite_byte(Path("b"))
    assert atomic_files.digest("b") != digest
    atomic_files.digest.save()
    assert Digests()("a") == digest
