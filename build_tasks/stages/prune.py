"""prune: remove from model_repository/ the generated models that have no spec any more

    model_repository/<name> ─► generated here? ─► described by a spec, at the start of the run or now?
                                                    yes ─► kept
                                                    no  ─► build/.trash/, with a line of output

The specs are read a second time, because another run may have added a model since the start of this run. Only folders
with this project's mark are removed. Folders that a person made or copied there stay. While a folder in models/ has no
readable spec, the models of its name stay, too: an editor may be saving the spec. A removed model stays in the trash
for a day.
"""

import os
from collections.abc import Callable, Collection
from typing import Any

from doit.exceptions import TaskFailed
from msgspec import Struct

from build_tasks.errors import UserError
from build_tasks.paths import BUILD, MODELS, REPOSITORY
from build_tasks.runtime import repository_files
from build_tasks.spec import loader
from build_tasks.triton.repository import is_generated, spec_of


class Specs(Struct, frozen=True):
    """What the folders in models/ describe at one moment.

    described: Names of the Triton models of all specs.
    unreadable: Paths of the specs that cannot be read.
    """

    described: set[str]
    unreadable: set[str]


def task(described: Collection[str]) -> dict[str, Any]:
    """The doit task. It is not a `Stage`, because it has no targets.

    Args:
        described: Names of the Triton models that the specs described when doit read them.
    """
    return {
        "actions": [(_task_result, [prune, described])],
        "uptodate": [
            lambda: not (orphans(described) or repository_files.leftovers() or repository_files.expired_trash())
        ],
        "io": {"capture": False},
        "doc": f"Remove from {REPOSITORY}/ the models that no spec describes any more",
    }


def sweep_task() -> dict[str, Any]:
    """The doit task that removes what is left of removed models in build/."""
    return {
        "actions": [(_task_result, [sweep])],
        "io": {"capture": False},
        "doc": f"On demand: remove the folders of removed models from {BUILD}/, and empty its trash",
    }


def _task_result(action: Callable[..., None], *arguments: Any) -> TaskFailed | None:
    try:
        action(*arguments)
    except OSError as error:
        return TaskFailed(str(error))
    return None


def prune(described: Collection[str]) -> None:
    """Move every orphan to the trash, with a line for each. Name the folders that remain in build/.

    The specs are read again under the lock that publishing takes: another run may have published a model whose spec is
    newer than the start of this run.
    """
    with repository_files.repository_lock():
        specs = read_specs() if orphans(described) else Specs(set(), set())
        owners: set[str] = set()
        for name in orphans({*described, *specs.described}):
            path = f"{REPOSITORY}/{name}"
            spec = spec_of(name) or ""
            owner = os.path.dirname(spec)
            if spec in specs.unreadable:
                print(f"keeping {path}: {spec} cannot be read; to remove the model, delete {owner}/", flush=True)
                continue
            kept = repository_files.trash(path)
            print(f"removing {path}: no spec describes it any more; {kept} is kept for a day", flush=True)
            owners.add(os.path.basename(owner))
        for owner in sorted(owners.intersection(removed_models())):
            print(f"{BUILD}/{owner}/ is left of a removed model: `doit sweep` removes it", flush=True)
    repository_files.empty_trash()


def sweep() -> None:
    """Remove the folders of removed models from build/, and all of its trash."""
    for name in removed_models():
        print(f"removing {BUILD}/{name}: there is no {MODELS}/{name}/", flush=True)
        repository_files.trash(f"{BUILD}/{name}")
    repository_files.empty_trash(all_of_it=True)


def orphans(described: Collection[str]) -> list[str]:
    """Folders of model_repository/ that this project generated, and that no spec describes any more."""
    if not os.path.isdir(REPOSITORY):
        return []
    return sorted(name for name in os.listdir(REPOSITORY) if name not in described and is_generated(name))


def read_specs() -> Specs:
    """Read the specs of all folders in models/. A mistake in one spec does not hide the others."""
    described: set[str] = set()
    unreadable: set[str] = set()
    for folder in loader.folder_names():
        try:
            described |= loader.read_model(folder).triton_models.keys()
        except UserError:
            unreadable.add(f"{MODELS}/{folder}/model.toml")
    return Specs(described, unreadable)


def removed_models() -> list[str]:
    """The folders in build/ whose model is no longer in models/."""
    try:
        names = [entry.name for entry in os.scandir(BUILD) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
    return sorted(name for name in names if not os.path.lexists(f"{MODELS}/{name}"))
