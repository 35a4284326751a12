"""The check of a repository on a server: a single file, and Python's standard library alone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tasks.provenance import verify_repository
from build_tasks.provenance.published_versions import write_manifest

FILES = {
    "config.pbtxt": "name: 'net'\n",
    "labels.txt": "cat\ndog\n",
    "1/model.onnx/model.onnx": "graph",
    "1/model.onnx/weights.bin": "w" * 3_000_000,
    "1/provenance.json": "{}",
    "1/__pycache__": "",
    "warmup/a name\nwith a \\.txt": "x",
}

WINDOWS = "SHA256SUMS: its lines end in CR and LF"
NOT_CANONICAL = "SHA256SUMS: it is not as publishing writes it"
NO_PATH = "which is no path in the folder"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with two models, and the file that checks it beside it."""
    for model in ("net", "other"):
        for name, text in FILES.items():
            path = tmp_path / "repository" / model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        write_manifest(str(tmp_path / "repository" / model))
    (tmp_path / "repository/README.md").write_text("Triton ignores files here")
    shutil.copy(verify_repository.__file__, tmp_path)
    return tmp_path / "repository"


def verify(repository: Path, *models: str) -> tuple[int, list[str]]:
    """Run the single file without any package: its exit code and its lines."""
    command = [sys.executable, "-I", "-S", "verify_repository.py", repository.name, *models]
    run = subprocess.run(command, cwd=repository.parent, capture_output=True, text=True, timeout=60, check=False)
    return run.returncode, (run.stdout + run.stderr).splitlines()


def flip(path: Path, position: int = 0) -> None:
    """Change one bit of a file, and keep its size and its times."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_was_published_is_ok_also_for_sha256sum(repository: Path) -> None:
    assert verify(repository) == (0, ["net: ok", "other: ok", "2 of 2 models are as they were published"])
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=repository / "net", check=True)


@pytest.mark.parametrize("name", [name for name, text in FILES.items() if text])
def test_a_flipped_bit_is_found_in_every_file(repository: Path, name: str) -> None:
    flip(repository / "net" / name, len(FILES[name]) // 2)
    code, lines = verify(repository)
    assert code == 1
    assert lines[0] == "net: changed: " + (name if name.isprintable() else ascii(name)[1:-1])
    assert lines[1] == "other: ok"


def write(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)


def link(target: Path, path: Path) -> None:
    path.symlink_to(target)


def link_outside(folder: Path) -> None:
    (folder / "labels.txt").rename(folder.parent / "labels.txt")
    (folder / "labels.txt").symlink_to("../labels.txt")


def edit_manifest(folder: Path, edit: Callable[[str], str]) -> None:
    path = folder / "SHA256SUMS"
    path.write_bytes(edit(path.read_text()).encode())


def append(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda text: f"{text}{text[:64]}  {name}\n")


def file_to_folder(folder: Path) -> None:
    (folder / "labels.txt").unlink()
    (folder / "labels.txt").mkdir()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda p: (p / "1/model.py").write_text("import os"), "added: 1/model.py"),
        (lambda p: write(p / ".git/config", ""), "added: .git/config"),
        (lambda p: (p / "2").mkdir(), "added: 2, an empty folder"),
        (lambda p: (p / "1/SHA256SUMS").write_text("x"), "added: 1/SHA256SUMS"),
        (lambda p: (p / "labels.txt").unlink(), "missing: labels.txt"),
        (link_outside, "changed: labels.txt, a link"),
        (lambda p: os.mkfifo(p / "model.sig"), "added: model.sig, a FIFO, a socket or a device"),
        (lambda p: (p / "SHA256SUMS").unlink(), "no SHA256SUMS, so nothing in this folder is proven"),
        (lambda p: (p / "SHA256SUMS").write_text(""), "SHA256SUMS: line 1 is no digest and name"),
        (lambda p: (p / "SHA256SUMS").write_bytes(b"\xff\xfe"), "SHA256SUMS: line 1 is no digest and name"),
        (append("labels.txt"), "SHA256SUMS: line 8 names labels.txt a second time"),
        (append("/etc/passwd"), f"SHA256SUMS: line 8 names /etc/passwd, {NO_PATH}"),
        (append("../other/x"), f"SHA256SUMS: line 8 names ../other/x, {NO_PATH}"),
        (lambda p: edit_manifest(p, lambda s: s.replace("\n", "\r\n")), WINDOWS),
        (lambda p: edit_manifest(p, lambda s: s.replace("  ", " *")), NOT_CANONICAL),
        (lambda p: edit_manifest(p, lambda s: "".join(sorted(s.splitlines(True)))), NOT_CANONICAL),
        (lambda p: (p / "labels.txt").rename(p / "Labels.txt"), "missing: labels.txt"),
        (lambda p: (p / "labels.txt").write_text(""), "changed: labels.txt"),
        (lambda p: open(os.fsencode(p) + b"/\xff", "w").close(), "added: \\udcff"),
        (lambda p: (p / "é").touch(), "added: é"),
        (lambda p: (p / "a\nb: ok").touch(), "added: a\\nb: ok"),
        (lambda p: link(p / "loop", p / "loop"), "added: loop, a link"),
        (file_to_folder, "changed: labels.txt, an empty folder"),
        (lambda p: link(p.rename(p.parent / "old"), p), "a link, not a folder"),
    ],
)
def test_what_else_differs_is_named(repository: Path, change: Callable[[Path], object], line: str) -> None:
    change(repository / "net")
    code, lines = verify(repository, "net", "other")
    assert (code, lines[0], "other: ok" in lines) == (1, f"net: {line}", True)


def test_a_folder_without_a_manifest_and_a_model_that_is_not_there_fail(repository: Path) -> None:
    shutil.copytree(repository / "net", repository / ".more", ignore=shutil.ignore_patterns("SHA256SUMS"))
    assert verify(repository)[0] == 1
    assert verify(repository, "net")[0] == 0
    assert verify(repository, "net", "gone") == (
        1, ["net: ok", "gone: there is no such folder", "1 of 2 models are as they were published"]
    )  # fmt: skip


def test_a_model_under_another_name_is_found(repository: Path) -> None:
    for name in ("net", "other"):
        path = repository / name / "config.pbtxt"
        path.write_text(f"# Generated by doit: {name}, signature 0\nname: '{name}'\n")
        write_manifest(str(repository / name))
    (repository / "net").rename(repository / "new")
    assert verify(repository) == (
        1, ["new: this folder was published as net", "other: ok", "1 of 2 models are as they were published"]
    )  # fmt: skip


def test_nothing_to_check_is_no_success(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert verify(tmp_path / "empty")[0] == 2
    assert verify(tmp_path / "absent")[0] == 2


def test_a_missing_folder_is_named_alone_since_models_are_optional(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "verify_repository.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert run.stderr.endswith("the following arguments are required: FOLDER\n")


def test_a_hard_link_is_read_once(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.link(repository / "net/labels.txt", repository / "again")
    read: list[str] = []
    original = verify_repository.sha256_of

    def sha256_of(path: str, progress: verify_repository.Progress) -> str:
        read.append(path)
        return original(path)

    monkeypatch.setattr(verify_repository, "sha256_of", sha256_of)
    paths = [str(repository / "net/labels.txt"), str(repository / "again")]
    digests = verify_repository.read_files(paths)
    assert len(read) == 1
    assert digests[paths[0]] == digests[paths[1]]
