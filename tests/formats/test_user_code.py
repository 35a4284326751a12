"""Python files in the folder of a model: what runs is the source that a person can read."""

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

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
