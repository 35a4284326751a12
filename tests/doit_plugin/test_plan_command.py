"""`doit plan`: it shows what would run and why, and writes nothing. test_star.py compares it with what then runs."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.project import DOIT, ROOT, Project


def everything(project: Project) -> dict[str, bytes]:
    """All files and folders except Python's bytecode."""
    found = {str(path.relative_to(project.root)): b"" for path in project.root.rglob("*") if path.is_dir()}
    found |= project.tree(".")
    return {path: data for path, data in found.items() if "__pycache__" not in path}


def test_it_writes_nothing_before_the_first_build(tiny: Project) -> None:
    before = everything(tiny)
    out = tiny.built("plan").out
    assert everything(tiny) == before
    assert re.search(r"^to run +weights +tiny +not built yet$", out, re.MULTILINE)
    assert out.splitlines()[-1] == "16 to run, 1 up to date"


def test_it_writes_nothing_after_it(built_tiny: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(built_tiny)
    with (project / "models/tiny/labels.txt").open("a") as file:
        file.write("one more\n")
    before = everything(project)
    assert project.plan()["to run"] == ["reference:tiny", "labels:tiny"]  # there is one label too many
    assert everything(project) == before


@pytest.fixture
def built(built_tiny: Project, copy_of: Callable[[Project], Project]) -> Project:
    return copy_of(built_tiny)


def line(out: str, task: str) -> str:
    stage, _, name = task.partition(":")
    (found,) = [line for line in out.splitlines() if re.search(rf" {stage} +{re.escape(name)} ", line)]
    return found


def test_a_key_of_the_spec_is_shown_as_the_spec_has_it(built: Project) -> None:
    built.edit("models/tiny/model.toml", "[accuracy]", "[onnx]\nopset = 16\n\n[accuracy]")
    out = built.built("plan").out
    assert re.fullmatch(r'to run +onnx +tiny +\d+\.\d s  onnx\.opset: "auto" -> 16', line(out, "onnx:tiny"))
    assert re.fullmatch(
        r"may run +measure +tiny_onnx +\d+\.\d s  if model\.onnx, model\.onnx\.signature\.json change",
        line(out, "measure:tiny_onnx"),
    )
    assert "tiny " not in re.sub(r"(to|may) run +(onnx|summary) +tiny .*", "", out), "what is up to date is not listed"
    assert re.fullmatch(
        r"2 to run \(about \d+\.\d s\), 5 may run \(about \d+\.\d s\), 10 up to date", out.splitlines()[-1]
    ), out


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ('[torchscript]\nprecision = "bf16"', 'torchscript.precision: "fp32" -> "bf16"; '),
        ('[triton]\ndevice = "gpu"', 'precision: "fp32" -> "fp16"; '),  # which engine.precision is all the time
    ],
)
def test_a_key_of_another_table_is_not_blamed(built: Project, keys: str, reason: str) -> None:
    built.edit("models/tiny/model.toml", "[accuracy]", f"{keys}\n\n[accuracy]")
    assert f" s  {reason}" in line(built.built("plan").out, "accuracy:tiny")


def test_a_changed_source_is_shown_by_its_digests(built: Project) -> None:
    with (built / "models/tiny/labels.txt").open("a") as file:
        file.write("one more\n")
    text = line(built.built("plan").out, "labels:tiny")
    assert re.search(r"models/tiny/labels\.txt: sha256 [0-9a-f]{8} -> [0-9a-f]{8}$", text)


def test_a_truncated_target_is_shown_as_such_and_stops_there(built: Project) -> None:
    path = built / "build/tiny/model.onnx"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    out = built.built("plan").out
    assert line(out, "onnx:tiny").endswith(f", truncated to 1000 of {size} bytes")
    assert out.splitlines()[-1].endswith(", 16 up to date"), "the same inputs give the same bytes"


def test_options_are_those_of_a_run(built: Project) -> None:
    out = built.built("plan", "onnx:tiny", "--opset_version", "16").out
    assert 'onnx.opset: "auto" -> 16' in line(out, "onnx:tiny")


def test_what_is_no_task_is_refused(built: Project) -> None:
    run = built.doit("plan", "onx:tiny")
    assert run.code == 3
    assert "onx:tiny" in run.out
    assert "Traceback" not in run.out


def test_what_doit_was_shown_to_ignore_is_ignored(built: Project) -> None:
    built.built("ignore", "onnx:tiny")
    (built / "build/tiny/model.onnx").unlink()
    assert {"onnx:tiny", "publish:tiny_onnx"} <= {*built.plan()["ignored"]}


def test_a_broken_command_harms_no_other(built: Project) -> None:
    (built / "build_tasks/doit_plugin/plan_command.py").write_text("this is no Python\n")
    assert re.search(r"doit list +", built.built("--help").out)
    run = built.doit("plan")
    assert (run.code, run.out.splitlines()[0][:16]) == (3, "ERROR: doit plan")
    assert built.built().out == "17 up to date\n"


def test_beside_another_dodo_file_doit_is_as_ever(tmp_path: Path) -> None:
    (tmp_path / "dodo.py").write_text("def task_hello():\n    return {'actions': ['echo hello']}\n")
    for arguments in ([], ["help"], ["-r", "json"], ["-r", "quiet"]):
        subprocess.run([DOIT, *arguments], cwd=tmp_path, check=True, capture_output=True, timeout=60)


def test_the_words_of_this_project_are_no_names_of_models(built: Project) -> None:
    words = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["doit.COMMAND"]
    for word in words:
        shutil.copytree(built / "models/tiny", built / f"models/{word}")
        run = built.doit("list")
        assert run.code == 3
        assert f"models/{word}" in run.out
        shutil.rmtree(built / f"models/{word}")
