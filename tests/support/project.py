"""A temporary project around the real dodo.py, and the real `doit` in it."""

import compileall
import contextlib
import functools
import os
import re
import shutil
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

if "PYTEST_XDIST_WORKER" in os.environ:  # PyTorch's threads would fight with those of the other workers
    os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent.parent

# A copy of the project comes with its bytecode, as a checkout has it after its first doit.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
compileall.compile_dir(str(ROOT / "build_tasks"), quiet=2)
DOIT = str(Path(sys.executable).with_name("doit"))

CONVERTER = "def convert(state):\n    return dict(state)\n"

# 0.4 million parameters and 160 x 160 pixels: the real stages in a second each.
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


@dataclass
class Run:
    """One run of doit: what it said, and which tasks did what."""

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


def refusal(run: Run, task: str, marks: str = "✗") -> str:
    """The one line on a task that ended with one of these marks."""
    stage, _, name = task.partition(":")
    (line,) = [line for line in run.out.splitlines() if line.split()[:3] in [[mark, stage, name] for mark in marks]]
    return line


VARIABLES = dict(os.environ)  # before what tests import has added to them, as timm does


@functools.cache
def fork_server() -> str:
    """The address of the one that tests share, which ends with this process. See warm.py."""
    server: Any = ForkServer()
    server.set_forkserver_preload(["forkserver_preload"])
    environment = {**VARIABLES, **worker.ENVIRONMENT, "IMPORTED": " ".join(worker.heavy(worker.PRELOAD))}
    with contextlib.chdir(ROOT / "tests/support"), patch.dict(os.environ, environment, clear=True):
        server.ensure_running()
    return str(server._forkserver_address)


class Project:
    """A copy of the project in a folder of its own."""

    cold = False  # each doit starts its own fork server

    def __init__(self, root: Path):
        self.root = root
        shutil.copytree(ROOT / "build_tasks", root / "build_tasks")
        for file in ("dodo.py", "pyproject.toml", "requirements-tritonserver.txt"):
            shutil.copy(ROOT / file, root)
        (root / "models").mkdir()

    def __truediv__(self, path: str) -> Path:
        return self.root / path

    def copy(self, root: Path, ignore: Callable[[Any, list[str]], Any] | None = None) -> "Project":
        """What is built here is up to date there: timestamps are kept."""
        copy = Project.__new__(Project)
        copy.root = root
        shutil.copytree(self.root, root, copy_function=shutil.copy2, ignore=ignore)
        return copy

    def model(self, name: str, spec: str = TINY, **files: str) -> Path:
        """A model with this spec; `files` are further files of its folder, name_py for name.py."""
        folder = self / f"models/{name}"
        folder.mkdir(exist_ok=True)
        (folder / "model.toml").write_text(spec)
        for file, text in files.items():
            (folder / file.replace("_py", ".py").replace("_txt", ".txt")).write_text(text)
        return folder

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self / path).read_text()
        assert old in text, f"{path} does not hold {old!r}"
        (self / path).write_text(text.replace(old, new, 1))

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Stages come from a fork server that runs already, unless that shows."""
        command = [DOIT, *arguments]
        if not (self.cold or environment):
            command = [sys.executable, str(ROOT / "tests/support/shared_forkserver.py"), fork_server(), *command]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**VARIABLES, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def doit(self, *arguments: str, **environment: str) -> Run:
        process = self.start(*arguments, **environment)
        out, _ = process.communicate(timeout=600)
        return Run(process.returncode, out)

    def terminal(self, *arguments: str, **environment: str) -> str:
        """As built, on a terminal of 120 columns; all that was written to it."""
        import fcntl
        import pty
        import struct
        import termios

        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        known = {**VARIABLES, "TERM": "xterm-256color", "COLUMNS": "120", **environment}
        process = subprocess.Popen(
            [DOIT, *arguments], cwd=self.root, env=known, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # of Linux, where the last of the other side has gone
                break
            if not data:
                break
            shown += data
        process.wait(timeout=60)
        os.close(ours)
        return shown.decode()

    def built(self, *arguments: str, **environment: str) -> Run:
        """As doit, for a run that must succeed."""
        run = self.doit(*arguments, **environment)
        assert run.code == 0, run.out
        return run

    def plan(self, *arguments: str, **environment: str) -> dict[str, list[str]]:
        """The tasks that `doit plan` lists, by state."""
        out = self.built("plan", *arguments, **environment).out
        found: dict[str, list[str]] = {state: [] for state in ("to run", "may run", "not for this machine", "ignored")}
        for line in out.splitlines()[:-1]:
            match = re.match(rf"({'|'.join(found)}) +(\S+) *(\S*)", line)
            assert match, line
            state, stage, name = match.groups()
            found[state].append("prune" if stage == "prune" else f"{stage}:{name}")
        return found

    def tree(self, folder: str = "model_repository") -> dict[str, bytes]:
        """Every file below a folder, by path, with its content."""
        top = self / folder
        return {str(p.relative_to(top)): p.read_bytes() for p in sorted(top.rglob("*")) if p.is_file()}


def add_tiny(project: Project, weights: Path, name: str = "tiny") -> None:
    folder = project.model(name, labels_txt="".join(f"class {index}\n" for index in range(1000)))
    shutil.copy(weights, folder)


@contextlib.contextmanager
def mounted(folder: Path, *what: str, lazily: bool = False) -> Iterator[Path]:
    """A file system at a new folder, of what `mount` takes. The test is skipped where nobody may do that.

    lazily: it ends with the last process in it, not at once.
    """
    folder.mkdir()
    try:
        subprocess.run(["mount", *what, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", *(["--lazy"] if lazily else []), folder], check=True)
