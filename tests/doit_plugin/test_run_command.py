"""The `run` command: with which doit and which installed commands it works, and with which dodo.py."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import doit.version
import pytest
from doit.exceptions import InvalidDodoFile

import doit_model_repository
from build_tasks.doit_plugin import state
from tests.support.project import DOIT, OTHER, Project


def test_another_release_of_doit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    state.require_doit()
    monkeypatch.setattr(doit.version, "VERSION", (0, 38, 1))
    with pytest.raises(InvalidDodoFile) as refused:
        state.require_doit()
    expected = "this project requires doit 0.37, and doit 0.38.1 is installed: run `pip install -r requirements.txt`"
    assert str(refused.value) == expected


@pytest.mark.parametrize("installed", ["0.1.0", None])
def test_older_installed_commands_are_refused_in_one_line(
    installed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.delitem(sys.modules, "doit_model_repository", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        InvalidDodoFile, match=r"finds (0\.1\.0|none): run `pip install -r requirements.txt`$"
    ) as refused:
        state.require_installed_commands()
    assert "\n" not in str(refused.value)


def test_the_installed_file_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"].startswith(".".join(map(str, doit_model_repository.VERSION)))
    monkeypatch.setattr(doit_model_repository, "VERSION", (0, 1))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    with pytest.raises(InvalidDodoFile, match=r"finds 0\.1\.0"):
        state.require_installed_commands()


def test_records_in_another_format_are_refused_in_one_line(project: Project) -> None:
    project.model("other", OTHER)
    run = project.doit("--backend", "json", "prune")
    assert (run.code, run.out.count("\n")) == (3, 1), run.out
    assert run.out.startswith("ERROR: this project needs its own command `doit run` with SQLite records")


def test_the_dodo_file_is_found_from_another_folder(project: Project, tmp_path: Path) -> None:
    project.model("other", OTHER)
    for folder, arguments in ((tmp_path, ["-f", f"{project.root}/dodo.py"]), (project / "models/other", ["-k"])):
        run = subprocess.run([DOIT, *arguments, "prune"], cwd=folder, capture_output=True, text=True, check=True)
        assert run.stdout.endswith("1 up to date\n")
