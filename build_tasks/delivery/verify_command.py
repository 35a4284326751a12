"""verify: `doit verify` reads every byte of build/ and model_repository/, and compares it with the records

    doit's records ─► digests of all targets ─┐
    manifests ──────► digests of all files ───┼─► damaged files, exit code 1 ─► --heal: their models are built again
    every byte of every file, no cache ───────┘
    signatures ─► --key, --chain, --identity

A doit with nothing to do believes a file whose size and times are unchanged. This command does not.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl
from doit.exceptions import InvalidCommand

from build_tasks.delivery.options import CHAIN, KEY, chain_of, option, require_files
from build_tasks.doit_plugin.command_line import RecordsCommand
from build_tasks.doit_plugin.noop_cache import CACHE_FILE
from build_tasks.doit_plugin.state import ReadOnlyStateDB, StateManager
from build_tasks.errors import UserError, message_line
from build_tasks.paths import REPOSITORY, TRANSIT
from build_tasks.provenance import signature
from build_tasks.provenance.signature import Identity
from build_tasks.provenance.verify_repository import (
    MANIFEST,
    SIGNATURE,
    check,
    files_of,
    model_folders,
    read_files,
)
from build_tasks.runtime.digests import digest, folder_digest
from build_tasks.runtime.stage import Stage, stage_of
from build_tasks.text_table import format_size
from build_tasks.triton.repository import is_generated


class Damage(NamedTuple):
    """A target that is not what was built.

    task: The task that builds it.
    path: Its path.
    files: The files in it that may be damaged.
    lines: What differs.
    """

    task: str
    path: str
    files: list[str]
    lines: list[str]


class Verify(RecordsCommand, DoitCmdBase):  # type: ignore[misc]  # doit has no types
    """The command."""

    takes_names_first = True
    doc_purpose = "read every byte that was built and published, and compare it with the records"
    doc_usage = "[TASK ...] [--heal] [--key PUBLIC.pem] | URL [MODEL ...]"
    doc_description = (
        "Finds damage that keeps size and times, which no build looks for. Without a TASK it checks all targets and "
        "all published models. --heal builds what is damaged again. With --key, --chain or --identity every published "
        "model must have a signature of that key. With a URL it checks what `doit push` has copied there. Exit code 1 "
        "if something is damaged."
    )
    cmd_options = (
        option("heal", "build what is damaged again", default=False),
        KEY,
        CHAIN,
        option("identity", "the identity of a keyless signature"),
        option("issuer", "who confirmed that identity, a URL"),
    )

    def execute(self, params: Any, args: list[str]) -> Any:
        chain = chain_of(params["chain"])
        self.signer = Identity(params["key"], chain=chain, identity=params["identity"], issuer=params["issuer"])
        if sum(map(bool, (self.signer.key, chain, self.signer.identity))) > 1:
            raise InvalidCommand("expected only one of --key, --chain and --identity")
        if bool(self.signer.identity) != bool(self.signer.issuer):
            raise InvalidCommand("expected --identity and --issuer together")
        try:
            require_files(self.signer)
            if args and "://" in args[0]:
                if params["heal"] or any(self.signer):
                    raise InvalidCommand("a URL takes neither --heal nor a key: fetch the folder, and verify it there")
                from build_tasks.delivery import push

                problems = push.verify(args[0], args[1:])
                return write_result(self.outstream, problems, "")
            return super().execute(params, args)
        except UserError as error:
            raise InvalidCommand(str(error)) from error

    def _execute(self, heal: bool, pos_args: list[str]) -> int:
        control = TaskControl(self.task_list)
        control.process(self.sel_tasks)
        selected = with_dependencies(control.tasks, control.selected_tasks if pos_args else control.tasks)
        stages = [stage for name in selected if (stage := stage_of(control.tasks[name]))]
        faults, summary = find_damages(stages)
        if faults:  # another doit may have exchanged files meanwhile
            names = {fault.task for fault in faults}
            faults, _ = find_damages([stage for stage in stages if stage.name in names])
        problems = {fault.path: fault.lines for fault in faults}
        models = published_by(stages)
        if any(self.signer):
            for name in models:
                if reason := signature.verify(f"{REPOSITORY}/{name}", self.signer):
                    problems.setdefault(f"{REPOSITORY}/{name}", []).append(f"{REPOSITORY}/{name}: {reason}")
        if not pos_args:
            problems |= self._check_other_models({*models})
        code = write_result(self.outstream, problems, summary)
        if not faults:
            return code
        if not heal:
            self.outstream.write("`doit verify --heal` builds what is damaged again\n")
            return code
        return build_again(faults, stages)

    def _check_other_models(self, models: set[str]) -> dict[str, list[str]]:
        """Check the models that no task publishes any more, and name the folders that are not checked.

        Args:
            models: The names of all other models.
        Returns: What differs, by path.
        """
        folders = model_folders(REPOSITORY) if os.path.isdir(REPOSITORY) else []
        others = [name for name in folders if name not in models and not name.startswith(TRANSIT)]
        generated = [name for name in others if is_generated(name)]
        for name in others:
            if name not in generated:
                text = f"{REPOSITORY}/{name} was not generated here; it is not checked"
                self.outstream.write(f"{message_line(text)}\n")
        found = check(REPOSITORY, generated, read_files(files_of(REPOSITORY, generated)))
        return {f"{REPOSITORY}/{name}": [f"{REPOSITORY}/{name}: {line}" for line in found[name]] for name in generated}


def with_dependencies(tasks: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return tasks and all tasks that they depend on, by name."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        if (name := waiting.pop()) not in found:
            found[name] = None
            waiting += tasks[name].task_dep
    return list(found)


def published_by(stages: Iterable[Stage]) -> list[str]:
    """Return the models of the repository that these stages publish, and that are there."""
    folders = [path for stage in stages for path in stage.outputs.values() if path.startswith(f"{REPOSITORY}/")]
    return sorted(os.path.basename(folder) for folder in folders if os.path.isdir(folder))


def find_damages(stages: list[Stage]) -> tuple[list[Damage], str]:
    """Read all targets of these stages. Return the damaged ones, and how much was read."""
    records = StateManager(ReadOnlyStateDB)
    recorded = {
        (stage.name, path): value
        for stage in stages
        for path, value in (records.get_values(stage.name).get("outputs") or {}).items()
        if path in stage.outputs.values() and value is not None
    }
    files = {path: files_in(path) for _, path in recorded}
    models = published_by(stages)
    digests = read_files([*(file for each in files.values() for file in each), *files_of(REPOSITORY, models)])
    differences = check(REPOSITORY, models, digests)
    faults = []
    for (task, path), value in recorded.items():
        folder, _, model = path.partition("/")
        lines = differences.get(model, []) if folder == REPOSITORY else []
        if current(path, digests) != value or lines:
            reasons = [digests[file] for file in files[path] if not is_digest(digests[file])]
            word = "missing" if not os.path.lexists(path) else reasons[0] if reasons else "changed"
            if word == "changed" and folder == REPOSITORY:  # the manifest does not list itself and the signature
                word = f"changed: {MANIFEST} or {SIGNATURE}"
            described = [f"{path}: {line}" for line in lines or [word]]
            faults.append(Damage(task, path, files[path], described))
    size = sum(os.path.getsize(file) for file in digests if os.path.isfile(file))
    return faults, f"{len(digests)} files, {format_size(size)}"


def files_in(path: str) -> list[str]:
    """Return the path of a file, or the paths of all files in a folder."""
    if not os.path.isdir(path):
        return [path] if os.path.lexists(path) else []
    return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]


def current(path: str, digests: Mapping[str, str]) -> str | None:
    """Return the digest of a target as doit's records have it, from the digests of its files."""
    if not os.path.isdir(path):
        return digests.get(path)
    return folder_digest((name, current(os.path.join(path, name), digests)) for name in os.listdir(path))


def is_digest(text: str) -> bool:
    return len(text) == 64


def write_result(out: Any, problems: Mapping[str, list[str]], summary: str) -> int:
    """Print what differs. Return the exit code."""
    for lines in problems.values():
        for line in lines:
            out.write(f"✗ {message_line(line, limit=None)}\n")
    count = sum(map(bool, problems.values()))
    text = f"{count} not as it was built and published" if count else "all as it was built and published"
    out.write(f"{summary}{': ' if summary else ''}{text}\n")
    return 1 if count else 0


def build_again(faults: list[Damage], stages: Iterable[Stage]) -> int:
    """Build damaged targets again, and verify them. Return the exit code.

    doit has to forget what it believes about these files.
    """
    digest.forget([file for fault in faults for file in fault.files])
    if os.path.lexists(CACHE_FILE):
        os.remove(CACHE_FILE)
    models = {stage.name: stage.model.name for stage in stages}
    tasks = list(dict.fromkeys(name for fault in faults for name in (models[fault.task], fault.task)))
    for words in (tasks, ["verify", *(fault.task for fault in faults)]):
        sys.stdout.flush()
        if code := subprocess.call([sys.executable, sys.argv[0], *words]):
            return code
    return 0
