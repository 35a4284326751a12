"""Triton's core over the repository of a project, with the stub backends."""

import contextlib
from collections.abc import Iterator

from build_tasks.serving import triton_server
from tests.support.project import Project


@contextlib.contextmanager
def serving(project: Project) -> Iterator[triton_server.Server]:
    """Install the core, and start it in the folder of the project. No model is loaded."""
    project.built("tritonserver")
    ports, log = triton_server.free_ports(), "build/core.log"
    with contextlib.chdir(project.root), triton_server.start("core", "24.10", ports, log, stubs=True) as server:
        yield server
