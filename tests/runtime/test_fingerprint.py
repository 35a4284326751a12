"""The source modules that a stage declares are those that decide its targets: no module is missing, none is too many.

    stage's module ─► all that it imports, functions included ─► without RUN_ONLY and UNUSED ─► what it must declare

A module that is missing leaves old targets in place after an edit. A module too many rebuilds engines for nothing.
"""

import ast
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from build_tasks.runtime import fingerprint
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Stage
from tests.support.project import ROOT, Project
from tests.support.tiny_network import NETWORK

# Modules that no stage needs to declare, and why. What they import does not count either.
RUN_ONLY = {
    "errors": "the text of failures; a failed stage has no targets",
    "json_files": "the layout of JSON files, whose values come from the stage",
    "paths": "names of folders, which are part of every recorded path",
    "runtime.atomic_files": "moves and copies files, and does not change them",
    "runtime.digests": "another digest of the same content makes every stage stale by itself",
    "runtime.distributions": "versions are recorded by value",
    "runtime.fingerprint": "decides when a stage runs, not what it builds",
    "runtime.hardware": "facts of the machine are recorded by value",
    "runtime.machine_bound": "facts of the machine are recorded by value",
    "runtime.limits": "which inputs are refused, and when a stage is ended; there are no targets then",
    "runtime.progress": "messages to the terminal",
    "runtime.repository_files": "moves and copies files; the umask is recorded by value",
    "runtime.stage": "how a stage runs, not what it builds",
    "runtime.worker": "how a stage runs, not what it builds",
    "spec.model_files": "lists files, whose paths and contents are recorded",
    "spec.ragged": "what follows from the spec is recorded by value",
    "spec.source_checks": "which specs are refused; a refused one has no stages",
    "spec.engine_profiles": "settings reach `build` as plain data, and are recorded by value",
    "spec.warm_up": "settings reach `build` as plain data, and are recorded by value",
    "spec.interface": "settings reach `build` as plain data, and are recorded by value",
    "spec.ensemble_tables": "settings reach `build` as plain data, and are recorded by value",
    "formats.declarations": "settings, files and modules are recorded by value",
    "formats.artifacts": "names of files, which are part of every recorded path",
    "formats.ensemble_steps": "which steps an ensemble has, which reach `build` as plain data",
    "spec.loader": "reads specs, from which settings reach `build` as plain data",
    "spec.model": "settings reach `build` as plain data, and are recorded by value",
    "spec.tables": "settings reach `build` as plain data, and are recorded by value",
    "spec.overrides": "settings reach `build` as plain data, and are recorded by value",
    "verification.class_outputs": "the names reach `build` as plain data, and are recorded by value",
}

# Modules that a stage declares although it does not import them, or although they are in RUN_ONLY.
ALSO_DECLARED = {
    ("stages.client", "triton.preprocess_model.preprocessing"): "copied into the target",
    ("stages.preprocess", "triton.preprocess_model.model"): "copied into the target",
    ("stages.engine", "runtime.hardware"): "chooses the GPU that the engine is built on",
}


class Unused(NamedTuple):
    """An import that does not count for some stages: `used` says for which it does."""

    importer: str
    imported: str
    used: Callable[[Stage], bool]
    reason: str


def from_onnx(stage: Stage) -> bool:
    return stage.model.spec.from_onnx


def from_torch(stage: Stage) -> bool:
    """Whether the stage loads a network from a file of PyTorch. `measure` runs artifacts only."""
    return stage.model.spec.program_suffix is not None and not stage.name.startswith("measure")


def runs_source(stage: Stage) -> bool:
    return from_onnx(stage) or from_torch(stage)


def from_weights(stage: Stage) -> bool:
    return not stage.model.spec.from_onnx


def always(stage: Stage) -> bool:
    return True


def never(stage: Stage) -> bool:
    return False


def runs_in(*runners: str) -> Callable[[Stage], bool]:
    return lambda stage: stage.settings["runner"] in runners


def reads_pictures(stage: Stage) -> bool:
    return stage.name.startswith(("reference:", "preprocess:")) or bool(stage.settings.get("calibration"))


def own_calibration(stage: Stage) -> bool:
    return stage.settings["calibration"] is not None


def is_ensemble(stage: Stage) -> bool:
    return "steps" in stage.settings


UNUSED = [
    Unused("formats.pytorch_network", "formats.onnx_files", from_onnx, "the network is an ONNX file"),
    Unused("formats.pytorch_network", "formats.onnx_runtime", from_onnx, "the network is an ONNX file"),
    Unused("formats.pytorch_network", "formats.torch_program", from_torch, "the network is a file of PyTorch"),
    Unused("stages.weights", "formats.torch_program", from_torch, "the network is a file of PyTorch"),
    Unused("stages.weights", "formats.checkpoint_cleaning", from_weights, "the weights are an ONNX file"),
    Unused("stages.weights", "formats.checkpoints", from_weights, "the weights are an ONNX file"),
    Unused("stages.weights", "formats.state_dicts", from_weights, "the weights are an ONNX file"),
    Unused("stages.weights", "formats.serving_interface", runs_source, "only a source with its network is run"),
    Unused("stages.weights", "formats.example_inputs", runs_source, "likewise"),
    Unused("stages.weights", "formats.onnx_files", from_onnx, "the weights are an ONNX file"),
    Unused("stages.weights", "formats.onnx_import", from_onnx, "the weights are an ONNX file"),
    Unused("stages.weights", "formats.onnx_batch_first", from_onnx, "likewise"),
    Unused("stages.weights", "formats.onnx_names", from_onnx, "likewise"),
    Unused("stages.weights", "formats.ragged_batches", from_onnx, "likewise"),
    Unused("stages.onnx", "formats.onnx_import", from_onnx, "nothing is exported"),
    Unused("stages.accuracy", "formats.layer_errors", lambda s: "graph" in s.inputs, "graphs of reduced precision"),
    Unused("stages.measure", "formats.onnx_runtime", runs_in("onnx", "graph"), "one runner for each artifact"),
    Unused(
        "stages.measure", "formats.serving_device", runs_in("torchscript", "cast", "onnx", "graph", "aoti"), "likewise"
    ),
    Unused("formats.serving_device", "formats.serving_interface", runs_in("torchscript", "cast", "aoti"), "likewise"),
    Unused("formats.serving_device", "formats.ragged_batches", runs_in("onnx", "graph"), "likewise"),
    Unused("formats.serving_device", "formats.aoti_package", runs_in("aoti"), "likewise"),
    Unused("formats.serving_device", "formats.onnx_files", runs_in("onnx", "graph"), "likewise"),
    Unused("stages.measure", "formats.serving_interface", runs_in("torchscript", "cast", "aoti"), "likewise"),
    Unused("stages.measure", "formats.torchscript_graph", runs_in("cast"), "likewise"),
    Unused("stages.measure", "formats.tensorrt_session", runs_in("tensorrt"), "likewise"),
    Unused("formats.reduced_precision", "formats.pytorch_network", own_calibration, "prepares samples of the spec"),
    Unused("formats.reduced_precision", "formats.input_samples", own_calibration, "likewise"),
    Unused("formats.reduced_precision", "formats.picture_transform", own_calibration, "likewise"),
    Unused("formats.reduced_precision", "formats.serving_interface", own_calibration, "likewise"),
    Unused("formats.reduced_precision", "spec.pictures", own_calibration, "likewise"),
    Unused("formats.reduced_precision", "verification.accuracy_samples", own_calibration, "likewise"),
    Unused(
        "verification.accuracy_samples",
        "triton.preprocess_model.preprocessing",
        reads_pictures,
        "other stages take the classes from it",
    ),
    Unused("formats.onnx_export", "runtime.threads", never, "the cores of a check, whose answers are not recorded"),
    Unused("formats.tensorrt", "formats.onnx_files", never, "finds the graph, whose content is an input"),
    Unused("stages.config", "triton.ensemble_graph", is_ensemble, "there are no steps"),
    Unused("formats.step_runs", "formats.tensorrt_session", never, "runs the artifact of a step, where it has a GPU"),
    Unused("formats.step_runs", "formats.serving_device", never, "runs a package of AOTInductor"),
]

SPECS = {
    "all_formats": """\
        formats = ["torchscript", "onnx", "tensorrt", "rtx"]
        labels = "imagenet-1k"
        ensemble = "onnx"
        [architecture]
        timm = "test_efficientnet"
        [weights]
        source = "random://0"
        [engine]
        precision = "int8"
        calibration = "samples"
        repair = true
        [accuracy]
        samples = "samples"
        truth = "truth.csv"
        [triton]
        device = "gpu"
        """,
    "own_network": """\
        formats = ["torchscript", "tensorrt", "aoti"]
        [architecture]
        network = "network.py:build"
        [input]
        shape = [3, 16, 16]
        [weights]
        source = "weights.safetensors"
        converter = "convert.py:convert"
        """,
    "from_torch": """\
        formats = ["torchscript", "onnx"]
        [input]
        shape = [3, 16, 16]
        [weights]
        source = "network.pt"
        """,
    "own_ensemble": """\
        formats = ["onnx"]
        [architecture]
        timm = "test_efficientnet"
        [weights]
        source = "random://0"
        [[ensemble.steps]]
        model = "own_ensemble_preprocess"
        [[ensemble.steps]]
        model = "own_ensemble_onnx"
        [[ensemble.steps]]
        python = "best"
        inputs = { SCORES = "OUTPUT__0" }
        """,
    "from_onnx": """\
        formats = ["onnx", "tensorrt"]
        ensemble = "tensorrt"
        [input]
        shape = [3, 16, 16]
        [weights]
        source = "network.onnx"
        [engine]
        precision = "tf32"
        """,
}

LIST_STAGES = """\
import os, pickle, sys
sys.path.insert(0, os.getcwd())
import dodo
from doit.loader import load_tasks
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import stage_of
stages = [stage for task in load_tasks(vars(dodo)) if (stage := stage_of(task))]
open("stages.pickle", "wb").write(pickle.dumps(stages))
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[Stage]:
    """Every stage that dodo.py makes of specs that differ in what they need."""
    project = Project(tmp_path_factory.mktemp("stages") / "project")
    for name, spec in SPECS.items():
        folder = project.model(name, spec, network_py=NETWORK.replace("{body}", ""), convert_py="", truth_csv="")
        for file in ("weights.safetensors", "network.onnx", "samples/1.jpg", "best/model.py", "best/config.pbtxt"):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).touch()
    subprocess.run([sys.executable, "-c", LIST_STAGES], cwd=project.root, check=True)
    loaded: list[Stage] = pickle.loads((project / "stages.pickle").read_bytes())
    return loaded


def path_of(module: str) -> Path:
    return ROOT / fingerprint.source_path(f"build_tasks.{module}")


@functools.cache
def imports(module: str) -> set[str]:
    """The project's modules that a module imports anywhere, but not for type checks only."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    short = {name.removeprefix("build_tasks.") for name in names if name.startswith("build_tasks.")}
    return {name for name in short if path_of(name).is_file()}


def own_module(stage: Stage) -> str:
    return stage.build.__module__.removeprefix("build_tasks.")


def required(stage: Stage) -> set[str]:
    """The modules that a stage must declare: what its own module imports, directly or not, and what it copies."""
    used = {(row.importer, row.imported): row.used for row in UNUSED}
    modules: set[str] = set()
    unread = {own_module(stage)}
    while unread:
        module = unread.pop()
        modules.add(module)
        for name in imports(module) - RUN_ONLY.keys() - modules:
            if used.get((module, name), always)(stage):
                unread.add(name)
    return modules | {module for importer, module in ALSO_DECLARED if importer == own_module(stage)}


def declared(stage: Stage) -> set[str]:
    return {module.removeprefix("build_tasks.") for module in stage.modules}


def test_every_kind_of_stage_is_looked_at(stages: list[Stage]) -> None:
    modules = {f"stages.{path.stem}" for path in (ROOT / "build_tasks/stages").glob("*.py")}
    assert {own_module(stage) for stage in stages} == modules - {"stages.__init__", "stages.prune"}, "prune is no stage"


def test_a_stage_declares_the_modules_that_decide_its_targets(stages: list[Stage]) -> None:
    missing = {stage.name: required(stage) - declared(stage) for stage in stages}
    assert {name: modules for name, modules in missing.items() if modules} == {}


def test_a_stage_declares_no_module_that_it_does_not_use(stages: list[Stage]) -> None:
    superfluous = {stage.name: declared(stage) - required(stage) for stage in stages}
    assert {name: modules for name, modules in superfluous.items() if modules} == {}


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("onnx", "formats.onnx_export"),
        ("onnx", "formats.onnx_runtime"),
        ("precision", "formats.reduced_precision"),
        ("accuracy", "verification.metrics"),
    ],
)
def test_a_module_that_is_not_declared_is_noticed(stages: list[Stage], kind: str, module: str) -> None:
    for stage in (stage for stage in stages if stage.name.startswith(f"{kind}:")):
        others = tuple(name for name in stage.modules if name != f"build_tasks.{module}")
        assert required(stage) - declared(msgspec.structs.replace(stage, modules=others)) == {module}


def test_every_exception_is_needed(stages: list[Stage]) -> None:
    """An exception that no stage needs any more would hide the next mistake."""
    reached = set[str]().union(*map(required, stages))
    assert RUN_ONLY.keys() <= set[str]().union(*map(imports, reached))
    for importer, imported, used, _ in UNUSED:
        concerned = [stage for stage in stages if importer in required(stage)]
        assert imported in imports(importer), importer
        assert concerned, importer
        assert not all(used(stage) for stage in concerned), (importer, imported)
    for importer, module in ALSO_DECLARED:
        assert module in RUN_ONLY or module not in imports(importer), module


def test_a_stage_reads_the_digests_of_its_modules_once(stages: list[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many models there are: another stage with these modules takes the same table."""
    stage = stages[0]
    first = fingerprint.imported_digests(stage.modules)
    monkeypatch.setattr(fingerprint, "digest", lambda path: pytest.fail(f"{path} is read again"))
    assert fingerprint.imported_digests(stage.modules) is first
    assert fingerprint.imported_digests(stage.modules[:1]).items() <= first.items()


def recorded(stage: Stage, **differences: object) -> fingerprint.BuildRecord:
    """What a run of this stage would have recorded, with these differences."""
    record = fingerprint.BuildRecord(
        inputs={},
        modules=dict(fingerprint.imported_digests(stage.modules)),
        external_inputs={},
        settings=stage.settings,
        tools=stage.tool_fingerprint(),
        outputs={},
    )
    return fingerprint.BuildRecord(**{**record, **differences})  # type: ignore[typeddict-item]


def test_reasons_name_modules_settings_tools_and_files(stages: list[Stage]) -> None:
    (stage,) = [stage for stage in stages if stage.name == "onnx:all_formats"]
    paths = stage.dependency_paths()
    content = dict.fromkeys(paths, "5" * 64)
    record = recorded(
        stage,
        inputs={**content, paths[0]: "1" * 64, "models/all_formats/old.py": "2" * 64},
        modules={**fingerprint.imported_digests(stage.modules), "build_tasks.stages.onnx": "3" * 64},
        settings={**stage.settings, "opset": 16},
        tools={**stage.tool_fingerprint(), "onnx": "1.0"},
    )
    now = fingerprint.imported_digests(stage.modules)["build_tasks.stages.onnx"]
    assert stage.stale_inputs(record, content.get) == [
        'onnx.opset: 16 -> "auto"',
        f"onnx: 1.0 -> {stage.tool_fingerprint()['onnx']}",
        f"{paths[0]}: sha256 11111111 -> 55555555",
        "models/all_formats/old.py: missing",
        f"build_tasks.stages.onnx: sha256 33333333 -> {now[:8]}",
    ]
    assert stage.stale_inputs(recorded(stage, inputs=content), content.get) == []


@pytest.mark.parametrize("version", ["2.14.1", "2.14.1+cpu", "2.14.1+cu130"])
def test_builds_of_one_release_for_cpus_and_gpus_are_the_same_tool(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"made-up-{version.replace('.', '-').replace('+', '-')}"
    metadata = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert versions((name, "absent-package")) == {name: "2.14.1"}


def test_a_record_of_an_older_version_is_stale(stages: list[Stage]) -> None:
    record = recorded(stages[0])
    assert stages[0].stale_inputs({}) == [fingerprint.NEVER_BUILT]
    del record["modules"]
    assert stages[0].stale_inputs(record) == [fingerprint.OTHER_VERSION]
