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
    """Weights of TINY's architecture as a safetensors file, made once by the real weights stage."""
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
    """A copy of a built project, for one test."""
    return lambda original: original.copy(tmp_path / "copy")


COLD = ("test_parallel", "test_robustness", "test_shipped")  # about processes, or about all that a user's doit does


@pytest.fixture(autouse=True, scope="module")
def cold(request: pytest.FixtureRequest) -> None:
    Project.cold = request.module.__name__.rpartition(".")[2] in COLD
