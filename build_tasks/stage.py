"""What every stage obeys: when it is up to date, how it runs, how its targets appear.

    inputs ─┐
    settings├─► fingerprint ─► stale? ─► build() in a child, into a scratch folder ─► whole targets in their place
    tools  ─┘

A stage module holds `task(model)`, the doit task, and `build(inputs, outputs, settings)`, a plain function from
files to files that returns what is worth telling about the result.
"""

import functools
import importlib.metadata
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from doit.exceptions import BaseFail, TaskError, TaskFailed

from build_tasks import files, worker
from build_tasks.digests import digest
from build_tasks.errors import UserError
from build_tasks.spec import BUILD, Model

NEVER_BUILT = "no record of a build"

Paths = dict[str, str]
Settings = dict[str, Any]
Notes = dict[str, Any]
Build = Callable[[Paths, Paths, Settings], Notes]


def nothing() -> str | None:
    """What a machine lacks for most stages."""
    return None


@dataclass(frozen=True)
class Stage:
    """One step of one model's chain.

    inputs, outputs: paths by the name that `build` knows them under; relative to the project.
    elsewhere: inputs outside the project (package data), name -> path or None. Where such a file is absent, it
        cannot make its target stale.
    settings: the stage's own keys of the spec, as plain data.
    tools: distributions whose version is part of the recipe, where they are installed.
    code: modules of build_tasks, and files of the model, that decide what is built.
    light: needs nothing native, and runs in doit's own process.
    lacking: what this machine lacks to run the stage, None if nothing; such a stage is passed over with a word, unless
        it was asked for by name.
    facts: what else of this machine is part of the recipe, by name; asked where nothing is lacking.
    place: how a draft becomes the target.
    """

    name: str
    model: Model
    build: Build
    inputs: Paths
    outputs: Paths
    settings: Settings
    tools: tuple[str, ...]
    code: tuple[str, ...]
    elsewhere: dict[str, str | None] = field(default_factory=dict)
    light: bool = False
    lacking: Callable[[], str | None] = nothing
    facts: Callable[[], dict[str, str]] = dict
    place: Callable[[str, str], None] = files.replace

    def task(self, doc: str, params: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The doit task; `params` are the options of the command line that it takes."""
        return {
            "name": self.name.partition(":")[2],
            "actions": [(self.run,)],
            # A file of the user's that is missing is this stage's failure to tell, not doit's error.
            "file_dep": [p for p in self._watched() if p.startswith(f"{BUILD}/") or os.path.exists(p)],
            "targets": list(self.outputs.values()),
            "uptodate": [Current(self)],
            "clean": [self.clean],
            "doc": doc,
            "params": params or [],
            "io": {"capture": False},  # doit's capture replaces sys.stdout, which threads share
            "meta": {"stage": self},
        }

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def _watched(self) -> list[str]:
        return [*self.inputs.values(), *self.code]

    def _recipe(self) -> dict[str, str]:
        """The tools that are here, and this machine's facts: what is absent cannot make a target stale."""
        here = versions(self.tools)
        return here if self.lacking() else {**here, **self.facts()}

    def changes(self, values: dict[str, Any]) -> list[str]:
        """Why the targets are not the files built from these inputs, with these settings and tools; empty if they are.

        values: what `run` returned when the targets were built.
        """
        if "outputs" not in values:
            return [NEVER_BUILT]
        reasons = []
        for key in sorted(self.settings.keys() | values["settings"].keys()):
            before, now = values["settings"].get(key), self.settings.get(key)
            if before != now:
                reasons.append(f"{key}: {before!r} -> {now!r}")
        for tool, now in self._recipe().items():
            if (before := values["tools"].get(tool)) != now:
                reasons.append(f"{tool}: {before} -> {now}")
        recorded = values["inputs"]
        watched = self._watched()
        for path in sorted(recorded.keys() | set(watched)):
            before, now = recorded.get(path), digest(path) if path in watched else None
            if before != now:
                reasons.append(f"{path}: {_difference(before, now)}")
        for name, path in self.elsewhere.items():
            if path is not None and digest(path) not in (None, values["elsewhere"].get(name)):
                reasons.append(f"{name}: changed")
        for path in self.outputs.values():
            before, now = values["outputs"].get(path), digest(path)
            if before != now:
                reasons.append(f"{path}: {_difference(before, now)}")
        return reasons

    def run(self) -> dict[str, Any] | BaseFail:
        """The doit action: build, check, publish the targets; returns what `changes` compares with later."""
        if lacks := self.lacking():
            return TaskFailed(not_here(lacks))
        started = time.perf_counter()
        try:
            record = self._run()
        except UserError as error:
            return TaskFailed(str(error))
        except worker.CrashError as error:
            return TaskError(str(error))
        except ModuleNotFoundError as error:
            return TaskFailed(worker.not_installed(error))
        except OSError as error:
            return TaskFailed(str(error))
        return {**record, "seconds": round(time.perf_counter() - started, 3)}

    def _run(self) -> dict[str, Any]:
        inputs = self._digests_of_inputs()
        elsewhere = {name: path and digest(path) for name, path in self.elsewhere.items()}
        with files.scratch() as folder:
            drafts = {name: f"{folder}/{os.path.basename(path)}" for name, path in self.outputs.items()}
            present = {name: path for name, path in self.elsewhere.items() if path is not None}
            arguments = ({**self.inputs, **present}, drafts, self.settings)
            if self.light:
                notes = self.build(*arguments)
            else:
                notes = worker.call(self.build, *arguments, log=log_of(self.model, self.name))
            for draft in drafts.values():
                files.flush(draft)
            if changed := [path for path, before in inputs.items() if digest(path) != before]:
                raise UserError(f"{', '.join(changed)} changed while being used; nothing was published, run doit again")
            outputs = {path: digest(drafts[name], remember=False) for name, path in self.outputs.items()}
            for name, path in self.outputs.items():
                self.place(drafts[name], path)
        return {
            "inputs": inputs,
            "elsewhere": elsewhere,
            "settings": self.settings,
            "tools": self._recipe(),
            "outputs": outputs,
            "notes": notes,
        }

    def _digests_of_inputs(self) -> dict[str, str]:
        digests = {path: digest(path) for path in self._watched()}
        for path, value in digests.items():
            if value is None:
                raise UserError(f"{path} does not exist; {self.model.file} asks for it")
            if LOADED.get(path, value) != value:
                raise UserError(f"{path} was edited since doit started; run doit again")
        return {path: value for path, value in digests.items() if value is not None}

    def clean(self, dryrun: bool) -> None:
        """doit's `clean` of this task: remove its targets, folders too."""
        for path in self.outputs.values():
            if os.path.lexists(path):
                print(f"{self.name} - removing {path}")
                if not dryrun:
                    files.remove(path)


class Current:
    """doit's `uptodate` of a stage; `doit info TASK` prints it, and so tells why the task would run."""

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


LOADED: dict[str, str | None] = {}  # digests of build_tasks' sources, as they were when doit imported them


def code_of(*modules: str) -> tuple[str, ...]:
    """The source files of modules of build_tasks."""
    paths = tuple(f"build_tasks/{module}.py" for module in modules)
    for path in paths:
        if path not in LOADED:
            LOADED[path] = digest(path)
    return paths


@functools.cache
def installed_version(distribution: str) -> str | None:
    """The version of a distribution that is installed here, None where it is absent."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    # `found.version` parses the whole file, README included.
    header = re.search(r"^Version: *(\S+)", found.read_text("METADATA") or "", re.MULTILINE)
    return header[1] if header else found.version


def versions(tools: tuple[str, ...]) -> dict[str, str]:
    """The versions of those distributions that are installed here."""
    return {tool: version for tool in tools if (version := installed_version(tool)) is not None}


def log_of(model: Model, name: str) -> str:
    """Where the output of a stage's process goes."""
    return model.artifact(f"logs/{name.replace(':', '.')}.log")


def not_here(lacks: str) -> str:
    """The line on a stage that this machine cannot run."""
    return f"cannot be built on this machine, which lacks {lacks}"


def _difference(before: str | None, now: str | None) -> str:
    if before is None:
        return "new"
    if now is None:
        return "missing"
    return f"sha256 {before[:8]} -> {now[:8]}"
