"""Modules that begin to run when something of them is first used: a doit with nothing to do needs few of them.

Python has such a loader itself (importlib.util.LazyLoader), but its modules run as soon as anybody asks whether they
have this or that attribute, which doit does of everything in a dodo.py.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
ASKED_BY_DOIT = "create_doit_tasks"  # see doit/loader.py, _get_task_creators


@contextmanager
def lazily() -> Iterator[None]:
    """What is imported from this package in here runs when something of it is used. To be used before any thread."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname.startswith(f"{PACKAGE}.") else None
        if spec and spec.loader:
            spec.loader = _Later(spec.loader)
        return spec


class _Later(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Module


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:  # of what it does not have yet, which is all
        spec = self.__spec__
        if name == ASKED_BY_DOIT or spec is None or not isinstance(spec.loader, _Later):
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]  # what follows may use it
        self.__loader__ = spec.loader = spec.loader.loader
        spec.loader.exec_module(self)
        return getattr(self, name)
