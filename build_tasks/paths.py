"""Folders and files of the project, relative to its root."""

BUILD = "build"
MODELS = "models"
REPOSITORY = "model_repository"
STATE_DB = f"{BUILD}/.doit.sqlite3"  # doit's database of the tasks that succeeded
