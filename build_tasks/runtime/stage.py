"""What every stage obeys: when it is up to date, how it runs, how its targets appear.

    inputs ─┐
    settings├─► fingerprint ─► stale? ─► build() in a child, into a scratch folder ─► whole targets in their place
    tools  ─┘

A stage module holds `task(model)`, the doit task, and `build(inputs, outputs, settings)`, a plain function from
files to files that returns what is worth telling about the result.
"""

import contextlib
import inspect
import os
import re
import time
from collections.abc import Callable
from typing import Any

import msgspec
from doit.exceptions import BaseFail, TaskError, TaskFailed

from build_tasks.errors import UserError
from build_tasks.paths import BUILD, REPOSITORY
from build_tasks.runtime import atomic_files, memory_budget, resources, worker
from build_tasks.runtime.digests import digest
from build_tasks.runtime.distributions import versions
from build_tasks.spec.model import Model, Table

NEVER_BUILT = "no record of a build"
NEVER = object()  # a value that no setting has
SHA256 = re.compile("[0-9a-f]{64}")

Paths = dict[str, str]
Settings = dict[str, Any]
Notes = dict[str, Any]
Build = Callable[[Paths, Paths, Settings], Notes]


def nothing_missing() -> str | None:
    """What a machine lacks for most stages."""
    return None


class Stage(msgspec.Struct, frozen=True):
    """One step of one model's chain.

    inputs, outputs: paths by the name that `build` knows them under; relative to the project.
    external_inputs: inputs outside the project (package data), name -> path or None. Where such a file is absent, it
        cannot make its target stale.
    settings: the stage's own keys of the spec, as plain data.
    tools: distributions whose version is part of the recipe, where they are installed.
    code: modules of build_tasks, and files of the model, that decide what is built.
    in_process: needs nothing native, and runs in doit's own process.
    missing_requirements: what this machine lacks to run the stage, None if nothing; such a stage is passed over
        with a word, unless it was asked for by name.
    peak_batch: the largest batch that it computes, for what its process may need of memory; see budget.py.
    host_fingerprint: what else of this machine is part of the recipe, by name; asked where nothing is lacking.
    install: how a draft becomes the target.
    """

    name: str
    model: Model
    build: Build
    inputs: Paths
    outputs: Paths
    settings: Settings
    tools: tuple[str, ...]
    code: tuple[str, ...]
    external_inputs: dict[str, str | None] = {}  # a new one each, as msgspec has it
    in_process: bool = False
    peak_batch: int = 0
    missing_requirements: Callable[[], str | None] = nothing_missing
    host_fingerprint: Callable[[], dict[str, str]] = dict
    install: Callable[[str, str], None] = atomic_files.replace

    def task(self, doc: str, params: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The doit task; `params` are the options of the command line that it takes."""
        return {
            "name": self.name.partition(":")[2],
            "actions": [(self.run,)],
            # A file of the user's that is missing is this stage's failure to tell, not doit's error.
            "file_dep": [p for p in self.dependency_paths() if p.startswith(f"{BUILD}/") or os.path.exists(p)],
            "targets": list(self.outputs.values()),
            "uptodate": [UpToDate(self)],
            "clean": [self.clean],
            "doc": doc,
            "params": params or [],
            "io": {"capture": False},  # doit's capture replaces sys.stdout, which threads share
            "meta": {"stage": self},
        }

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def dependency_paths(self) -> list[str]:
        """The files that decide what is built."""
        return [*self.inputs.values(), *self.code]

    def tool_fingerprint(self) -> dict[str, str]:
        """The tools that are here, and this machine's facts: what is absent cannot make a target stale."""
        here = versions(self.tools)
        return here if self.missing_requirements() else {**here, **self.host_fingerprint()}

    @property
    def reproducible(self) -> bool:
        """Whether the same inputs give the same bytes; what is made or measured on a GPU is not."""
        return self.host_fingerprint is dict

    def changes(self, values: dict[str, Any]) -> list[str]:
        """Why the targets are not the files built from these inputs, with these settings and tools; empty if they are.

        values: what `run` returned when the targets were built.
        """
        return [*self.stale_inputs(values), *self.modified_outputs(values)]

    def stale_inputs(self, values: dict[str, Any], content: Callable[[str], str | None] = digest) -> list[str]:
        """What is not as it was when the targets were built.

        content: the digest of an input by its path.
        """
        if "outputs" not in values:
            return [NEVER_BUILT]
        reasons = differences(self.model, values["settings"], self.settings)
        for tool, version in self.tool_fingerprint().items():
            if (before := values["tools"].get(tool)) != version:
                reasons.append(f"{tool}: {before} -> {version}")
        recorded = values["inputs"]
        watched = self.dependency_paths()
        for path in sorted(recorded.keys() | set(watched)):
            # Of the project's code, what was imported decides, without another stat of it for each task.
            before, now = recorded.get(path), (IMPORTED_DIGESTS.get(path) or content(path)) if path in watched else None
            if before != now:
                reasons.append(f"{path}: {_difference(before, now)}")
        for name, path in self.external_inputs.items():
            if path is not None and digest(path) not in (None, values["external_inputs"].get(name)):
                reasons.append(f"{name}: changed")
        return reasons

    def modified_outputs(self, values: dict[str, Any]) -> list[str]:
        """What has happened to the targets since they were built."""
        reasons = []
        for path in self.outputs.values() if "outputs" in values else ():
            before, now = values["outputs"].get(path), digest(path)  # never None of a target that was built
            if before != now:
                size = values.get("sizes", {}).get(path, 0)
                left = file_size(path) if now else None
                truncated = f", truncated to {left} of {size} bytes" if left is not None and left < size else ""
                reasons.append(f"{path}: {_difference(before, now)}{truncated}")
        return reasons

    def run(self) -> dict[str, Any] | BaseFail:
        """The doit action: build, check, publish the targets; returns what `changes` compares with later."""
        if lacks := self.missing_requirements():
            return TaskFailed(unsupported_message(lacks))
        try:
            with contextlib.nullcontext() if self.in_process else worker.room(self.name, self.memory()):
                started = time.perf_counter()
                return {**self._run(), "seconds": round(time.perf_counter() - started, 3)}
        except UserError as error:
            return TaskFailed(str(error))
        except worker.CrashError as error:
            return TaskError(str(error))
        except ModuleNotFoundError as error:
            return TaskFailed(worker.not_installed(error))
        except OSError as error:
            return TaskFailed(str(error))

    def memory(self) -> int:
        """Bytes that its process may need."""
        inputs = sum(atomic_files.size(path) or 0 for path in self.inputs.values())
        return memory_budget.need(inputs, self.peak_batch, self.model.spec.largest_image)

    def _run(self) -> dict[str, Any]:
        inputs = self._digests_of_inputs()
        external = {name: path and digest(path) for name, path in self.external_inputs.items()}
        with atomic_files.scratch_dir() as folder, resources.space(BUILD, REPOSITORY):
            drafts = {name: f"{folder}/{os.path.basename(path)}" for name, path in self.outputs.items()}
            present = {name: path for name, path in self.external_inputs.items() if path is not None}
            arguments = ({**self.inputs, **present}, drafts, self.settings)
            if self.in_process:
                notes = self.build(*arguments)
            else:
                notes = worker.call(self.build, *arguments, log=log_of(self.model, self.name), task=self.name)
            for draft in drafts.values():
                atomic_files.flush(draft)
            if changed := [path for path, before in inputs.items() if digest(path) != before]:
                raise UserError(f"{', '.join(changed)} changed while being used; nothing was published, run doit again")
            outputs = {path: digest(drafts[name], remember=False) for name, path in self.outputs.items()}
            sizes = {path: size for name, path in self.outputs.items() if (size := file_size(drafts[name])) is not None}
            for name, path in self.outputs.items():
                self.install(drafts[name], path)
        for path in outputs:
            digest(path)  # known of the draft, and from now on of the target
        return {
            "inputs": inputs,
            "external_inputs": external,
            "settings": self.settings,
            "tools": self.tool_fingerprint(),
            "outputs": outputs,
            "sizes": sizes,
            "notes": notes,
        }

    def _digests_of_inputs(self) -> dict[str, str]:
        digests = {path: digest(path) for path in self.dependency_paths()}
        for path, value in digests.items():
            if value is None:
                raise UserError(f"{path} does not exist; {self.model.file} asks for it")
            if IMPORTED_DIGESTS.get(path, value) != value:
                raise UserError(f"{path} was edited since doit started; run doit again")
        return {path: value for path, value in digests.items() if value is not None}

    def clean(self, dryrun: bool) -> None:
        """doit's `clean` of this task: remove its targets, folders too."""
        for path in self.outputs.values():
            if os.path.lexists(path):
                print(f"{self.name} - removing {path}")
                if not dryrun:
                    atomic_files.remove(path)


class UpToDate:
    """doit's `uptodate` of a stage; `doit info TASK` prints it, and so tells why the task would run."""

    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("task", "values")]
    )  # which doit would work out for each task

    def __init__(self, stage: Stage):
        self.stage = stage
        self.reasons: list[str] = []

    def __call__(self, task: Any, values: dict[str, Any]) -> bool:
        try:
            self.reasons = self.stage.changes(values)
        except OSError as error:  # a file that may not be read: the stage will say so, and only that stage
            self.reasons = [str(error)]
        return not self.reasons

    def __repr__(self) -> str:
        return "; ".join(self.reasons)


IMPORTED_DIGESTS: dict[str, str | None] = {}  # digests of build_tasks' sources, as they were when doit imported them


def source_files(*modules: str) -> tuple[str, ...]:
    """The source files of modules of build_tasks."""
    paths = tuple(f"build_tasks/{module.replace('.', '/')}.py" for module in modules)
    for path in paths:
        if path not in IMPORTED_DIGESTS:
            IMPORTED_DIGESTS[path] = digest(path)
    return paths


def stage_of(task: Any) -> Stage | None:
    """The stage that a task of doit's stands for; None of a group, and of what is no stage."""
    found: Stage | None = (task.meta or {}).get("stage")
    return found


def log_of(model: Model, name: str) -> str:
    """Where the output of a stage's process goes."""
    return model.artifact(f"logs/{name.replace(':', '.')}.log")


def unsupported_message(lacks: str) -> str:
    """The line on a stage that this machine cannot run."""
    return f"cannot be built on this machine, which lacks {lacks}"


def differences(model: Model, before: Settings, now: Settings, under: str = "") -> list[str]:
    """What of a stage's settings is another than it was, under the names that the spec has for it where it has one."""
    reasons = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            reasons += differences(model, old, new, f"{under}{key}.")
        elif old != new:
            name = under + key if under else in_spec(model, key, new)
            digests = all(isinstance(value, str) and SHA256.fullmatch(value) for value in (old, new))
            reasons.append(f"{name}: {_difference(str(old), str(new)) if digests else f'{old!r} -> {new!r}'}")
    return reasons


def in_spec(model: Model, key: str, value: Any) -> str:
    """A stage's key as the spec has it, "onnx.opset"; as it is where that is none, or not the only one."""
    tables = {name: getattr(model.spec, name) for name in model.spec.__struct_fields__}
    tables["torchscript"] = model.torchscript  # with its defaults, which may be those of another table
    found = [name for name, table in tables.items() if isinstance(table, Table) and getattr(table, key, NEVER) == value]
    return f"{found[0]}.{key}" if len(found) == 1 and key not in tables else key


def file_size(path: str) -> int | None:
    """In bytes; None of a folder, or of what is not there."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def _difference(before: str | None, now: str | None) -> str:
    if before is None:
        return "new"
    if now is None:
        return "missing"
    return f"sha256 {before[:8]} -> {now[:8]}"
