"""What CONTRIBUTING.md promises about the code itself: sizes of modules, empty packages, the words that it uses."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import vocabulary
from tests.support.project import ROOT

MODULES = sorted((ROOT / "build_tasks").rglob("*.py"))
LONGEST = 320  # lines


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_fits_into_one_reading(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{path}: {lines} lines"
    assert path.name != "__init__.py" or lines == 0, f"{path} holds code"


def test_every_folder_of_modules_is_a_package() -> None:
    """import-linter sees only packages: a folder without `__init__.py` would stand outside its contract."""
    stubs = ROOT / "build_tasks/serving/stub_backends"  # models of a server, which no code imports
    folders = {path.parent for path in MODULES if stubs not in path.parents}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(("word", "uses"), vocabulary.places().items())
def test_a_word_that_the_field_says_better_is_no_identifier(word: str, uses: list[str]) -> None:
    assert uses == [], "CONTRIBUTING.md says which word to use"


def test_the_packages_import_each_other_in_one_order() -> None:
    """The contract stands in pyproject.toml. Imports inside functions count."""
    command = [str(Path(sys.executable).with_name("lint-imports"))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_pyproject_and_requirements_name_the_same_packages() -> None:
    """`uv sync` reads the group, pip the file."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["build"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    packages = [line.partition("#")[0].strip() for line in lines]
    assert group == [package for package in packages if package not in ("", ".")]
