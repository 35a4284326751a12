"""container: build the engines of all models in NVIDIA's TensorRT container, over this checkout

    docker run --gpus all … tensorrt:<release>-py3   pip install -r requirements-engine.txt && doit publish:NAME_trt …

Options such as --engine_precision are those of the task `engine`, for all models.

The image of a Triton release has the TensorRT that this release serves with. Only the engines are stale in there: a
package that is not installed cannot make an artifact stale.
"""

import os
import shlex
import shutil
import subprocess
from typing import Any

from doit.exceptions import TaskFailed

from build_tasks.errors import UserError
from build_tasks.spec import overrides
from build_tasks.spec.loader import read_model
from build_tasks.spec.model import Model

# Source: the TensorRT container's page and the framework support matrix; its releases are numbered as Triton's.
IMAGE = "nvcr.io/nvidia/tensorrt:{}-py3"
WORKSPACE = "/workspace/models"


def task(models: list[Model]) -> dict[str, Any]:
    """doit's task `container`."""
    return {
        "actions": [(run, [models])],
        "params": overrides.params("container"),
        "doc": "On demand: build the engines in NVIDIA's container (needs Docker and a GPU)",
        "io": {"capture": False},
    }


def commands(models: list[Model], options: overrides.Overrides | None = None) -> list[list[str]]:
    """The command line of each release that a spec names, which builds and publishes the plans for that release.

    The tasks are named one by one: doit then fails where the container sees no GPU, and does not skip them.

    Args:
        options: Values that override the specs of all these models.
    Raises:
        UserError: If a value does not fit a spec.
    """
    words = [word for text, _ in (options or {}).values() for word in text.split()]
    releases: dict[str, list[str]] = {}
    for model in models:
        if "tensorrt" in model.spec.formats:
            tasks = releases.setdefault(model.release, [])
            if options:
                read_model(model.name, options)  # a mistake is reported before the container starts
                tasks += [f"engine:{model.name}{model.capability_suffix(next(iter(model.plans)))}", *words]
            tasks.append(f"publish:{model.triton_name('tensorrt')}")
    return [command(release, tasks) for release, tasks in sorted(releases.items())]


def command(release: str, tasks: list[str]) -> list[str]:
    """The arguments of `docker run` for some tasks.

    The container runs as the calling user, who then owns the files that it writes. pip installs into HOME.
    """
    script = f"python3 -m pip install --user -r requirements-engine.txt && python3 -m doit {shlex.join(tasks)}"
    return [
        *("docker", "run", "--rm", "--gpus", "all"),
        *(("--user", f"{os.getuid()}:{os.getgid()}") if hasattr(os, "getuid") else ()),  # not on Windows
        # pip may change the container's environment, and must not follow the constraints that the image sets.
        *("--env", "HOME=/tmp", "--env", "PIP_BREAK_SYSTEM_PACKAGES=1", "--env", "PIP_CONSTRAINT="),
        *("--volume", f"{os.getcwd()}:{WORKSPACE}", "--workdir", WORKSPACE),
        *(IMAGE.format(release), "bash", "-c", script),
    ]


def run(models: list[Model], **options: Any) -> TaskFailed | None:
    """doit's action: print the command lines and run them, one after the other."""
    try:
        lines = commands(models, overrides.of_options("container", options))
    except UserError as error:
        return TaskFailed(str(error))
    if not lines:
        print("no model has the format tensorrt")
    for line in lines:
        print(f"+ {shlex.join(line)}", flush=True)
        if shutil.which(line[0]) is None:
            return TaskFailed(
                "there is no docker on the PATH; run the line above on a machine that has Docker and NVIDIA's "
                "container toolkit"
            )
        if code := subprocess.run(line, check=False).returncode:
            return TaskFailed(f"docker ended with exit code {code}")
    return None
