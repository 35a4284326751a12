"""Stages that write a few bytes in place of every target, for tests of what doit does with them.

A project's dodo.py ends with `replace_builds(globals())`; `use_light_stages` writes that. The content of a
target depends on the stage's inputs and settings, so a change runs through the chain as it does with the real stages.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from build_tasks.runtime import worker
from build_tasks.triton.repository import GENERATED_MARK, PROVENANCE_FILE, PROVENANCE_KEYS

if TYPE_CHECKING:
    from tests.support.project import Project

ROOT = Path(__file__).parent.parent.parent
FOLDER = ("config.pbtxt", "1/model", "1/provenance.json")  # files of a target that is a folder


def use_light_stages(project: "Project", processes: bool = False) -> None:
    """Let all stages of a project be light ones.

    Args:
        processes: Whether those that have a process of their own keep it.
    """
    with (project / "dodo.py").open("a", encoding="utf-8") as file:
        file.write(
            f"\nimport sys\n\nsys.path.append({str(ROOT)!r})\n"
            f"from tests.support.light_stages import replace_builds\n\nreplace_builds(globals(), {processes})\n"
        )


def replace_builds(namespace: dict[str, Any], processes: bool = False) -> None:
    """Give all stages of a dodo.py's namespace a light `build`; see `use_light_stages`."""
    worker.HEAVY_LIBRARIES.clear()
    worker.STAGE_MODULES.clear()
    for name, creator in list(namespace.items()):
        if name.startswith("task_"):
            namespace[name] = _with_light_builds(creator, processes)


def _with_light_builds(creator: Callable[[], Any], processes: bool) -> Callable[[], Any]:
    @functools.wraps(creator)
    def create() -> dict[str, Any] | Iterator[dict[str, Any]]:
        tasks = creator()
        if isinstance(tasks, dict):
            return _with_light_build(tasks, processes)
        return (_with_light_build(task, processes) for task in tasks)

    return create


def _with_light_build(task: dict[str, Any], processes: bool) -> dict[str, Any]:
    stage = task.get("meta", {}).get("stage")
    if stage is None:
        return task
    stage = msgspec.structs.replace(stage, build=write_digests, in_process=stage.in_process or not processes)
    return {**task, **stage.task(task["doc"], task["params"])}


def write_digests(inputs: dict[str, str], outputs: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """The `build`: write a digest of all inputs and settings into every target."""
    if multiprocessing.parent_process():  # not a stage of milliseconds
        time.sleep(float(os.environ.get("LIGHT_STAGE_SECONDS", "0")))
    shared = {key: value for key, value in settings.items() if key != "model"}  # its name is in no target
    digest = hashlib.sha256(json.dumps(shared, sort_keys=True, default=str).encode())
    for name, path in sorted(inputs.items()):
        files = sorted(p for p in Path(path).rglob("*") if p.is_file()) if Path(path).is_dir() else [Path(path)]
        digest.update(b"".join([name.encode(), *(file.read_bytes() for file in files)]))
    for name, path in outputs.items():
        for target in [Path(path, file) for file in FOLDER] if name == "folder" else [Path(path)]:
            target.parent.mkdir(parents=True, exist_ok=True)
            spec = f"models/{inputs['config'].split('/')[1]}/model.toml" if "config" in inputs else ""
            mark = (
                f"{GENERATED_MARK} {settings['name']}, from {spec}, for Triton 26.08\n"
                if target.name == "config.pbtxt"
                else ""
            )
            text = f"{mark}{target.name} {digest.hexdigest()}\n"
            if target.name == PROVENANCE_FILE:
                text = json.dumps({**dict.fromkeys(PROVENANCE_KEYS, ""), "build": digest.hexdigest()}, sort_keys=True)
            target.write_text(text, encoding="utf-8")
    return {}
