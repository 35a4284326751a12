"""Python files of the user in the folder of a model: a network, or a converter of weights.

Only their source runs. Python would run bytecode from `__pycache__` in place of a source file that looks unchanged, or
without any check: a person who reads the source would not see it, and no fingerprint covers it.
"""

import functools
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, kind_and_reason, listed
from build_tasks.paths import MODELS
from build_tasks.spec.ensemble_tables import python_folders
from build_tasks.spec.model import Model
from build_tasks.spec.model_files import walk

if TYPE_CHECKING:
    import torch


def python_files(model: Model) -> list[str]:
    """Return all Python files in the folder of a model, except those of its Python models."""
    return files_of_network(model, ".py")


def files_of_network(model: Model, *suffixes: str) -> list[str]:
    """Return all files in the folder of a model with one of these suffixes, except those of its Python models.

    A link that leaves the folder is not followed.
    """
    folder = f"{MODELS}/{model.name}"
    others = tuple(f"{folder}/{name}/" for name in python_folders(model.steps))
    paths = walk(folder, [os.path.realpath(folder)], skip_outside=True)
    files = sorted(os.path.normpath(path) for path in paths if path.endswith(suffixes))
    return [path for path in files if not path.startswith(others)]


def user_function(model: str, name: str) -> Callable[..., Any]:
    """Return a function of a Python file in the folder of a model.

    Args:
        model: The name of the model.
        name: `file.py:function`.
    Raises:
        UserError: If the file or the function does not exist, or if the file raises an error.
    """
    file, _, function = name.partition(":")
    # TorchScript writes the name of the module into its code, where only these characters make a name.
    module = re.sub(r"[^A-Za-z0-9_]", "_", f"models_{model}_{file.removesuffix('.py')}")
    import_sources_only(os.path.abspath(MODELS))
    return _function(f"{MODELS}/{model}/{file}", function, module, os.path.abspath(f"{MODELS}/{model}"))


def function_of_file(path: str, function: str) -> Callable[..., Any]:
    """Return a function of a Python file that is in no model's folder yet; see user_function."""
    return _function(path, function, "network_of_user", os.path.dirname(os.path.abspath(path)))


def _function(path: str, function: str, name: str, folder: str) -> Callable[..., Any]:
    """Run a Python file as a module of this name, with the files in `folder` beside it, and return its function."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses search for their module there
    _import_beside(folder, os.path.dirname(os.path.abspath(path)))
    try:
        with open(path, "rb") as source:
            exec(compile(source.read(), path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # a script may parse the command line, and end
        raise user_error(path, error) from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path}: there is no function {function}")
    result: Callable[..., Any] = getattr(module, function)
    return result


def network_of_function(build: Callable[..., Any], where: str, arguments: Mapping[str, Any]) -> Any:
    """Return the network that a function of the user builds, in fp32, which all artifacts begin with.

    Args:
        build: The function.
        where: Its Python file and its name, `path/of/file.py:function`.
        arguments: Those of the function.
    Raises:
        UserError: If the function fails, or builds something else, or a network without fp32 parameters.
    """
    import torch
    from torch.nn.parameter import is_lazy

    if isinstance(build, torch.nn.Module):
        raise UserError(f"{where}: expected a function that builds a network, found a network: return it from one")
    try:
        module = build(**arguments)
    except (Exception, SystemExit) as error:  # of the user's code
        raise user_error(where.rpartition(":")[0], error) from error
    if not isinstance(module, torch.nn.Module):
        found = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise UserError(f"{where}: expected a function that returns a network, a torch.nn.Module, found {found}")
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(
            f"{where}: expected a network of Python, found TorchScript: save it as a file, and name that in "
            "weights.source without [architecture]"
        )
    if isinstance(module, torch.nn.DataParallel) or hasattr(module, "_orig_mod"):
        raise UserError(f"{where}: expected the network itself: leave out torch.compile and DataParallel around it")
    if lazy := [name for name, parameter in module.named_parameters() if is_lazy(parameter)]:
        raise UserError(
            f"{where}: {lazy[0]} has no shape yet: run the network once on an example before it is returned"
        )
    if others := [key for key, value in module.state_dict().items() if not isinstance(value, torch.Tensor)]:
        raise UserError(
            f"{where}: {others[0]} of its state is no tensor, as in quantized networks: build the network in float32, "
            "since torchscript.precision and engine.precision set what is served"
        )
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()}
    if dtypes and "float32" not in dtypes:
        raise UserError(
            f"{where}: expected a network in float32, found {', '.join(sorted(dtypes))}: leave out .half(), since "
            "torchscript.precision and engine.precision set what is served"
        )
    return module


def convert_weights(state: dict[Any, Any], model: str, converter: str) -> "dict[str, torch.Tensor]":
    """Return the state dict that a converter of the user makes of the content of a checkpoint.

    Raises:
        UserError: If the converter raises an error, or returns something else than a dict of tensors.
    """
    import torch

    path = f"{MODELS}/{model}/{converter.partition(':')[0]}"
    function = user_function(model, converter)
    entries = listed(f"{key} ({type(value).__name__})" for key, value in state.items())  # the function may change them
    got = f"it got a dict of {len(state)} entries: {entries}"
    try:
        result = function(state)
    except (Exception, SystemExit) as error:  # of the user's code
        raise UserError(f"{user_error(path, error)}; {got}") from error
    expected = f"{MODELS}/{model}/{converter} must return a dict from keys to tensors"
    if not isinstance(result, dict):
        raise UserError(f"{expected}, found {type(result).__name__}")
    for key, tensor in result.items():
        if not isinstance(key, str):
            raise UserError(f"{expected}, found the key {key!r}, which is no text")
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{expected}, found {type(tensor).__name__} for {key}")
    return result


class SourceLoader(SourceFileLoader):
    """Imports a Python file without reading or writing bytecode."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


@functools.cache
def import_sources_only(folder: str) -> None:
    """Let this process import what is in a folder, and below it, with SourceLoader."""
    find = FileFinder.path_hook((ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceLoader, SOURCE_SUFFIXES))

    def hook(path: str) -> Any:
        if os.path.commonpath([folder, os.path.abspath(path)]) != folder:
            raise ImportError  # as the protocol of path hooks wants; Python then asks the next one
        return find(path)

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()


def _import_beside(*folders: str) -> None:
    """Let this process import files of the user from these folders, the last one first: `from layers import Head`.

    A file that imports another one is usually started as a script, which does the same. What another model has imported
    under such a name, in this process, is forgotten.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and file.startswith(os.path.abspath(MODELS) + os.sep) and not file.startswith(folders[0] + os.sep):
            del sys.modules[name]
    for folder in folders:
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)


def user_error(path: str, error: BaseException) -> UserError:
    """Return a message for an error in a file of the user, with the line. The traceback goes to the log."""
    traceback.print_exc()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{path}, line {line}" if line else path
    return UserError(f"{where}: {kind_and_reason(error)}{_import_advice(path, error)}")


def _import_advice(path: str, error: BaseException) -> str:
    """Return how a file beside that of the user is imported, if an import failed for its form or its name; or ""."""
    if not isinstance(error, ImportError):
        return ""
    if "relative import" in str(error):
        return "; write `from layers import …`, since files are imported from the folders of the spec and of this file"
    file = f"{(error.name or '').partition('.')[0]}.py"
    if any(os.path.exists(f"{folder}/{file}") for folder in {os.path.dirname(path), *sys.path[:2]}):
        return f"; a library has the name of {file} beside it: rename this file"
    return ""
