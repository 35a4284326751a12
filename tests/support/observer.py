"""A reader of model_repository/ beside the commands of a test, as a server is: it must never see half a model."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.support.project import Project

Tree = dict[str, bytes]  # the files of a repository, by path


class Observer(threading.Thread):
    """Reads every published model again and again, as a server does, and notes those that are not whole.

    A model was read in one state if its folder is the same one before and after.

    Args:
        is_whole: Says for the name and the files of a model whether it is whole.
    """

    def __init__(self, project: Project, is_whole: Callable[[str, Tree], bool]):
        super().__init__(daemon=True)
        self.repository = project / "model_repository"
        self.is_whole = is_whole
        self.ended = threading.Event()
        self.reads = 0
        self.half: list[tuple[str, Tree]] = []

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.read()

    def read(self) -> None:
        for name in os.listdir(self.repository) if self.repository.exists() else []:
            if name.startswith("."):
                continue
            folder = self.repository / name
            try:
                before = folder.stat().st_ino
                tree = {
                    str(path.relative_to(self.repository)): path.read_bytes()
                    for path in folder.rglob("*")
                    if path.is_file()
                }
                if folder.stat().st_ino != before:
                    continue
            except OSError:  # replaced or removed while it was read
                continue
            self.reads += 1
            if not self.is_whole(name, tree):
                self.half.append((name, tree))


@contextmanager
def observed(project: Project, is_whole: Callable[[str, Tree], bool]) -> Iterator[Observer]:
    observer = Observer(project, is_whole)
    observer.start()
    try:
        yield observer
    finally:
        observer.ended.set()
        observer.join()
