"""A large artifact is read once. Its copies are hard links, clones, or copies made in one pass over its bytes."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tasks.runtime import atomic_files
from tests.support.project import Project, Run, overwrite_byte

if os.name != "posix" or not Path("/proc/self/io").exists():
    pytestmark = pytest.mark.skip("links and /proc/self/io as Linux has them")

# A network with a table of 37 MB, of which each request reads one row.
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
BEFORE_PUBLISH = ("accuracy:large", "config:large")  # the stages that `publish` depends on


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("large") / "project")
    project.model("large", SPEC, network_py=NETWORK)
    project.built(*BEFORE_PUBLISH)
    return project


@pytest.fixture
def project(large: Project, copy_of: Callable[[Project], Project]) -> Project:
    """The model is built, but not published, and its digests are cached."""
    project = copy_of(large)
    project.built(*BEFORE_PUBLISH)
    return project


def reads(project: Project, *arguments: str) -> tuple[int, Run]:
    """How many times a run of doit reads the bytes of model.pt; and the run, which must succeed."""

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
    """Whether the project's file system has clones, which are used in place of hard links."""
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
    assert (count, run.ran) == (0, []), "the version that was removed had one name of the file, not its content"
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
    assert (small.st_nlink, small.st_mode & 0o200) == (1, 0o200), "a file that people edit is a copy"


def test_a_link_follows_the_umask_of_published_files(project: Project) -> None:
    """It has one mode under both names, and stays read-only."""
    project.built("publish:large", REPOSITORY_UMASK="027")
    linked = (project / PUBLISHED).stat().st_nlink > 1
    assert (project / PUBLISHED).stat().st_mode & 0o777 == (0o440 if linked else 0o640)
    count, run = reads(project, "publish:large")
    assert (count, run.ran) == (0, ["publish:large"]), "the umask of this process holds again"
    (project / ARTIFACT).chmod(0o400)
    project.built("publish:large", REPOSITORY_UMASK="022")
    assert (project / PUBLISHED).stat().st_mode & 0o777 == (0o444 if linked else 0o644)
    assert (
        reads(
            project,
            "publish:large",
        )[0]
        == 0
    )


def test_damage_in_place_is_mended_under_both_names(project: Project) -> None:
    """An edit of a hard link changes the file under both names, and both are seen to be modified."""
    good = (project / ARTIFACT).read_bytes()
    project.built("publish:large")
    for edit in (lambda: os.truncate(project / ARTIFACT, 1000), lambda: overwrite_byte(project / PUBLISHED)):
        edit()
        assert {"torchscript:large", "publish:large"} <= set(project.built("publish:large").ran)
        assert (project / ARTIFACT).read_bytes() == good
        assert (project / PUBLISHED).read_bytes() == good
    assert project.built("publish:large").ran == []


def test_another_build_leaves_the_version_that_is_published(project: Project) -> None:
    project.edit("models/large/model.toml", "keep_versions = 1", "keep_versions = 2")
    first = (project / ARTIFACT).read_bytes()
    project.built("publish:large")
    project.edit("models/large/network.py", "* 1.0", "* 2.0")
    project.built(*BEFORE_PUBLISH)
    assert (project / ARTIFACT).read_bytes() != first
    assert (project / PUBLISHED).read_bytes() == first
    count, _ = reads(project, "publish:large")
    assert count == 0, "the old and the new artifact keep their digests, although one lost a name"
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
    repository = Path("/dev/shm") / f"large-{os.getpid()}"
    repository.mkdir()
    try:
        (project / "model_repository").symlink_to(repository)
        assert reads(project, "publish:large")[0] == 1
        assert same_bytes(project)
        assert not same_file(project)
        assert reads(project, "publish:large")[0] == 0
    finally:
        shutil.rmtree(repository)
