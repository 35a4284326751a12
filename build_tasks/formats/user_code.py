"""Python files of the user in the folder of a model: a network, or a converter of weights."""

import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from build_tasks.errors import UserError, first_lines
from build_tasks.paths import MODELS
from build_tasks.spec.model import Model
from build_tasks.spec.model_files import walk


def python_files(model: Model) -> list[str]:
    """Return all Python files in the folder of a model. A link that leaves the folder is not followed."""
    folder = f"{MODELS}/{model.name}"
    paths = walk(folder, [os.path.realpath(folder)], skip_outside=True)
    return sorted(os.path.normpath(path) for path in paths if path.endswith(".py"))


def user_function(model: str, name: str) -> Callable[..., Any]:
    """Return a function of a Python file in the folder of a model.

    Args:
        model: The name of the model.
        name: `file.py:function`.
    Raises:
        UserError: If the file or the function does not exist, or if the file raises an error.
    """
    file, _, function = name.partition(":")
    path = f"{MODELS}/{model}/{file}"
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    module = types.ModuleType(f"models_{model}_{file.removesuffix('.py')}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses search for their module there
    # The file is not imported, and its imports write no bytecode: Python trusts cached bytecode by mtime and size.
    sys.dont_write_bytecode = True
    try:
        with open(path, "rb") as source:
            exec(compile(source.read(), path, "exec"), module.__dict__)
    except Exception as error:
        raise user_error(path, error) from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path}: there is no function {function}")
    result: Callable[..., Any] = getattr(module, function)
    return result


def user_error(path: str, error: Exception) -> UserError:
    """Return a message for an error in a file of the user, with the line. The traceback goes to the log."""
    traceback.print_exc()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{path}, line {line}" if line else path
    return UserError(f"{where}: {type(error).__name__}: {first_lines(error)}")
