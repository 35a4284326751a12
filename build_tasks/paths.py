"""Folders and files of the project, relative to its root."""

import os

BUILD = "build"
MODELS = "models"
REPOSITORY = "model_repository"
TRASH = f"{BUILD}/.trash"  # pruned models, for a day
TRANSIT = ".incoming-"  # how folders beside a target begin: drafts on their way in, and replaced ones on their way out
FAILURES = f"{BUILD}/.failures.json"  # the reasons of tasks that failed when they ran last
STATE_DB = f"{BUILD}/.doit.sqlite3"  # doit's database of the tasks that succeeded


def has_spec(model: str) -> bool:
    """Return whether the folder of a model has an entry model.toml, even one that cannot be read."""
    try:
        os.lstat(f"{MODELS}/{model}/model.toml")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # no permission to look, or a disk error: reading it will fail with the reason
        return True
    return True
