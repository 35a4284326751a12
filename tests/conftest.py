"""Fixtures that all tests share: projects, and the weights of a tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.project import TINY, Project, add_tiny


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of TINY's architecture in a safetensors file, written once by the real weights stage."""
    project = Project(tmp_path_factory.mktemp("tiny") / "project")
    project.model("tiny", TINY.replace("weights.safetensors", "random://0"))
    project.built("weights:tiny")
    return project / "build/tiny/weights.safetensors"


@pytest.fixture
def tiny(project: Project, tiny_weights: Path) -> Project:
    """A project with the model `tiny`, not built yet."""
    add_tiny(project, tiny_weights)
    return project


@pytest.fixture(scope="session")
def built_tiny(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Project:
    """A project with the model `tiny`, built; tests copy it."""
    project = Project(tmp_path_factory.mktemp("built") / "project")
    add_tiny(project, tiny_weights)
    project.built()
    return project


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Project], Project]:
    """A function that copies a built project, for one test."""
    return lambda original: original.copy(tmp_path / "copy")


# Modules whose tests are about processes, or about all that doit does for a user.
WITH_OWN_FORK_SERVER = ("test_parallel", "test_robustness", "test_spawn", "test_staleness", "test_shipped")


@pytest.fixture(autouse=True, scope="module")
def choose_fork_server(request: pytest.FixtureRequest) -> None:
    Project.own_fork_server = request.module.__name__.rpartition(".")[2] in WITH_OWN_FORK_SERVER
