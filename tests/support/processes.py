"""Runs of doit that tests watch, interrupt and kill."""

import subprocess
import time
from pathlib import Path

from tests.support.project import TINY, Project, add_tiny

CONVERTED = TINY.replace("[accuracy]", 'converter = "convert.py:convert"\n\n[accuracy]')


def converted(project: Project, weights: Path, code: str, name: str = "tiny") -> None:
    """The model `tiny` with a converter that first executes `code`, inside the weights stage's child."""
    add_tiny(project, weights, name)
    (project / f"models/{name}/model.toml").write_text(CONVERTED)
    (project / f"models/{name}/convert.py").write_text(f"def convert(state):\n    {code}\n    return dict(state)\n")


def wait_for(process: "subprocess.Popen[str]", text: str) -> str:
    """Read the output until `text` is in it."""
    assert process.stdout is not None
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, f"doit ended before it said {text!r}: {seen}"
        seen += line
    return seen


def children_of_a_session(leader: int) -> list[int]:
    """Processes of the session that `leader` leads, but itself."""
    listing = subprocess.run(["ps", "-o", "pid=", "-s", str(leader)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listing.stdout.split() if int(pid) != leader]


def gone(leader: int, patience: float = 20) -> bool:
    """Whether a session's processes all end within some seconds."""
    for _ in range(int(patience * 10)):
        if not children_of_a_session(leader):
            return True
        time.sleep(0.1)
    return False
