"""The star test of what clients see and of ensembles: after each edit exactly the listed tasks run.

The stages are light ones: every target depends on the inputs and settings of its stage.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.light_stages import use_light_stages
from tests.support.project import Project

SPEC = """\
formats = ["onnx"]
[architecture]
timm = "test_efficientnet"
[weights]
source = "random://0"
[[inputs]]
name = "pixels"
shape = [3, 4, 4]
[[outputs]]
name = "scores"
[[outputs]]
name = "boxes"
[ensemble]
outputs = ["best"]
[[ensemble.steps]]
model = "net_onnx"
[[ensemble.steps]]
model = "second_onnx"
inputs = { INPUT__0 = "pixels" }
[[ensemble.steps]]
python = "join"
inputs = { A = "scores" }
[triton.onnx]
"""
SECOND = 'formats = ["onnx"]\n[architecture]\ntimm = "test_efficientnet"\n[weights]\nsource = "random://1"\n'
NET = "models/net/model.toml"

ENSEMBLE = ["config:net_ensemble", "client:net_ensemble", "publish:net_ensemble"]
ACCURACY = ["measure:net_onnx", "accuracy:net_onnx", "summary:net"]
SERVED = ["config:net_onnx", "publish:net_onnx"]

Edit = Callable[[Project], object]


def edit(old: str, new: str, path: str = NET) -> Edit:
    return lambda project: project.edit(path, old, new)


def labels(project: Project) -> None:
    (project / "models/net/colors.txt").write_text("red\n")
    project.edit(NET, 'name = "boxes"', 'name = "boxes"\nlabels = "colors.txt"')


def samples(project: Project) -> None:
    (project / "models/net/s.npz").write_bytes(b"arrays")
    project.edit(NET, 'outputs = ["best"]', 'outputs = ["best"]\nsamples = "s.npz"')


STARS: dict[str, tuple[Edit, list[str]]] = {
    "inputs.dims": (edit("shape = [3, 4, 4]", "shape = [3, 4, 4]\ndims = [48]"), [*SERVED, "ensemble:net", *ENSEMBLE]),
    "outputs.dims": (edit('name = "boxes"', 'name = "boxes"\ndims = [4]'), [*SERVED, "ensemble:net", *ENSEMBLE]),
    "outputs.labels": (  # they say that the output holds classes, which are compared
        labels,
        [
            *("labels:net.boxes", "reference:net", "onnx:net", "client:net_onnx"),
            *(*ACCURACY, *SERVED, "ensemble:net", *ENSEMBLE),
        ],
    ),
    "triton.sequence_batching": (
        edit("[triton.onnx]", "[triton.onnx]\nsequence_batching = {}"),
        [*SERVED, "client:net_onnx", "ensemble:net", *ENSEMBLE],
    ),
    "ensemble.outputs": (edit('["best"]', '["other"]'), ["ensemble:net", *ENSEMBLE]),
    "ensemble.samples": (samples, ["ensemble:net", "publish:net_ensemble"]),
    "ensemble.steps.inputs": (edit('A = "scores"', 'A = "boxes"'), ["ensemble:net", *ENSEMBLE]),
    "ensemble.steps.outputs": (
        edit('model = "second_onnx"', 'model = "second_onnx"\noutputs = { OUTPUT__0 = "x" }'),
        ["ensemble:net", *ENSEMBLE],
    ),
    "a file of the Python model": (
        edit("first", "second", "models/net/join/helper.py"),
        ["python_model:net_join", "publish:net_join", "ensemble:net", *ENSEMBLE],
    ),
    "a file beside it that nothing names": (lambda project: (project / "models/net/notes.txt").touch(), []),
    "the spec of another step": (
        edit("random://1", "random://2", "models/second/model.toml"),
        [f"{stage}:second" for stage in ("weights", "reference", "onnx", "summary")]
        + [f"{stage}:second_onnx" for stage in ("measure", "accuracy", "config", "client", "publish")]
        + ["ensemble:net", *ENSEMBLE],
    ),
}


SHORT_FORM = ("outputs.labels", "ensemble.steps.inputs", "a file of the Python model", "the spec of another step")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("star") / "project")
    use_light_stages(project)
    folder = project.model("net", SPEC)
    (folder / "join").mkdir()
    for name in ("model.py", "config.pbtxt", "helper.py"):
        (folder / "join" / name).write_text("# first\n")
    project.model("second", SECOND)
    project.built()
    return project


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in SHORT_FORM)) for name in STARS]
)
def test_an_edit_runs_exactly_these_tasks(built: Project, tmp_path: Path, name: str) -> None:
    change, tasks = STARS[name]
    project = built.copy(tmp_path / "project")
    change(project)
    assert project.built().ran == sorted(tasks)
    assert project.built().ran == []
