"""The two shipped models, with real weights where these need no download.

A GPU is hidden, so that the runs are the same on every machine.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.project import ROOT, Project, Run

LITE0 = "efficientnet_lite0"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def add_shipped(project: Project, *names: str) -> Project:
    """Copy shipped models into a project."""
    for name in names:
        shutil.copytree(ROOT / f"models/{name}", project / f"models/{name}")
    return project


@pytest.fixture(scope="module")
def clean_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Run]:
    """A project with efficientnet_lite0, built with one hash seed, and the run that built it."""
    project = add_shipped(Project(tmp_path_factory.mktemp("here") / "project"), LITE0)
    return project, project.built(PYTHONHASHSEED="1", **NO_GPU)


@pytest.fixture
def lite0(clean_build: tuple[Project, Run]) -> Project:
    return clean_build[0]


def is_state_or_log(path: str) -> bool:
    """Whether a file below build/ is no artifact: doit's records, caches and logs."""
    return path.startswith(".") or "/logs/" in path


def test_clean_builds_in_two_places_under_two_hash_seeds_are_identical(lite0: Project, tmp_path: Path) -> None:
    """One build is the fixture's; the other one has another path and another hash seed."""
    other = add_shipped(Project(tmp_path / "a" / "longer" / "path"), LITE0)
    other.built(LITE0, PYTHONHASHSEED="20261123", **NO_GPU)
    assert other.tree() == lite0.tree()
    artifacts, other_artifacts = (
        {path: data for path, data in p.tree("build").items() if not is_state_or_log(path)} for p in (lite0, other)
    )
    assert other_artifacts == artifacts
    assert f"{LITE0}/model.fp16.onnx" in artifacts


CHAIN = [
    *(f"{stage}:{LITE0}" for stage in ("weights", "reference", "torchscript", "onnx", "labels", "summary")),
    f"precision:{LITE0}.fp16",
    *(f"{stage}:{LITE0}{artifact}" for stage in ("measure", "accuracy") for artifact in ("", "_onnx", ".fp16")),
    *(
        f"{stage}:{LITE0}{model_format}"
        for stage in ("config", "client", "publish")
        for model_format in ("", "_onnx", "_ensemble")
    ),
    *(f"{stage}:{LITE0}_preprocess" for stage in ("config", "publish")),
    f"preprocess:{LITE0}",
]


def unsupported_tasks(out: str) -> list[str]:
    """The tasks that a run reports as not for this machine."""
    return [
        f"{line[1]}:{line[2]}"
        for line in re.finditer(
            r"^– (\S+) +(\S+) +cannot be built on this machine, which lacks .*an NVIDIA GPU \(.*\); "
            r"`doit container` builds it wherever Docker sees an NVIDIA GPU$",
            out,
            re.MULTILINE,
        )
    ]


def test_without_a_gpu_all_but_the_engine_is_built(
    clean_build: tuple[Project, Run], copy_of: Callable[[Project], Project]
) -> None:
    project, first = clean_build
    assert (first.ran, first.failed) == (sorted(CHAIN), [])
    assert unsupported_tasks(first.out) == [f"engine:{LITE0}"]
    assert first.out.count("–") == 1, "tasks that depend on the engine print nothing"
    assert first.out.splitlines()[-1] == "25 built, 1 up to date, 1 not for this machine"
    assert sorted(path.name for path in (project / "model_repository").iterdir()) == sorted(
        f"{LITE0}{suffix}" for suffix in ("", "_onnx", "_preprocess", "_ensemble")
    )
    again = copy_of(project).built(**NO_GPU)
    assert (again.ran, unsupported_tasks(again.out)) == ([], [f"engine:{LITE0}"])
    assert again.out.splitlines()[-1] == "26 up to date, 1 not for this machine"


@pytest.mark.parametrize("task", ["engine", f"engine:{LITE0}", f"publish:{LITE0}_trt"])
def test_without_a_gpu_an_engine_that_is_asked_for_is_a_failure(
    lite0: Project, copy_of: Callable[[Project], Project], task: str
) -> None:
    run = copy_of(lite0).doit(task, **NO_GPU)
    assert run.code == 1
    assert (run.ran, run.failed) == ([], [f"engine:{LITE0}"])
    (line,) = [line for line in run.out.splitlines() if line.startswith("✗")]
    assert "cannot be built on this machine, which lacks " in line
    assert "Traceback" not in run.out


def test_it_recognizes_the_photographs(lite0: Project) -> None:
    import onnxruntime
    from polygraphy.json import load_json

    samples = load_json(str(lite0 / f"build/{LITE0}/samples.json"))[0]["INPUT__0"]
    labels = (lite0 / f"model_repository/{LITE0}_onnx/labels.txt").read_text().splitlines()
    model = str(lite0 / f"model_repository/{LITE0}_onnx/1/model.onnx")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"INPUT__0": samples})
    pictures = sorted(path.stem for path in (ROOT / "build_tasks/verification/photographs").glob("*.jpg"))
    classes = {picture: labels[index] for picture, index in zip(pictures, np.argmax(scores, axis=1), strict=True)}
    assert "espresso" in classes["coffee"]
    assert "tripod" in classes["camera"]
    assert "cat" in classes["chelsea"]


@pytest.mark.parametrize(
    ("artifact", "least", "most"),
    [("model.pt", 0, 1e-4), ("model.onnx", 0, 1e-4), ("model.fp16.onnx", 1e-4, 1e-2)],
)
def test_its_accuracy_is_measured_and_ok(lite0: Project, artifact: str, least: float, most: float) -> None:
    report = json.loads((lite0 / f"build/{LITE0}/accuracy.json").read_text())
    (row,) = [row for row in report["artifacts"] if row["file"] == artifact]
    assert row["status"] == "ok"
    assert least < row["outputs"]["OUTPUT__0"]["relative_l2"] < most
    assert row["outputs"]["OUTPUT__0"]["top1"] == 1.0


def test_its_fp16_graph_names_what_the_fp32_network_names(lite0: Project) -> None:
    """For every photograph, by ONNX Runtime alone: without the rules of this project's gate."""
    import onnx
    import onnxruntime
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    path = str(lite0 / f"build/{LITE0}/model.fp16.onnx")
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}
    samples = load_json(str(lite0 / f"build/{LITE0}/samples.json"))[0]["INPUT__0"]
    reference = RunResults.load(str(lite0 / f"build/{LITE0}/reference.json"))["pytorch-fp32"][0]["OUTPUT__0"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (scores,) = session.run(["OUTPUT__0"], {"INPUT__0": samples})
    assert len(samples) == len(list((ROOT / "build_tasks/verification/photographs").glob("*.jpg")))
    assert scores.argmax(axis=1).tolist() == np.asarray(reference).argmax(axis=1).tolist()


def test_without_the_hub_b3_says_where_to_put_the_weights_and_lite0_stays(
    lite0: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = add_shipped(copy_of(lite0), "efficientnet_b3")
    run = project.doit(HF_HUB_OFFLINE="1", HF_HOME=str(project / "no-cache"), **NO_GPU)
    assert run.code == 1
    assert run.failed == ["weights:efficientnet_b3"]
    (line,) = [line for line in run.out.splitlines() if line.startswith("✗")]
    assert line.endswith("put the file at models/efficientnet_b3/model.safetensors")
    assert unsupported_tasks(run.out) == ["engine:efficientnet_b3", f"engine:{LITE0}"]
    counts = "1 built, 26 up to date, 2 not for this machine, 1 failed"
    assert counts in run.out.splitlines(), "the other model is complete"


def test_b3_is_built_as_in_the_guide_from_weights_put_in_place(project: Project, tmp_path: Path) -> None:
    """Opset 11, open batch, exported at batch 32. The weights are a file in the place of the hub's download."""
    import onnx

    add_shipped(project, "efficientnet_b3")
    spec = project / "models/efficientnet_b3/model.toml"
    as_shipped = spec.read_text()
    # at batch 64 the build takes a minute on two cores
    spec.write_text(as_shipped.replace("max_batch_size = 64\n\n[arch", "max_batch_size = 2\n\n[arch"))
    hub = 'source = "hf://timm/efficientnet_b3.ra2_in1k/model.safetensors@main"'
    project.edit("models/efficientnet_b3/model.toml", hub, 'source = "random://0"')
    project.built("weights:efficientnet_b3")
    (project / "build/efficientnet_b3/weights.safetensors").rename(project / "models/efficientnet_b3/model.safetensors")
    project.edit("models/efficientnet_b3/model.toml", 'source = "random://0"', hub)
    project.built("weights:efficientnet_b3", "onnx:efficientnet_b3", HF_HUB_OFFLINE="1")
    graph = onnx.load(project / "build/efficientnet_b3/model.onnx")
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [11]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert len(graph.graph.node) < 400


HEAVY = (
    *("torch", "onnx", "numpy", "polygraphy", "timm", "onnxruntime", "google.protobuf", "rich"),
    *("tensorrt", "tensorrt_rtx", "modelopt", "cyclonedx"),
)


def imported_by(project: Project, *command: str) -> list[str]:
    """The heavy modules that doit imports for a command, in its own process."""
    heavy = (*HEAVY, *(() if nvidia_driver() else ("pynvml",)))
    program = (
        "import sys; from doit.doit_cmd import DoitMain; "
        f"code = DoitMain().run({list(command)!r}); "
        f"print('HEAVY', *(name for name in {heavy!r} if name in sys.modules)); sys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=project.root,
        env={**os.environ, **NO_GPU},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1), run.stderr  # `doit info` exits with 1 for a task that would run
    _, marker, names = run.stdout.partition("HEAVY")
    assert marker, run.stdout
    return names.split()


def test_doing_nothing_runs_no_module_of_a_stage(built_tiny: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(built_tiny)
    time.sleep(2.1)  # the no-op cache remembers nothing of a project that was edited a moment ago
    modules = ["stages.weights", "stages.onnx", "stages.measure", "stages.accuracy", "bench.task", "serving.check"]
    stages = [f"build_tasks.{module}" for module in modules]
    program = (
        "import sys; from doit.doit_cmd import DoitMain; sys.argv[0] = 'doit'; DoitMain().run(sys.argv[1:]); "
        f"print('RUN', *(name for name in {stages!r} if 'task' in vars(sys.modules.get(name, sys))))"
    )

    def run_by(*arguments: str) -> list[str]:
        """The modules of stages that doit runs for these arguments."""
        command = [sys.executable, "-c", program, *arguments]
        run = subprocess.run(command, cwd=project.root, stdout=subprocess.PIPE, text=True, check=True)
        return run.stdout.rpartition("RUN")[2].split()

    assert run_by() == stages[:4], "with another sys.path, all tasks are checked once"
    assert run_by() == []
    assert run_by("tiny") == []
    assert run_by("list") == stages


def nvidia_driver() -> bool:
    """Whether NVIDIA's driver is installed; then doit imports pynvml to find the GPU."""
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


@pytest.mark.parametrize("command", [["list"], ["list", "--all", "--status"], ["info", "onnx:tiny"], []])
def test_listing_and_doing_nothing_import_nothing_heavy(
    built_tiny: Project, copy_of: Callable[[Project], Project], command: list[str]
) -> None:
    assert imported_by(copy_of(built_tiny), *command) == []


def test_a_changed_key_of_triton_is_published_without_a_network(
    built_tiny: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(built_tiny)
    project.edit("models/tiny/model.toml", "[accuracy]", "[triton]\ninstance_group = [{ count = 2 }]\n\n[accuracy]")
    assert imported_by(project) == ["google.protobuf"]  # to check the key with Triton's protobuf
    for name in ("tiny", "tiny_onnx"):
        assert "count: 2" in (project / f"model_repository/{name}/config.pbtxt").read_text()


def test_a_changed_key_writes_no_bill_of_materials_again(lite0: Project, copy_of: Callable[[Project], Project]) -> None:
    """That of the ensemble neither, whose limit of requests follows the number of instances."""
    project = copy_of(lite0)
    spec = project / f"models/{LITE0}/model.toml"
    spec.write_text(spec.read_text() + "\n[triton]\ninstance_group = [{ count = 2 }]\n")
    assert imported_by(project, LITE0) == ["google.protobuf"]
    assert "max_inflight_requests: 256" in (project / f"model_repository/{LITE0}_ensemble/config.pbtxt").read_text()


@pytest.mark.parametrize("command", [["list"], ["list", "--all", "--status"], ["info", f"engine:{LITE0}"], []])
def test_engines_that_cannot_be_built_here_make_neither_heavy(
    lite0: Project, copy_of: Callable[[Project], Project], command: list[str]
) -> None:
    assert imported_by(copy_of(lite0), *command) == []


def test_the_list_reads_like_a_table_of_contents(tiny: Project) -> None:
    tiny.model("made_up", 'formats = ["onnx"]\n[architecture]\ntimm = "test_vit"\n[weights]\nsource = "random://3"\n')
    lines = tiny.built("list").out.splitlines()
    names = [line.split()[0] for line in lines]
    stages = ["weights", "labels", "reference", "torchscript", "cast", "onnx", "repair", "precision", "engine"]
    stages += ["rtx", "measure", "accuracy", "summary", "preprocess", "config", "client", "publish", "prune"]
    stages += ["compare", "layers", "bench", "sweep", "container", "check", "upgrade", "smoke", "serve", "tritonserver"]
    assert names == ["made_up", "tiny", *stages]
    assert all(len(line.split()) > 1 for line in lines), "every task has a doc line"
    assert "RANDOM" in lines[0]
    everything = tiny.built("list", "--all").out
    assert "weights:made_up" in everything
    assert "RANDOM weights, for structure tests only" in everything
    assert not re.search(r"^(repair|precision|engine|rtx|compare|layers):", everything, re.MULTILINE), (
        "no format is compiled"
    )


def test_the_list_tells_what_an_engine_is_made_of(tiny: Project) -> None:
    tiny.edit("models/tiny/model.toml", '"onnx"]', '"onnx", "tensorrt", "rtx"]')
    listed = dict(line.split(maxsplit=1) for line in tiny.built("list", "--all").out.splitlines())
    assert listed["tiny"] == "torchscript, onnx, tensorrt, rtx"
    assert listed["precision:tiny.fp16"] == "model.fp16.onnx, which engines are compiled from"
    assert listed["engine:tiny"] == "model.plan: fp16, batches 1, 4, 4"
    assert listed["rtx:tiny"] == "model.rtx: fp16, batches 1, 4, 4"
    assert "accuracy:tiny.fp16" in listed
    assert {f"{stage}:tiny_trt" for stage in ("accuracy", "config", "publish")} <= listed.keys()
    assert not [name for name in listed if "rtx" in name.partition(":")[2]], "Triton does not serve it"
