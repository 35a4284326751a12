"""A temporary project with the real dodo.py, in which tests run the real `doit`."""

import compileall
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from build_tasks.runtime import worker
from build_tasks.runtime.distributions import installed_version

if "PYTEST_XDIST_WORKER" in os.environ:  # more threads would slow down the other workers
    os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent.parent

# Copies of the project include bytecode, as a checkout does after its first doit.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
compileall.compile_dir(str(ROOT / "build_tasks"), quiet=2)
DOIT = str(Path(sys.executable).with_name("doit"))

CONVERTER = "def convert(state):\n    return dict(state)\n"

# 0.4 million parameters and 160 x 160 pixels: each stage takes about a second.
TINY = """\
formats = ["torchscript", "onnx"]
max_batch_size = 4
labels = "labels.txt"

[architecture]
timm = "test_efficientnet"

[weights]
source = "weights.safetensors"

[accuracy]
allow_untestable = true
"""

OTHER = """\
formats = ["torchscript"]
max_batch_size = 2

[architecture]
timm = "test_resnet"

[weights]
source = "random://0"
"""


# The records in the folder of each published version. Without its library there is no bill of materials.
VERSION_RECORDS = ["bom.cdx.json"] * (installed_version("cyclonedx-python-lib") is not None) + ["provenance.json"]


@dataclass
class Run:
    """One run of doit: its exit code, its output, and the tasks that were built or failed."""

    code: int
    out: str
    ran: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out = re.sub(r"^\d\d:\d\d:\d\d ", "", self.out, flags=re.MULTILINE)
        lines = re.findall(r"^([✓✗]) (\S+)(?: +(\S+))?", self.out, re.MULTILINE)
        names = [(mark, f"{stage}:{name}" if name else stage) for mark, stage, name in lines]
        self.ran = sorted(name for mark, name in names if mark == "✓")
        self.failed = sorted(name for mark, name in names if mark == "✗")


def failure_line(run: Run, task: str, marks: str = "✗") -> str:
    """The line about a task in the output; there must be exactly one, with one of these marks."""
    stage, _, name = task.partition(":")
    (line,) = [line for line in run.out.splitlines() if line.split()[:3] in [[mark, stage, name] for mark in marks]]
    return line


ENVIRONMENT = dict(os.environ)  # before imports of tests change it, as timm does


@functools.cache
def fork_server() -> str:
    """The address of the fork server that tests share. It ends with this process. See shared_forkserver.py."""
    server: Any = ForkServer()
    server.set_forkserver_preload(["forkserver_preload"])
    environment = {
        **ENVIRONMENT,
        **worker.ENVIRONMENT,
        "PRELOADED_MODULES": " ".join(worker.heavy_libraries(worker.HEAVY_LIBRARIES)),
    }
    with contextlib.chdir(ROOT / "tests/support"), patch.dict(os.environ, environment, clear=True):
        server.ensure_running()
    return str(server._forkserver_address)


class Project:
    """A copy of the project in a folder of its own."""

    own_fork_server = False  # whether each doit starts one, instead of using the one that tests share

    def __init__(self, root: Path):
        self.root = root
        shutil.copytree(ROOT / "build_tasks", root / "build_tasks")
        for file in ("dodo.py", "pyproject.toml", "requirements-tritonserver.txt"):
            shutil.copy(ROOT / file, root)
        (root / "models").mkdir()

    def __truediv__(self, path: str) -> Path:
        return self.root / path

    def copy(self, root: Path, ignore: Callable[[Any, list[str]], Any] | None = None) -> "Project":
        """Copy the project with its timestamps, so that what is built stays up to date."""
        copy = Project.__new__(Project)
        copy.root = root
        shutil.copytree(self.root, root, copy_function=shutil.copy2, ignore=ignore)
        return copy

    def model(self, name: str, spec: str = TINY, **files: str) -> Path:
        """Add a model, and return its folder. `files` are further files in it: name_py is the content of name.py."""
        folder = self / f"models/{name}"
        folder.mkdir(exist_ok=True)
        (folder / "model.toml").write_text(spec)
        for file, text in files.items():
            (folder / file.replace("_py", ".py").replace("_txt", ".txt")).write_text(text)
        return folder

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self / path).read_text()
        assert old in text, f"{path} does not contain {old!r}"
        (self / path).write_text(text.replace(old, new, 1))

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Start doit with these arguments and further environment variables.

        The processes of its stages come from the shared fork server, unless it has to be one of this doit: where the
        test module asks for that, or where the environment differs.
        """
        command = [DOIT, *arguments]
        if not (self.own_fork_server or environment):
            command = [sys.executable, str(ROOT / "tests/support/shared_forkserver.py"), fork_server(), *command]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def doit(self, *arguments: str, **environment: str) -> Run:
        """Run doit to its end."""
        process = self.start(*arguments, **environment)
        try:
            out, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it would go on beside the other tests
            raise AssertionError(f"it did not end: {process.communicate()[0]}") from None
        return Run(process.returncode, out)

    def terminal(self, *arguments: str, **environment: str) -> str:
        """Run doit on a terminal of COLUMNS columns (120), and return all that was written to the terminal."""
        import fcntl
        import pty
        import struct
        import termios

        variables = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "120", **environment}
        own_end, doit_end = pty.openpty()
        fcntl.ioctl(doit_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, int(variables["COLUMNS"]), 0, 0))
        process = subprocess.Popen(
            [DOIT, *arguments], cwd=self.root, env=variables, stdin=doit_end, stdout=doit_end, stderr=doit_end,
            start_new_session=True,
        )  # fmt: skip
        os.close(doit_end)
        output = b""
        while True:
            try:
                data = os.read(own_end, 1 << 16)
            except OSError:  # on Linux, when the other end is closed
                break
            if not data:
                break
            output += data
        process.wait(timeout=60)
        os.close(own_end)
        return output.decode()

    def built(self, *arguments: str, **environment: str) -> Run:
        """Run doit to its end; it must succeed."""
        run = self.doit(*arguments, **environment)
        assert run.code == 0, run.out
        return run

    def plan(self, *arguments: str, **environment: str) -> dict[str, list[str]]:
        """The tasks that `doit plan` lists, by state."""
        out = self.built("plan", *arguments, **environment).out
        tasks: dict[str, list[str]] = {state: [] for state in ("to run", "may run", "not for this machine", "ignored")}
        for line in out.splitlines()[:-1]:
            match = re.match(rf"({'|'.join(tasks)}) +(\S+) *(\S*)", line)
            assert match, line
            state, stage, name = match.groups()
            tasks[state].append("prune" if stage == "prune" else f"{stage}:{name}")
        return tasks

    def tree(self, folder: str = "model_repository") -> dict[str, bytes]:
        """Every file below a folder, by path, with its content."""
        top = self / folder
        return {str(p.relative_to(top)): p.read_bytes() for p in sorted(top.rglob("*")) if p.is_file()}


def add_tiny(project: Project, weights: Path, name: str = "tiny") -> None:
    """Add a model with the spec TINY, its labels and its weights."""
    folder = project.model(name, labels_txt="".join(f"class {index}\n" for index in range(1000)))
    shutil.copy(weights, folder)


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str, lazily: bool = False) -> Iterator[Path]:
    """Mount a file system at a new folder. The test is skipped where that is not permitted.

    Args:
        arguments: What `mount` takes before the folder.
        lazily: Unmount it when the last process in it has ended, not at once.
    """
    folder.mkdir()
    try:
        subprocess.run(["mount", *arguments, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not permit a mount: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", *(["--lazy"] if lazily else []), folder], check=True)


def overwrite_byte(path: Path) -> None:
    """Overwrite the byte at 20,000,000 of a file in place, and restore its mtime; its size stays as it was."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(20_000_000)
        file.write(b"\xff")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
