"""Helpers for tests that interrupt or kill doit while it runs."""

import subprocess
import time
from pathlib import Path

from tests.support.project import TINY, Project, add_tiny

SPEC_WITH_CONVERTER = TINY.replace("[accuracy]", 'converter = "convert.py:convert"\n\n[accuracy]')


def add_with_converter(project: Project, weights: Path, code: str, name: str = "tiny") -> None:
    """Add the model `tiny` with a converter that first executes `code`, in the child process of the weights stage."""
    add_tiny(project, weights, name)
    (project / f"models/{name}/model.toml").write_text(SPEC_WITH_CONVERTER)
    (project / f"models/{name}/convert.py").write_text(f"def convert(state):\n    {code}\n    return dict(state)\n")


def wait_for(process: "subprocess.Popen[str]", text: str) -> str:
    """Read the output of a process until it contains `text`, and return what was read."""
    assert process.stdout is not None
    output = ""
    while text not in output:
        line = process.stdout.readline()
        assert line, f"doit ended before it printed {text!r}: {output}"
        output += line
    return output


def session_processes(leader: int) -> list[int]:
    """The process ids of the session that `leader` leads, without its own."""
    listing = subprocess.run(["ps", "-o", "pid=", "-s", str(leader)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listing.stdout.split() if int(pid) != leader]


def session_ended(leader: int, timeout: float = 20) -> bool:
    """Whether all processes of a session, without its leader, end within `timeout` seconds."""
    for _ in range(int(timeout * 10)):
        if not session_processes(leader):
            return True
        time.sleep(0.1)
    return False
