"""Python files in the folder of a model: what runs is the source that a person can read."""

import os
import py_compile
import re
import subprocess
import sys
from pathlib import Path

import pytest

from build_tasks.errors import UserError
from build_tasks.formats.user_code import function_of_file, network_of_function
from tests.support.project import ENVIRONMENT, ROOT

CALL = "from build_tasks.formats.user_code import user_function; print(user_function('net', 'network.py:build')())"
NETWORK = "from models.net.parts import layers\n\n\ndef build():\n    return layers.NAME\n"


def run(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Call the function of models/net/network.py as a stage does."""
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    return subprocess.run(
        [sys.executable, "-c", CALL], cwd=folder, env=environment, text=True, capture_output=True, check=False
    )


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """The folder of a module that models/net/network.py imports."""
    parts = tmp_path / "models/net/parts"
    parts.mkdir(parents=True)
    (tmp_path / "models/net/network.py").write_text(NETWORK)
    (parts / "layers.py").write_text("NAME = 'source'\n")
    return parts


def compiled(folder: Path, target: Path) -> None:
    """Write bytecode of another source that Python would not compare with the source beside it (PEP 552)."""
    other = folder / "other.py"
    other.write_text("NAME = 'bytecode'\n")
    py_compile.compile(str(other), str(target), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    other.unlink()


def test_bytecode_of_modules_that_a_network_imports_does_not_run(parts: Path, tmp_path: Path) -> None:
    compiled(tmp_path, parts / f"__pycache__/layers.{sys.implementation.cache_tag}.pyc")
    python = [sys.executable, "-c", "from models.net.parts import layers; print(layers.NAME)"]
    assert subprocess.check_output(python, cwd=tmp_path, text=True) == "bytecode\n", "Python itself runs it"
    assert run(tmp_path).stdout == "source\n"


def test_bytecode_without_a_source_is_not_found(parts: Path, tmp_path: Path) -> None:
    (parts / "layers.py").unlink()
    compiled(tmp_path, parts / "layers.pyc")
    ended = run(tmp_path)
    assert ended.returncode != 0
    assert "cannot import name 'layers'" in ended.stderr


def test_imports_write_no_bytecode(parts: Path, tmp_path: Path) -> None:
    assert run(tmp_path).stdout == "source\n"
    assert not list((tmp_path / "models").rglob("__pycache__"))


LINEAR = "from torch import jit, nn\nimport torch\ndef build():\n    "
NO_NETWORKS = {
    "an error": (f"{LINEAR}raise ValueError('no such size')", "network.py, line 4: ValueError: no such size"),
    "an error without words": (f"{LINEAR}assert False", "network.py, line 4: AssertionError"),
    "the end of a script": (f"{LINEAR}raise SystemExit(2)", "network.py, line 4: SystemExit: 2"),
    "a script": (f"raise SystemExit(2)\n{LINEAR}pass", "network.py, line 1: SystemExit: 2"),
    "an argument": ("def build(size):\n    pass", "network.py: TypeError: build() missing 1 required positional"),
    "nothing": (
        f"{LINEAR}pass",
        "network.py:build: expected a function that returns a network, a torch.nn.Module, found N",
    ),
    "a class": (f"{LINEAR}return nn.Linear", "found the class Linear"),
    "a state": (f"{LINEAR}return nn.Linear(1, 1).state_dict()", "found OrderedDict"),
    "a network": (
        "from torch import nn\nbuild = nn.Linear(1, 1)",
        "expected a function that builds a network, found a network",
    ),
    "TorchScript": (f"{LINEAR}return jit.script(nn.Linear(1, 1))", "found TorchScript: save it as a file"),
    "torch.compile": (f"{LINEAR}return torch.compile(nn.Linear(1, 1))", "leave out torch.compile and DataParallel"),
    "DataParallel": (f"{LINEAR}return nn.DataParallel(nn.Linear(1, 1))", "leave out torch.compile and DataParallel"),
    "a lazy layer": (f"{LINEAR}return nn.LazyLinear(1)", "weight has no shape yet: run the network once on an example"),
    "a state that is no tensor": (
        "from torch import nn\nclass Net(nn.Linear):\n    def get_extra_state(self):\n        return 1\n"
        "def build():\n    return Net(1, 1)",
        "_extra_state of its state is no tensor",
    ),
    "a relative import": ("from .layers import Head", "write `from layers import …`, since files are imported from"),
    "the name of a library": ("from json import Head", "a library has the name of json.py beside it: rename this file"),
    "a module that is not there": (
        "import absent_module",
        "line 1: ModuleNotFoundError: No module named 'absent_module'",
    ),
}


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and lazy layers may change
@pytest.mark.parametrize("case", NO_NETWORKS)
def test_what_builds_no_network_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    source, line = NO_NETWORKS[case]
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "network.py"
    path.write_text(source)
    (tmp_path / "json.py").write_text("Head = 1\n")
    with pytest.raises(UserError, match=re.escape(line)) as raised:
        network_of_function(function_of_file(str(path), "build"), f"{path}:build", {})
    assert "\n" not in str(raised.value)
    assert ("rename this file" in str(raised.value)) == (case == "the name of a library")
