"""prune: remove from model_repository/ the generated models that have no spec any more

    model_repository/<name> ─► generated here? ─► described by a spec? ─► kept, or removed with a line of output

Only folders with this project's mark are removed. Folders that a person made or copied there stay.
"""

import os
from collections.abc import Collection
from typing import Any

from build_tasks.paths import REPOSITORY
from build_tasks.runtime import atomic_files
from build_tasks.triton.repository import is_generated


def task(described: Collection[str]) -> dict[str, Any]:
    """The doit task. It is not a `Stage`, because it has no targets.

    Args:
        described: Names of the Triton models that the specs describe.
    """
    return {
        "actions": [(prune, [described])],
        "uptodate": [lambda: not orphans(described)],
        "io": {"capture": False},
        "doc": f"Remove from {REPOSITORY}/ the models that no spec describes any more",
    }


def prune(described: Collection[str]) -> None:
    """doit's action: remove every orphan, with a line for each."""
    for name in orphans(described):
        print(f"removing {REPOSITORY}/{name}: no spec describes it any more", flush=True)
        atomic_files.remove(f"{REPOSITORY}/{name}")


def orphans(described: Collection[str]) -> list[str]:
    """Folders of model_repository/ that this project generated, and that no spec describes any more."""
    if not os.path.isdir(REPOSITORY):
        return []
    return sorted(name for name in os.listdir(REPOSITORY) if name not in described and is_generated(name))
