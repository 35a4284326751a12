"""`doit container` with a fake docker command, and doit inside the container: the same checkout, without torch."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import fakes, tiny_network
from tests.support.project import ROOT, Project, Run

PLAN = '"torchscript", "onnx", "tensorrt"'

# Records its arguments. With INSIDE it runs the command of the container, and else it ends with EXIT_CODE.
DOCKER = """\
#!{python}
import json, os, subprocess, sys

with open(os.environ["CALLS"], "a") as file:
    print(json.dumps(sys.argv), file=file)
if "INSIDE" in os.environ:  # the environment of the container
    inside = {{**os.environ, **json.loads(os.environ["INSIDE"])}}
    sys.exit(subprocess.run(["bash", "-c", sys.argv[-1]], env=inside).returncode)
sys.exit(int(os.environ.get("EXIT_CODE", "0")))
"""


@pytest.fixture
def docker(tmp_path: Path) -> dict[str, str]:
    """The environment variables that put a fake docker command first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(DOCKER.format(python=sys.executable))
    (folder / "docker").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls.jsonl")}


def calls(docker: dict[str, str]) -> list[list[str]]:
    return [json.loads(line) for line in Path(docker["CALLS"]).read_text().splitlines()]


def line(project: Project, release: str, *models: str) -> list[str]:
    tasks = " ".join(f"publish:{model}_trt" for model in models)
    return [
        *("run", "--rm", "--gpus", "all"),
        *("--user", f"{os.getuid()}:{os.getgid()}"),
        *("--env", "HOME=/tmp", "--env", "PIP_BREAK_SYSTEM_PACKAGES=1", "--env", "PIP_CONSTRAINT="),
        *("--volume", f"{project.root}:/workspace/models", "--workdir", "/workspace/models"),
        f"nvcr.io/nvidia/tensorrt:{release}-py3",
        *("bash", "-c"),
        f"python3 -m pip install --user -r requirements-engine.txt && python3 -m doit {tasks}",
    ]


def test_docker_is_run_as_shown(project: Project, docker: dict[str, str]) -> None:
    tiny_network.add(project, "net", formats=PLAN)
    tiny_network.add(project, "no_plan")
    run = project.built("container", **docker)
    ((_, *arguments),) = calls(docker)
    assert arguments == line(project, "26.08", "net"), "only for the models with a plan"
    assert f"+ {shlex.join(['docker', *arguments])}" in run.out.splitlines()


def test_models_are_built_in_the_container_of_their_tritons_release(project: Project, docker: dict[str, str]) -> None:
    for name, release in (("a", "25.03"), ("b", None), ("c", "25.03")):
        folder = tiny_network.add(project, name, formats=PLAN)
        if release:
            (folder / "model.toml").write_text(
                (folder / "model.toml").read_text() + f'[triton]\nrelease = "{release}"\n'
            )
    run = project.built("container", **docker)
    assert [arguments for _, *arguments in calls(docker)] == [
        line(project, "25.03", "a", "c"),
        line(project, "26.08", "b"),
    ]
    assert len([text for text in run.out.splitlines() if text.startswith("+ docker")]) == 2


def test_options_of_the_spec_reach_the_container(project: Project, docker: dict[str, str]) -> None:
    for name in ("a", "b"):
        tiny_network.add(project, name, formats=PLAN)
    project.built("container", "--engine_precision", "FP32", "--dynamic_axes", "True", **docker)
    ((*_, script),) = calls(docker)
    options = "--engine_precision fp32 --dynamic_axes"
    tasks = " ".join(f"engine:{name} {options} publish:{name}_trt" for name in ("a", "b"))
    assert script.partition("python3 -m doit ")[2] == tasks
    plan = project.built("plan", *shlex.split(tasks)).out
    assert "engine a" in " ".join(plan.split()), "doit in the container takes these words"


def test_an_impossible_option_starts_no_container(project: Project, docker: dict[str, str]) -> None:
    tiny_network.add(project, "net", formats=PLAN)
    run = project.doit("container", "--engine_precision", "FP7", **docker)
    assert run.code == 1
    assert "model.toml --engine_precision fp7: engine.precision: expected one of fp32, tf32" in run.out
    assert not Path(docker["CALLS"]).exists()


def test_the_exit_code_of_docker_fails_the_task(project: Project, docker: dict[str, str]) -> None:
    tiny_network.add(project, "net", formats=PLAN)
    run = project.doit("container", EXIT_CODE="125", **docker)
    assert run.code == 1
    assert "docker ended with exit code 125" in run.out


def test_without_docker_the_command_is_printed_for_another_machine(project: Project, tmp_path: Path) -> None:
    tiny_network.add(project, "net", formats=PLAN)
    (tmp_path / "empty").mkdir()
    run = project.doit("container", PATH=str(tmp_path / "empty"))
    assert run.code == 1
    assert "there is no docker on the PATH; run the line above on a machine that has Docker" in run.out
    assert f"+ {shlex.join(['docker', *line(project, '26.08', 'net')])}" in run.out.splitlines()


def test_without_a_plan_there_is_nothing_to_run(project: Project, docker: dict[str, str]) -> None:
    tiny_network.add(project, "net")
    project.built("container", **docker)
    assert not Path(docker["CALLS"]).exists()


def test_a_plain_doit_starts_no_container(project: Project, docker: dict[str, str]) -> None:
    tiny_network.add(project, "net", formats=PLAN)
    project.doit("list", "--all", **docker)
    listed = project.built("list").out
    assert "build the engines in NVIDIA's container" in listed
    assert not Path(docker["CALLS"]).exists()


# In the container.


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment like NVIDIA's container: requirements-engine.txt, and TensorRT-RTX as TensorRT."""
    import tensorrt_rtx  # type: ignore[import-untyped]

    folder = tmp_path_factory.mktemp("container")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [str(folder / "venv/bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", "requirements-engine.txt"], cwd=ROOT, check=True)  # which names the folder itself, "."
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    for package in ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs"):
        (site / package).symlink_to(Path(tensorrt_rtx.__file__).parent.parent / package)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which everything is built that needs no GPU."""
    project = Project(tmp_path_factory.mktemp("checkout") / "project")
    for file in ("requirements-engine.txt", "doit_model_repository.py", "README.md", "LICENSE"):  # what pip installs
        shutil.copy(ROOT / file, project.root)
    tiny_network.add(project, "tiny", formats=PLAN)
    run = project.built(**fakes.machine(project.root.parent, tensorrt=None, gpus=None))
    assert "engine:tiny" not in run.ran
    return project


def doit_inside(inside: Path, project: Project, *arguments: str) -> Run:
    run = subprocess.run(
        [inside / "venv/bin/python", "-m", "doit", *arguments],
        cwd=project.root,
        env={**os.environ, **fakes.machine(inside)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Run(run.returncode, run.stdout)


ABSENT = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "modelopt", "safetensors", "PIL")


def test_the_container_has_none_of_torch(inside: Path) -> None:
    program = (
        "import importlib.util as u; "
        f"print([name for name in {ABSENT!r} if u.find_spec(name)], bool(u.find_spec('polygraphy')))"
    )
    run = subprocess.run([inside / "venv/bin/python", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] True"


def test_in_the_container_nothing_is_stale_but_the_engines(
    inside: Path, checkout: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(checkout)
    run = doit_inside(inside, project, "engine:tiny")
    assert (run.code, run.ran, run.failed) == (0, ["engine:tiny"], []), run.out
    assert doit_inside(inside, project, "engine:tiny").ran == []
    run = doit_inside(inside, project)
    assert run.ran == ["client:tiny_trt", "config:tiny_trt"]
    assert run.failed == ["measure:tiny_trt"], "it runs the plan, which needs CUDA"
    assert run.code == 1
    assert re.search(r"TensorRT \S+ cannot run build/tiny/model.plan, which TensorRT \S+ built for NVIDIA RTX", run.out)
    published = sorted(path.name for path in (project / "model_repository").iterdir())
    assert published == ["tiny", "tiny_onnx"]
    outside = project.doit(**fakes.machine(project.root.parent, tensorrt=None, gpus=None))
    assert (outside.code, outside.ran, outside.failed) == (0, [], []), "outside the container everything is up to date"


def test_doit_container_builds_the_plan_from_end_to_end(
    inside: Path, checkout: Project, copy_of: Callable[[Project], Project], docker: dict[str, str]
) -> None:
    """All but Docker itself runs: pip with requirements-engine.txt, then doit, in the container's environment.

    measure:tiny_trt fails because there is no CUDA, and `doit container` fails with its exit code.
    """
    project = copy_of(checkout)
    (inside / "bin").mkdir(exist_ok=True)
    python3 = inside / "bin/python3"
    # pip does not accept --user in a virtual environment. The requirements are installed already.
    python = shlex.quote(str(inside / "venv/bin/python"))
    python3.write_text(f'#!/bin/bash\nexec {python} "${{@/--user/--disable-pip-version-check}}"\n')
    python3.chmod(0o755)
    environment = {**fakes.machine(inside), "PATH": f"{inside / 'bin'}:{os.environ['PATH']}"}
    run = project.doit("container", INSIDE=json.dumps(environment), **docker)
    assert "engine:tiny" in run.ran, run.out
    assert "measure:tiny_trt" in run.failed
    assert run.code == 1
    assert "docker ended with exit code " in run.out
    assert (project / "build/tiny/model.plan").exists()
    assert "Requirement already satisfied: doit==0.37.0" in run.out
