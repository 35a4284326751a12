"""A large artifact is read once, and stands at several places as one file, a clone, or a copy made in one pass."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from build_tasks.runtime import atomic_files
from build_tasks.runtime.digests import Digests
from tests.support.project import Project, Run, mounted

if os.name != "posix" or not Path("/proc/self/io").exists():
    pytestmark = pytest.mark.skip("links and /proc/self/io as Linux has them")

# A table of 37 MB, of which a request reads a row.
NETWORK = """\
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.arange(9000 * 1024, dtype=torch.float32).view(9000, 1024))

    def forward(self, x):
        features = x.mean(dim=(2, 3))
        row = (features.sum(dim=1) > -1e9).long()
        return features.sum(dim=1, keepdim=True) * self.table[row][:, :8] * 1.0


build = Network
"""
SPEC = """\
formats = ["torchscript"]
max_batch_size = 2

[architecture]
network = "network.py:build"

[input]
shape = [3, 8, 8]

[weights]
source = "random://0"

[accuracy]
allow_untestable = true

[triton]
keep_versions = 1
"""
ARTIFACT = "build/large/model.pt"
PUBLISHED = "model_repository/large/1/model.pt"
UP_TO = ("accuracy:large", "config:large")  # the stages before the one that publishes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("large") / "project")
    project.model("large", SPEC, network_py=NETWORK)
    project.built(*UP_TO)
    return project


@pytest.fixture
def project(large: Project, copy_of: Callable[[Project], Project]) -> Project:
    """Built, not published, and its digests are known."""
    project = copy_of(large)
    project.built(*UP_TO)
    return project


def reads(project: Project, *arguments: str) -> tuple[int, Run]:
    """How often a run of doit, which must succeed, reads as many bytes as model.pt has."""

    def read() -> int:
        (count,) = re.findall(r"^rchar: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
        return int(count)

    before = read()
    run = project.built(*arguments)
    return round((read() - before) / (project / ARTIFACT).stat().st_size), run


def same_file(project: Project) -> bool:
    return os.path.samefile(project / ARTIFACT, project / PUBLISHED)


def same_bytes(project: Project) -> bool:
    return (project / ARTIFACT).read_bytes() == (project / PUBLISHED).read_bytes()


def clones(project: Project) -> bool:
    """Whether the project's file system has something better than links."""
    (project / "a").write_bytes(b"a")
    return atomic_files._cloned(str(project / "a"), str(project / "b"))


@pytest.mark.parametrize("versions", [1, 2])
def test_it_is_published_without_being_read(project: Project, versions: int) -> None:
    kept = f"keep_versions = {versions}"
    project.edit("models/large/model.toml", "keep_versions = 1", kept)
    assert reads(project, "publish:large")[0] == 0
    assert same_bytes(project)
    assert reads(project, "publish:large")[0] == 0, "nor when there is nothing to do"
    project.edit("models/large/model.toml", kept, f"{kept}\ninstance_group = [{{ count = 2 }}]")
    count, run = reads(project, "publish:large")
    assert (count, run.ran) == (0, ["config:large", "publish:large"])
    count, run = reads(project, "publish:large")
    assert (count, run.ran) == (0, []), "the version that went took one name of a file with it, and no content"
    assert reads(project, "clean", "publish:large")[0] == 0
    assert reads(project, "publish:large")[0] == 0


def test_a_link_is_read_only_under_both_names(project: Project) -> None:
    project.built("publish:large")
    if clones(project):
        pytest.skip("this file system clones")
    assert same_file(project)
    for path in (ARTIFACT, PUBLISHED):
        assert (project / path).stat().st_mode & 0o777 == 0o444
    small = (project / "model_repository/large/config.pbtxt").stat()
    assert (small.st_nlink, small.st_mode & 0o200) == (1, 0o200), "what is edited by hand is a copy"


def test_damage_in_place_is_mended_under_both_names(project: Project) -> None:
    """An edit of one file is one of the other; both are seen."""
    good = (project / ARTIFACT).read_bytes()
    project.built("publish:large")
    for damage in (lambda: os.truncate(project / ARTIFACT, 1000), lambda: overwrite(project / PUBLISHED)):
        damage()
        assert {"torchscript:large", "publish:large"} <= set(project.built("publish:large").ran)
        assert (project / ARTIFACT).read_bytes() == good
        assert (project / PUBLISHED).read_bytes() == good
    assert project.built("publish:large").ran == []


def overwrite(path: Path) -> None:
    """A byte in place; size and mtime stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(20_000_000)
        file.write(b"\xff")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_another_build_leaves_the_version_that_is_published(project: Project) -> None:
    project.edit("models/large/model.toml", "keep_versions = 1", "keep_versions = 2")
    first = (project / ARTIFACT).read_bytes()
    project.built("publish:large")
    project.edit("models/large/network.py", "* 1.0", "* 2.0")
    project.built(*UP_TO)
    assert (project / ARTIFACT).read_bytes() != first
    assert (project / PUBLISHED).read_bytes() == first
    count, _ = reads(project, "publish:large")
    assert count == 0, "neither the one, which became another, nor the other, which lost a name"
    assert (project / PUBLISHED).read_bytes() == first
    assert (project / PUBLISHED.replace("/1/", "/2/")).read_bytes() == (project / ARTIFACT).read_bytes()


def test_what_was_touched_is_read_once_for_all_its_names(project: Project) -> None:
    project.built("publish:large")
    os.utime(project / ARTIFACT)
    count, run = reads(project, "publish:large")
    assert (count, run.ran) == (1, [])
    assert reads(project, "publish:large")[0] == 0


def test_it_is_copied_to_another_file_system_in_one_pass(project: Project) -> None:
    if os.stat("/dev/shm").st_dev == os.stat(project.root).st_dev:
        pytest.fail("/dev/shm is on the same file system; this machine cannot run the test")
    elsewhere = Path("/dev/shm") / f"large-{os.getpid()}"
    elsewhere.mkdir()
    try:
        (project / "model_repository").symlink_to(elsewhere)
        assert reads(project, "publish:large")[0] == 1
        assert same_bytes(project)
        assert not same_file(project)
        assert reads(project, "publish:large")[0] == 0
    finally:
        shutil.rmtree(elsewhere)


# ---------------------------------------------------------------------------------------------------------------
# Files and their digests by themselves


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a large file, whose digest is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(atomic_files, "digest", Digests())
    Path("a").write_bytes(bytes(atomic_files.LINKED_FROM))
    atomic_files.digest("a")
    atomic_files.digest.save()
    return tmp_path


def known(path: str) -> bool:
    """Whether the digest of a file is there for this process and for the next, without reading it."""
    atomic_files.digest.save()
    return all(table._cached_digest(path, os.stat(path))[0] for table in (atomic_files.digest, Digests()))


def test_a_file_keeps_its_digest_through_names_and_modes(here: Path) -> None:
    atomic_files.copy("a", "b")
    assert known("a")
    atomic_files.replace("b", "folder/c")
    assert known("a")
    assert atomic_files.digest("folder/c") == atomic_files.digest("a")
    atomic_files.remove_tree("a")
    assert known("folder/c")


def test_a_write_during_a_rename_is_seen(here: Path) -> None:
    before = atomic_files.digest("a")
    with atomic_files.digest.preserve_digest("a"):
        with open("a", "r+b") as file:
            file.write(b"other")
        os.rename("a", "b")
    assert atomic_files.digest("b") != before


def test_a_write_during_a_copy_is_seen_even_with_its_mtime_put_back(here: Path) -> None:
    before = atomic_files.digest("a")
    with atomic_files.digest.copy_digest("a", "b"):
        overwrite(Path("a"))
        shutil.copyfile("a", "b")
    assert atomic_files.digest("b") != before


def test_a_file_with_as_many_names_as_can_be_is_copied(here: Path) -> None:
    folder = here / "names"
    folder.mkdir()
    try:
        for number in range(66_000):  # ext4 knows 65000
            os.link("a", folder / str(number))
    except OSError:
        atomic_files.copy("a", "b")
        assert not os.path.samefile("a", "b")
        assert atomic_files.digest("b") == atomic_files.digest("a")
    else:
        pytest.skip("this file system has no such limit")


@pytest.fixture
def cloning(tmp_path: Path) -> Iterator[Path]:
    """A file system that clones: XFS in a file."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 400 << 20)
    try:
        subprocess.run(["mkfs.xfs", "-q", image], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no XFS can be made here: {error}")
    with mounted(tmp_path / "xfs", "-o", "loop", str(image)) as folder:
        yield folder


def test_where_the_file_system_clones_the_two_stay_apart(cloning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cloning)
    monkeypatch.setattr(atomic_files, "digest", Digests())
    Path("a").write_bytes(os.urandom(atomic_files.LINKED_FROM))
    digest = atomic_files.digest("a")
    free = os.statvfs(cloning).f_bavail
    atomic_files.copy("a", "b")
    os.sync()
    assert free - os.statvfs(cloning).f_bavail < 1000, "blocks: its own are those of the other"
    assert atomic_files.digest._cached_digest("b", os.stat("b"))[0] == digest
    overwrite(Path("b"))
    assert atomic_files.digest("b") != digest
    atomic_files.digest.save()
    assert Digests()("a") == digest
