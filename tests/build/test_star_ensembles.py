"""The star test of what clients see and of ensembles: after each edit exactly the listed tasks run.

The stages are light ones: every target depends on the inputs and settings of its stage.
"""

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tasks.errors import UserError
from build_tasks.spec.ensemble_tables import Ensemble, EnsembleStep
from build_tasks.spec.loader import parse
from build_tasks.spec.tensor_tables import Dimension, TensorInput, TensorOutput
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
layout = "nchw"
crop_mode = "letterbox"
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


def pixels(line: str) -> Edit:
    """Add a key to the table of the input."""
    return edit('name = "pixels"', f'name = "pixels"\n{line}')


def labels(project: Project) -> None:
    (project / "models/net/colors.txt").write_text("red\n")
    project.edit(NET, 'name = "boxes"', 'name = "boxes"\nlabels = "colors.txt"')


def samples(project: Project) -> None:
    (project / "models/net/s.npz").write_bytes(b"arrays")
    project.edit(NET, 'outputs = ["best"]', 'outputs = ["best"]\nsamples = "s.npz"')


# What follows from other samples or pictures, and from another interface of the network besides that.
PREPARED = [
    *("reference:net", "measure:net_onnx", "accuracy:net_onnx", "summary:net", "client:net_onnx", "publish:net_onnx"),
    *("ensemble:net", "client:net_ensemble", "publish:net_ensemble"),
]
INTERFACE = [*PREPARED, "onnx:net", "config:net_onnx", "config:net_ensemble"]

STARS: dict[str, tuple[Edit, list[str]]] = {
    "inputs.color": (pixels('color = "bgr"'), PREPARED),
    "inputs.files": (pixels('files = [".png"]'), PREPARED),
    "inputs.scale": (pixels("scale = 255"), PREPARED),
    "inputs.mean": (pixels("mean = [0.5]"), PREPARED),
    "inputs.std": (pixels("std = [0.5]"), PREPARED),
    "inputs.interpolation": (pixels('interpolation = "nearest"'), PREPARED),
    "inputs.crop_mode": (edit('"letterbox"', '"squash"'), PREPARED),
    "inputs.crop_pct": (edit('"letterbox"', '"center"\ncrop_pct = 0.5'), PREPARED),
    "inputs.fill": (pixels("fill = 0"), PREPARED),
    "inputs.values": (pixels("values = [0, 1]"), INTERFACE),
    "outputs.key": (edit('name = "scores"', 'name = "scores"\nkey = 0'), INTERFACE),
    "outputs.batch_dimension": (edit('name = "scores"', 'name = "scores"\nbatch_dimension = 1'), INTERFACE),
    "outputs.classes": (edit('name = "scores"', 'name = "scores"\nclasses = true'), INTERFACE),
    "inputs.dims": (
        edit("shape = [3, 4, 4]", "shape = [3, 4, 4]\ndims = [48]"),
        [*SERVED, "client:net_onnx", "ensemble:net", *ENSEMBLE],
    ),
    "outputs.dims": (
        edit('name = "boxes"', 'name = "boxes"\ndims = [4]'),
        [*SERVED, "client:net_onnx", "ensemble:net", *ENSEMBLE],
    ),
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


ELSEWHERE = {  # keys whose rows are in test_tensors.py
    *("inputs.name", "inputs.dtype", "inputs.shape", "inputs.layout", "inputs.low", "inputs.high"),
    *("inputs.batch_dimension", "outputs.name", "dimensions.min", "dimensions.opt", "dimensions.max"),
    *("ensemble.steps", "ensemble.steps.model", "ensemble.steps.python"),  # without them there is no ensemble
    "inputs.ragged",  # for ONNX files: see the last test
}


def test_every_key_of_these_tables_has_a_row() -> None:
    tables = {"inputs": TensorInput, "outputs": TensorOutput, "dimensions": Dimension}
    tables |= {"ensemble": Ensemble, "ensemble.steps": EnsembleStep}
    keys = {f"{name}.{key}" for name, table in tables.items() for key in table.__struct_fields__}
    assert keys - {*STARS} == ELSEWHERE


SHORT_FORM = (
    "inputs.mean",
    "outputs.labels",
    "ensemble.steps.inputs",
    "a file of the Python model",
    "the spec of another step",
)


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


def edit_at_random(project: Project, generator: random.Random) -> str:
    """Make one of the edits of the table; one that does not fit to those before it is taken back."""
    name = generator.choice([*STARS])
    before = (project / NET).read_text()
    try:
        STARS[name][0](project)
        with contextlib.chdir(project.root):
            parse("net", (project / NET).read_bytes())
    except (AssertionError, UserError):
        (project / NET).write_text(before)
    return name


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 12))])
def test_any_sequence_of_edits_ends_where_a_clean_build_does(built: Project, tmp_path: Path, seed: int) -> None:
    """With several inputs, outputs and steps of an ensemble; test_equivalence.py has the real stages."""
    project, generator = built.copy(tmp_path / "edited"), random.Random(seed)
    history = []
    for _ in range(8):
        history.append(edit_at_random(project, generator))
        if generator.random() < 0.4:
            project.built()
    project.built()
    clean = Project(tmp_path / "clean")
    use_light_stages(clean)
    shutil.rmtree(clean / "models")
    shutil.copytree(project / "models", clean / "models")
    clean.built()
    assert project.tree() == clean.tree(), history


RAGGED = """\
formats = ["onnx"]
[weights]
source = "m.onnx"
[[inputs]]
name = "values"
shape = [4]
ragged = true
[[inputs]]
name = "n"
dtype = "int32"
shape = []
[triton.onnx]
"""


def test_a_ragged_input_concerns_the_whole_chain(project: Project) -> None:
    use_light_stages(project)
    folder = project.model("net", RAGGED)
    (folder / "m.onnx").write_bytes(b"network")
    everything = project.built().ran
    count = 'batch_input = [{ target_name = ["n"], data_type = "TYPE_INT32", source_input = ["values"] }]'
    for old, new in (("[triton.onnx]", f"[triton.onnx]\n{count}"), ("ragged = true\n", "")):
        project.edit(NET, old, new)
        assert project.built().ran == everything


OUTER = """
[ensemble]
outputs = ["best"]
[[ensemble.steps]]
model = "net_ensemble"
"""


def test_an_edit_of_a_step_concerns_the_ensembles_around_it(built: Project, tmp_path: Path) -> None:
    project = built.copy(tmp_path / "project")
    project.model("outer", SECOND + OUTER)
    project.built()
    project.edit("models/net/join/helper.py", "first", "second")
    both = ["ensemble:net", "ensemble:outer"]
    changed = [task.replace("net_", f"{name}_") for name in ("net", "outer") for task in ENSEMBLE]
    assert project.built().ran == sorted([*both, *changed, "python_model:net_join", "publish:net_join"])
    assert project.built("outer").ran == []
