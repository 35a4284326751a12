"""What makes a stage stale in real runs: edits of its inputs, of this project and of the user's code."""

import os
import re
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import add_with_converter
from tests.support.project import ROOT, Project


def test_an_input_that_changes_during_the_build_is_not_published(project: Project, tiny_weights: Path) -> None:
    add_with_converter(project, tiny_weights, "open('models/tiny/convert.py', 'a').write('# saved by an editor\\n')")
    run = project.doit("weights:tiny")
    assert run.code == 1
    assert "models/tiny/convert.py changed while being used; nothing was written, run doit again" in run.out
    assert not (project / "build/tiny/weights.safetensors").exists()
    project.edit("models/tiny/convert.py", "open(", "None and open(")
    assert project.built("weights:tiny").ran == ["weights:tiny"]


@pytest.mark.parametrize(
    "swap",
    [
        "import os, shutil; os.rename(w, w + '.a'); shutil.copy(w + '.a', w); os.replace(w + '.a', w)",
        "import os; s = os.stat(w); a = open(w, 'rb').read(); open(w, 'r+b').write(b'other'); "
        "open(w, 'wb').write(a); os.utime(w, ns=(s.st_atime_ns, s.st_mtime_ns))",
    ],
    ids=["by renames", "in place"],
)
def test_an_input_that_was_another_one_for_a_moment_is_not_published(
    project: Project, tiny_weights: Path, swap: str
) -> None:
    """Its content is the same before and after. What was read in between may have been the other one."""
    add_with_converter(project, tiny_weights, f"w = 'models/tiny/weights.safetensors'; {swap}")
    run = project.doit("weights:tiny")
    assert run.code == 1
    assert "models/tiny/weights.safetensors changed while being used; nothing was written, run doit again" in run.out
    assert not (project / "build/tiny/weights.safetensors").exists()


def test_a_module_of_the_project_that_is_edited_during_the_run_fails_its_stage(
    project: Project, tiny_weights: Path
) -> None:
    add_with_converter(
        project, tiny_weights, "open('build_tasks/stages/reference.py', 'a').write('# saved by an editor\\n')"
    )
    run = project.doit("reference:tiny")
    assert run.code == 1
    assert run.failed == ["reference:tiny"]
    assert "build_tasks.stages.reference was edited since doit started; run doit again" in run.out
    assert project.built("reference:tiny").ran == ["reference:tiny"]


def test_the_users_code_runs_as_it_is_written_whatever_its_mtime(project: Project, tiny_weights: Path) -> None:
    """Python's bytecode cache trusts a file with the same size and the same second of modification."""
    add_with_converter(project, tiny_weights, "state['classifier.bias'] = state['classifier.bias'] + 1")
    path = project / "models/tiny/convert.py"
    results = []
    for step in ("1", "3"):
        path.write_text(path.read_text().replace("+ 1", f"+ {step}"))
        os.utime(path, (1_600_000_000, 1_600_000_000))
        project.built("weights:tiny", PYTHONDONTWRITEBYTECODE="")
        results.append((project / "build/tiny/weights.safetensors").read_bytes())
    assert results[0] != results[1]


@pytest.mark.parametrize("network", ["net.py", "inner/net.py"])
def test_an_edit_of_any_python_file_of_a_network_makes_its_stages_stale(project: Project, network: str) -> None:
    """Also if the converter is in the same file, or if the file is in a folder."""
    code = (
        "from torch import nn\nGAIN = 1.0\n"
        "class Net(nn.Linear):\n    def forward(self, x):\n        return super().forward(x.flatten(1)) * GAIN\n"
        "def build():\n    return Net(48, 4)\ndef convert(state):\n    return state\n"
    )
    converter = '\nconverter = "net.py:convert"' if network == "net.py" else ""
    spec = (
        f'formats = ["torchscript"]\n[architecture]\nnetwork = "{network}:build"\n[input]\nshape = [3, 4, 4]\n'
        f'[weights]\nsource = "random://0"{converter}\n'
    )
    file = project.model("own", spec) / network
    file.parent.mkdir(exist_ok=True)
    file.write_text(code)
    project.built("torchscript:own")
    before = (project / "build/own/model.pt").read_bytes()
    project.edit(f"models/own/{network}", "GAIN = 1.0", "GAIN = 5.5")
    assert "torchscript:own" in project.built("torchscript:own").ran
    assert (project / "build/own/model.pt").read_bytes() != before


def test_tools_that_are_not_installed_make_nothing_stale(
    built_tiny: Project, copy_of: Callable[[Project], Project], tmp_path: Path
) -> None:
    """A virtual environment with doit, its plugin and msgspec, like that of a container for a single stage."""
    project = copy_of(built_tiny)
    venv.create(tmp_path / "venv", with_pip=True)
    pins = re.findall(r"^(?:doit|msgspec)==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert len(pins) == 2
    subprocess.run([tmp_path / "venv/bin/pip", "install", "--quiet", *pins, str(ROOT)], check=True)
    doit = [str(tmp_path / "venv/bin/doit")]
    run = subprocess.run(doit, cwd=project.root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "up to date" in run.stdout
    assert "✓" not in run.stdout
    project.edit("models/tiny/model.toml", "[accuracy]", "[onnx]\nopset = 16\n\n[accuracy]")
    run = subprocess.run(doit, cwd=project.root, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "the package torch is not installed here: pip install -r requirements.txt" in run.stdout
