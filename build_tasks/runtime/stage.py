"""One step of a model's chain: its inputs, settings and targets, and how it runs as a task of doit.

    inputs ─┐
    settings├─► fingerprint ─► stale? ─► build() in a child, into a scratch folder ─► complete targets at their paths
    tools  ─┘

A stage module holds `task(model)`, which returns the doit task, and `build(inputs, outputs, settings)`, a plain
function that reads and writes files, and returns notes about the result.
"""

import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from doit.exceptions import BaseFail, TaskError, TaskFailed

from build_tasks.errors import UserError, printable
from build_tasks.paths import BUILD, REPOSITORY
from build_tasks.runtime import atomic_files, fingerprint, memory_budget, resources, worker
from build_tasks.runtime.digests import digest
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.fingerprint import BuildRecord
from build_tasks.spec.interface import largest_dims
from build_tasks.spec.model import Model

if TYPE_CHECKING:
    from build_tasks.runtime.cache_entries import Action

Paths = dict[str, str]
Settings = dict[str, Any]
Notes = dict[str, Any]
Build = Callable[[Paths, Paths, Settings], Notes]


def nothing_missing() -> str | None:
    """The `missing_requirements` of a stage that runs on every machine."""
    return None


def may_be_replaced(path: str) -> str | None:
    """The `overwrite_error` of a stage whose targets are in build/."""
    return None


class Stage(msgspec.Struct, frozen=True):
    """One step of one model's chain.

    Attributes:
        inputs: Files of the project that `build` reads: the path of each, by the name that `build` uses for it.
        outputs: The targets, in the same form. All paths are relative to the project.
        settings: The keys of the spec that the stage uses, as plain data.
        tools: Distributions whose version is part of the fingerprint, if they are installed.
        modules: Dotted names of the project's modules that affect the outputs: the stage's own, and all that it
            imports, except modules that do not affect the outputs (see tests/runtime/test_fingerprint.py).
        source_files: Further files that affect the outputs: Python files of the model, templates of this project.
        external_inputs: Inputs outside the project (data of a package), name -> path or None. A file that does
            not exist on this machine cannot make the targets stale.
        in_process: Whether the stage runs in doit's own process. Such a stage must not call native libraries.
        missing_requirements: Returns the requirements of the stage that this machine lacks, None if it has all. A stage
            that lacks one is skipped with a message, unless it was requested by name.
        peak_batch: The largest batch that the stage computes. The memory that is reserved for its process depends on
            it; see memory_budget.py.
        made_elsewhere: Whether the targets may come from the build cache where a requirement is missing. Those of a
            plan may, if the spec names the kind of GPU.
        compute_capability: The kind of GPU that the targets are for ("8.6"), if they are built or measured on it. None:
            no GPU is needed, or the one of this machine is meant.
        names_model: Whether the targets contain the name of the model. Otherwise models share them in the build cache.
        host_fingerprint: Returns further facts about this machine that are part of the fingerprint, by name. It is
            called only if no requirement is missing.
        same_bytes: Whether the same facts give the same bytes, if there is a host_fingerprint.
        install: Moves a new file from the scratch folder to the path of its target.
        overwrite_error: Returns the reason why the file at the path of a target must not be replaced or removed, None
            if it may be. A person may have put something in its place.
    """

    name: str
    model: Model
    build: Build
    inputs: Paths
    outputs: Paths
    settings: Settings
    tools: tuple[str, ...]
    modules: tuple[str, ...]
    source_files: tuple[str, ...] = ()
    external_inputs: dict[str, str | None] = {}  # msgspec copies this default for each stage
    in_process: bool = False
    peak_batch: int = 0
    missing_requirements: Callable[[], str | None] = nothing_missing
    made_elsewhere: bool = True
    compute_capability: str | None = None
    names_model: bool = False
    host_fingerprint: Callable[[], dict[str, str]] = dict
    same_bytes: bool = False
    install: Callable[[str, str], None] = atomic_files.replace
    overwrite_error: Callable[[str], str | None] = may_be_replaced

    def __post_init__(self) -> None:
        fingerprint.imported_digests(self.modules)  # now, before anybody can edit the imported files

    def task(self, doc: str, params: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The doit task.

        Args:
            doc: One line about the task, for `doit list`.
            params: The options that the task takes on the command line.
        """
        return {
            "name": self.name.partition(":")[2],
            "actions": [(self.run,)],
            # If a file of the user is missing, this stage fails with its name. doit would end the whole run.
            "file_dep": [p for p in self.dependency_paths() if p.startswith(f"{BUILD}/") or os.path.exists(p)],
            "targets": list(self.outputs.values()),
            "uptodate": [fingerprint.UpToDate(self.changes)],
            "clean": [self.clean],
            "doc": printable(doc),
            "params": params or [],
            "io": {"capture": False},  # doit's capture replaces sys.stdout, and threads share that
            "meta": {"stage": self},
        }

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def dependency_paths(self) -> list[str]:
        """The files of the project that affect the outputs, without its source modules."""
        return [*self.inputs.values(), *self.source_files]

    def tool_fingerprint(self) -> dict[str, str]:
        """Versions of the installed tools, and the facts about this machine that affect the outputs."""
        installed = versions(self.tools)
        return installed if self.missing_requirements() else {**installed, **self.host_fingerprint()}

    @property
    def reproducible(self) -> bool:
        """Whether the same inputs give the same bytes. Files that are built or measured on a GPU differ each time."""
        return self.host_fingerprint is dict or self.same_bytes

    def changes(self, record: BuildRecord) -> list[str]:
        """The reasons why the targets are outdated; empty if they are up to date.

        Args:
            record: What `run` returned when the targets were built.
        """
        return [*self.stale_inputs(record), *self.modified_outputs(record)]

    def stale_inputs(self, record: BuildRecord, content: Callable[[str], str | None] = digest) -> list[str]:
        """The differences between the fingerprint in the record and the current one.

        Args:
            content: Returns the digest of the file or folder at a path, None if the path does not exist.
        """
        if "outputs" not in record:
            return [fingerprint.NEVER_BUILT]
        if not record.keys() >= fingerprint.FINGERPRINT_KEYS:
            return [fingerprint.OTHER_VERSION]
        return [
            *fingerprint.changed_settings(self.model, record["settings"], self.settings),
            *fingerprint.changed_tools(record["tools"], self.tool_fingerprint()),
            *fingerprint.changed_content(record["inputs"], {path: content(path) for path in self.dependency_paths()}),
            *fingerprint.changed_content(record["modules"], fingerprint.imported_digests(self.modules)),
            *fingerprint.changed_external_inputs(record["external_inputs"], self.external_inputs),
        ]

    def modified_outputs(self, record: BuildRecord) -> list[str]:
        """One line for each target that has been modified or removed since it was built: its path and what changed."""
        return fingerprint.changed_outputs(record, self.outputs.values())

    def run(self) -> BuildRecord | BaseFail:
        """The doit action: build and check the drafts, then move them to the targets.

        Returns: The record for `changes` in later runs, or doit's failure with the reason.
        """
        try:
            return self._run()
        except UserError as error:
            return TaskFailed(str(error))
        except worker.CrashError as error:
            return TaskError(str(error))
        except ModuleNotFoundError as error:
            return TaskFailed(worker.not_installed(error))
        except OSError as error:
            return TaskFailed(str(error))

    def memory(self) -> int:
        """Bytes of memory that the stage's process may need."""
        inputs = sum(atomic_files.size(path) or 0 for path in self.inputs.values())
        values = sum(map(math.prod, largest_dims(self.model.spec)))
        return memory_budget.need(inputs, self.peak_batch, values)

    def _run(self) -> BuildRecord:
        started = time.perf_counter()
        if not (self.uses_cache and self.made_elsewhere):
            self._require()
        for path in self.outputs.values():
            if error := self.overwrite_error(path):
                raise UserError(error)
        read = fingerprint.read_identities([*self.dependency_paths(), *self.external_inputs.values()])
        inputs = self._digests_of_inputs()
        external = {name: path and digest(path) for name, path in self.external_inputs.items()}
        with atomic_files.scratch_dir() as folder, resources.explain_full_disk(BUILD, REPOSITORY):
            drafts = {name: f"{folder}/{os.path.basename(path)}" for name, path in self.outputs.items()}
            made = self._fetch(inputs, external, drafts)
            if made is None:
                made, waited = self._build(drafts)
                started += waited
            for draft in drafts.values():
                atomic_files.flush(draft)
            changed = [path for path, before in inputs.items() if digest(path) != before]
            changed += [path for path in fingerprint.changed_identities(read) if path not in changed]
            if changed := [*changed, *fingerprint.edited_modules(self.modules)]:
                raise UserError(f"{', '.join(changed)} changed while being used; nothing was written, run doit again")
            outputs = {path: digest(drafts[name], remember=False) for name, path in self.outputs.items()}
            sizes = {path: fingerprint.file_size(drafts[name]) for name, path in self.outputs.items()}
            for name, path in self.outputs.items():
                self.install(drafts[name], path)
        for path in outputs:
            digest.keep(path)
        seconds = round(time.perf_counter() - started, 3)
        record: BuildRecord = {
            "inputs": inputs,
            "modules": fingerprint.imported_digests(self.modules),
            "external_inputs": external,
            "settings": self.settings,
            "tools": self.tool_fingerprint(),
            "outputs": outputs,
            "sizes": {path: size for path, size in sizes.items() if size is not None},
            "seconds": seconds,
        }
        record.update(made)
        if "fetched" in record:
            record["fetched"]["seconds"] = seconds
        elif self.uses_cache:
            from build_tasks.runtime import cached_stage

            cached_stage.store(self, record)
        return record

    @property
    def uses_cache(self) -> bool:
        """Whether the build cache may have the targets. A stage that takes milliseconds does not use it."""
        return not self.in_process and bool(os.environ.get("BUILD_CACHE"))

    def cached_result(self, content: Callable[[str], str | None] = digest) -> "Action | None":
        """The result of this stage in the build cache, None if there is none that this machine may use.

        Args:
            content: Returns the digest of the file or folder at a path, None if it does not exist or is not known.
        """
        if not self.uses_cache:
            return None
        from build_tasks.runtime import cached_stage

        return cached_stage.find(self, content)

    def _fetch(self, inputs: dict[str, str], external: dict[str, str | None], drafts: Paths) -> BuildRecord | None:
        if not self.uses_cache:
            return None
        from build_tasks.runtime import cached_stage

        return cached_stage.fetch(self, inputs, external, drafts)

    def _require(self) -> None:
        if missing := self.missing_requirements():
            raise UserError(unsupported_message(missing))

    def _build(self, drafts: Paths) -> tuple[BuildRecord, float]:
        """Build the drafts. Returns what the record holds about that, and the seconds that it waited for memory."""
        self._require()
        present = {name: path for name, path in self.external_inputs.items() if path is not None}
        arguments = ({**self.inputs, **present}, drafts, self.settings)
        if self.in_process:
            return {"notes": self.build(*arguments)}, 0.0
        before = time.perf_counter()
        with worker.reserve_memory(self.name, self.memory()):
            waited = time.perf_counter() - before
            log = log_of(self.model, self.name)
            run = memory_budget.call_with_heap  # `doit bench` does without it, as Triton does
            return {"notes": worker.call(run, self.build, *arguments, log=log, task=self.name)}, waited

    def _digests_of_inputs(self) -> dict[str, str]:
        digests: dict[str, str] = {}
        for path in self.dependency_paths():
            if (value := digest(path)) is None:
                raise UserError(f"{path} does not exist; {self.model.file} asks for it")
            digests[path] = value
        # Before a long build only. `_run` compares the modules again when the drafts are complete.
        if not self.in_process and (edited := fingerprint.edited_modules(self.modules)):
            raise UserError(f"{edited[0]} was edited since doit started; run doit again")
        return digests

    def clean(self, dryrun: bool) -> None:
        """doit's `clean` of this task: remove its targets, folders too."""
        for path in self.outputs.values():
            if error := self.overwrite_error(path):
                print(f"{self.name} - keeping {path}: {error.partition(': ')[0]}")
            elif os.path.lexists(path):
                print(f"{self.name} - removing {path}")
                if not dryrun:
                    atomic_files.remove(path)


def stage_of(task: Any) -> Stage | None:
    """The stage of a doit task; None for a group, and for a task that is no stage."""
    stage: Stage | None = (task.meta or {}).get("stage")
    return stage


def log_of(model: Model, name: str) -> str:
    """The file that takes the output of the process of the stage with this name."""
    return model.artifact(f"logs/{name.replace(':', '.')}.log")


def unsupported_message(missing: str) -> str:
    """The message about a stage that this machine cannot run, because a requirement is missing."""
    return f"cannot be built on this machine, which lacks {missing}"
