"""Engines: of TensorRT-RTX itself, and of TensorRT-RTX under the name of TensorRT (tests/support/fakes)."""

import functools
import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build_tasks.runtime import hardware
from tests.support import fakes, tiny_network
from tests.support import project as project_support
from tests.support.project import ROOT, TINY, VERSION_RECORDS, Project, Run

RTX = "1.7.1.116"

# TensorRT-RTX has no operator Col2Im. ONNX has it from opset 18 on, and only the dynamo exporter writes it.
FOLD = {
    "body": "x = nn.functional.fold(x.flatten(2)[:, :, :144], (12, 12), 1)",
    "onnx": 'exporter = "dynamo"\nopset = 18',
}

# Large enough for modelopt to quantize it.
AMPERE = """\
formats = ["rtx"]
max_batch_size = 2

[architecture]
timm = "test_resnet"

[weights]
source = "random://0"

[engine]
precision = "fp8"
rtx_compute_capabilities = ["8.0"]
"""

# A network whose tensors have some megabytes.
WIDE = "x = nn.functional.interpolate(x, scale_factor=30); x = x + self.conv(x[:, :3]).mean()"


failure_line = functools.partial(project_support.failure_line, marks="✗–")  # failed, or not for this machine


def signature(project: Project, path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((project / f"build/{path}.signature.json").read_text())
    return loaded


def config(project: Project, path: str) -> ModelConfig:
    return text_format.Parse((project / path).read_text(), ModelConfig())


def tensor(name: str, *shape: int, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


@pytest.fixture(scope="module")
def rtx(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Run]:
    """A project with many models for TensorRT-RTX, and its first run, in which some of them fail."""
    project = Project(tmp_path_factory.mktemp("rtx") / "project")
    tiny_network.add(project, "plain", formats='"onnx", "rtx"')
    tiny_network.add(project, "one", 'rtx_compute_capabilities = ["8.6"]')
    tiny_network.add(project, "several", 'rtx_compute_capabilities = ["8.6", "12.0"]')
    tiny_network.add(project, "hopper", 'rtx_compute_capabilities = ["9.0"]')
    tiny_network.add(project, "turing", 'precision = "bf16"\nrtx_compute_capabilities = ["8.9", "7.5"]')
    project.model("ampere", AMPERE)
    tiny_network.add(project, "stripped", "strip_plan = true")
    tiny_network.add(project, "fold", formats='"torchscript", "onnx", "rtx"', **FOLD)
    tiny_network.add(project, "narrow", "workspace = 1", body=WIDE)
    tiny_network.add(project, "wide", body=WIDE)
    return project, project.doit(**fakes.machine(project.root.parent, tensorrt=None, gpus=None))


def without_gpu(project: Project, torch: bool = False) -> dict[str, str]:
    return fakes.machine(project.root.parent, tensorrt=None, gpus=None, torch=torch)


@pytest.fixture
def plain(rtx: tuple[Project, Run], copy_of: Callable[[Project], Project]) -> Project:
    """A copy of the project with the built model `plain` only."""
    project = copy_of(rtx[0])
    for folder in (project / "models").iterdir():
        if folder.name != "plain":
            shutil.rmtree(folder)
    project.built("prune")
    return project


def test_nothing_else_failed(rtx: tuple[Project, Run]) -> None:
    _, run = rtx
    assert run.code == 1, run.out
    assert {"rtx:one", "rtx:several", "rtx:plain"} <= {*run.ran}
    failed = ["rtx:ampere", "rtx:fold", "rtx:hopper", "rtx:narrow", "rtx:stripped", "rtx:turing"]
    assert run.failed == failed, run.out
    assert {"publish:fold", "publish:fold_onnx"} <= {*run.ran}, "what needs no compiler is published"


def test_a_signature_has_the_tensors_and_the_compiler_of_the_engine(rtx: tuple[Project, Run]) -> None:
    project, _ = rtx
    shapes = {point: [batch, 3, 16, 16] for point, batch in (("min", 1), ("opt", 3), ("max", 3))}
    assert signature(project, "plain/model.rtx") == {
        "inputs": [tensor("INPUT__0", -1, 3, 16, 16)],
        "outputs": [tensor("OUTPUT__0", -1, 4)],
        "profiles": [{"INPUT__0": shapes}],
        "compiler": "rtx",
        "precision": "fp16",
        "TensorRT-RTX": RTX,
    }
    assert (project / "build/plain/model.rtx").read_bytes().startswith(b"vtrt"), "NVIDIA's own file"


def test_engines_of_tensorrt_rtx_are_not_served(rtx: tuple[Project, Run]) -> None:
    project, _ = rtx
    assert sorted(path.name for path in (project / "model_repository").iterdir()) == ["fold", "fold_onnx", "plain_onnx"]


def test_overrides_of_the_profile_hold_for_one_run(plain: Project) -> None:
    options = (
        "rtx:plain",
        "--min_engine_batch_size",
        "2",
        "--opt_engine_batch_size",
        "4",
        "--max_engine_batch_size",
        "9",
    )
    run = plain.built(*options, **without_gpu(plain))
    assert run.ran == ["rtx:plain"]
    assert "batches: 2, 4, 9" in run.out
    assert signature(plain, "plain/model.rtx")["profiles"][0]["INPUT__0"]["max"] == [9, 3, 16, 16]
    assert plain.built(*options, **without_gpu(plain)).ran == []
    assert plain.built(**without_gpu(plain)).ran == ["rtx:plain"]
    assert signature(plain, "plain/model.rtx")["profiles"][0]["INPUT__0"]["max"] == [3, 3, 16, 16]


def test_another_precision_is_built_for_one_run(plain: Project) -> None:
    run = plain.built("rtx:plain", "--engine_precision", "FP32", **without_gpu(plain))
    assert run.ran == ["rtx:plain"], "model.onnx itself passed the gate before"
    assert signature(plain, "plain/model.rtx")["precision"] == "fp32"
    assert plain.built(**without_gpu(plain)).ran == ["rtx:plain"]
    assert signature(plain, "plain/model.rtx")["precision"] == "fp16"
    run = plain.built("rtx:plain", "--engine_precision", "BF16", **without_gpu(plain, torch=True))
    assert run.ran == ["accuracy:plain.bf16", "measure:plain.bf16", "precision:plain.bf16", "rtx:plain"]
    assert plain.built(**without_gpu(plain)).ran == ["rtx:plain"], (
        "the graph of the spec's precision is still up to date"
    )


def test_the_options_of_onnx_reach_the_engine(plain: Project) -> None:
    run = plain.built("rtx:plain", "--no-dynamic_axes", "--batch_size", "7", **without_gpu(plain, torch=True))
    graph = [f"{stage}:plain.fp16" for stage in ("accuracy", "measure", "precision")]
    assert run.ran == sorted([*graph, "onnx:plain", "rtx:plain"])
    assert signature(plain, "plain/model.rtx")["inputs"] == [tensor("INPUT__0", 7, 3, 16, 16)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--min_engine_batch_size", "4", "--max_engine_batch_size", "2"),
            "models/plain/model.toml --min_engine_batch_size 4 --max_engine_batch_size 2: engine: "
            "expected min_batch_size <= opt_batch_size <= max_batch_size, found 4, 4, 2",
        ),
        (("--opt_engine_batch_size", "8"), "found 1, 8, 3"),
        (
            ("--engine_precision", "FP4"),
            "models/plain/model.toml --engine_precision fp4: engine.precision: "
            "expected one of fp32, tf32, fp16, bf16, int8, fp8, found 'fp4' (did you mean 'fp",
        ),
        (("--max_engine_batch_size", "many"), "max_engine_batch_size"),
        (
            ("--no-dynamic_axes", "--batch_size", "2", "--max_engine_batch_size", "3"),
            "engine.max_batch_size: expected 2, the batch that onnx.dynamic_axes = false fixes, found 3",
        ),
    ],
)
def test_overrides_that_contradict_each_other_are_refused_before_anything_runs(
    plain: Project, arguments: tuple[str, ...], message: str
) -> None:
    run = plain.doit("rtx:plain", *arguments)
    assert run.code == 3
    assert message in run.out
    assert run.ran == []


def test_a_profile_that_contradicts_the_fixed_batch_of_the_spec_is_refused(plain: Project) -> None:
    plain.edit("models/plain/model.toml", "[onnx]", "[onnx]\ndynamic_axes = false\nbatch_size = 4")
    plain.edit("models/plain/model.toml", "[engine]", "[engine]\nopt_batch_size = 8")
    run = plain.doit()
    assert run.code == 3
    assert "engine.opt_batch_size: expected 4, the batch that onnx.dynamic_axes = false fixes, found 8" in run.out


def test_a_profile_that_contradicts_the_graph_is_refused(plain: Project) -> None:
    """With -s, doit skips the stages in between; then a graph may have another batch than the spec."""
    import hashlib

    import onnx

    path = plain / "build/plain/model.fp16.onnx"
    graph = onnx.load(path)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(graph, path)
    verdict_file = plain / "build/plain/model.fp16.onnx.verdict.json"
    verdict = json.loads(verdict_file.read_text())
    verdict_file.write_text(json.dumps(verdict | {"model": hashlib.sha256(path.read_bytes()).hexdigest()}))
    run = plain.doit("-s", "rtx:plain", **without_gpu(plain))
    assert run.code == 1
    assert failure_line(run, "rtx:plain").endswith(
        "the graph has a fixed batch of 2, and the engine's profile asks for 1, 3, 3; "
        "set onnx.dynamic_axes = true, or leave the batch sizes out"
    )


def test_a_graph_without_a_gate_result_of_its_own_is_not_compiled(plain: Project) -> None:
    shutil.copy(plain / "build/plain/model.onnx", plain / "build/plain/model.fp16.onnx")
    before = (plain / "build/plain/model.rtx").read_bytes()
    run = plain.doit("-s", "rtx:plain", **without_gpu(plain))
    assert run.code == 1
    assert "model.fp16.onnx.verdict.json is the gate result of another file than build/plain/model.fp16.onnx" in run.out
    assert (plain / "build/plain/model.rtx").read_bytes() == before


def test_a_gpu_that_tensorrt_rtx_does_not_support_is_named_with_those_it_supports(rtx: tuple[Project, Run]) -> None:
    line = failure_line(rtx[1], "rtx:hopper")
    assert f"engine.rtx_compute_capabilities: TensorRT-RTX {RTX} knows 7.5, 8.0, 8.6, 8.9, 12.0" in line
    assert line.endswith("and not 9.0")


def test_a_precision_that_a_gpu_lacks_is_an_error_before_the_compilation(rtx: tuple[Project, Run]) -> None:
    assert failure_line(rtx[1], "rtx:turing").endswith(
        "engine.precision: bf16 needs a GPU of compute capability 8.0 or newer, "
        "and this engine is for 7.5; fp16 runs on all of them"
    )
    assert "fp8 needs a GPU of compute capability 8.9 or newer, and this engine is for 8.0" in failure_line(
        rtx[1], "rtx:ampere"
    )


def test_an_unsupported_operator_is_named_with_its_node_and_what_to_try(rtx: tuple[Project, Run]) -> None:
    line = failure_line(rtx[1], "rtx:fold")
    assert f"TensorRT-RTX {RTX} has no operator Col2Im (node " in line
    assert "try another onnx.opset, onnx.exporter" in line


def test_too_little_workspace_is_reported_under_the_key_of_the_spec(rtx: tuple[Project, Run]) -> None:
    line = failure_line(rtx[1], "rtx:narrow")
    assert f"TensorRT-RTX {RTX} ran out of memory" in line
    assert "raise engine.workspace or leave it out" in line
    assert "rtx:wide" in rtx[1].ran, "the same model with more workspace"


# The configuration of the builder. The engine itself needs a GPU.

READ_BACK = """\
import json, sys
import polygraphy.config

settings = json.loads(sys.argv[1])
polygraphy.config.USE_TENSORRT_RTX = settings["compiler"] == "rtx"
from build_tasks.formats import tensorrt as compiler

trt = compiler.trt
profiles = [{"INPUT__0": {"min": [1, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [4, 3, 8, 8]}}]
builder, network = compiler.create_network(strongly_typed=True)
network.add_identity(network.add_input("INPUT__0", trt.float32, (-1, 3, 8, 8)))
monitor = compiler.BuildProgress()
config = compiler.builder_config(profiles, settings, sys.argv[2], monitor)(builder, network)
flags = ("TF32", "REFIT", "STRIP_PLAN", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE")
print("RESULT", json.dumps({
    "flags": [flag for flag in flags if config.get_flag(getattr(trt.BuilderFlag, flag))],
    "level": config.builder_optimization_level,
    "workspace": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
    "verbosity": config.profiling_verbosity.name,
    "profiles": config.num_optimization_profiles,
    "hardware": config.hardware_compatibility_level.name,
}))
"""

DEFAULTS: dict[str, Any] = {
    "precision": "fp16",
    "workspace": None,
    "optimization_level": 3,
    "sparse_weights": False,
    "refittable": False,
    "strip_plan": False,
    "profiling_verbosity": "layer_names_only",
    "hardware_compatibility": "none",
    "version_compatible": False,
    "rtx_compute_capabilities": [],
}


def read_back(tmp_path: Path, compiler: str, **settings: object) -> dict[str, Any]:
    """The configuration of the builder for these keys of [engine]."""
    import os

    run = subprocess.run(
        [sys.executable, "-c", READ_BACK, json.dumps({"compiler": compiler, **DEFAULTS, **settings}), "none.cache"],
        cwd=tmp_path,
        env={**os.environ, **fakes.machine(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support/fakes'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, run.stdout + run.stderr
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return found


@pytest.mark.parametrize("compiler", ["tensorrt", "rtx"])
def test_the_keys_of_the_spec_reach_the_builder(tmp_path: Path, compiler: str) -> None:
    plain = read_back(tmp_path, compiler)
    assert (plain["flags"], plain["level"], plain["verbosity"], plain["profiles"]) == ([], 3, "LAYER_NAMES_ONLY", 1)
    found = read_back(
        tmp_path,
        compiler,
        precision="tf32",
        workspace=5,
        optimization_level=1,
        sparse_weights=True,
        refittable=True,
        strip_plan=True,
        profiling_verbosity="detailed",
    )
    assert found["flags"] == ["TF32", "REFIT", "STRIP_PLAN", "SPARSE_WEIGHTS"]
    assert (found["level"], found["workspace"], found["verbosity"]) == (1, 5 << 20, "DETAILED")


def test_version_compatibility_reaches_the_builder_of_plans(tmp_path: Path) -> None:
    """hardware_compatibility cannot be tested: TensorRT-RTX accepts and ignores it, with a line in its log."""
    assert read_back(tmp_path, "tensorrt", version_compatible=True)["flags"] == ["VERSION_COMPATIBLE"]


# Plans, with the fakes.

PLAN = {"formats": '"torchscript", "onnx", "tensorrt"'}


@pytest.fixture(scope="module")
def cpu_side(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The model `net`, built except for its plan."""
    project = Project(tmp_path_factory.mktemp("plan") / "project")
    tiny_network.add(project, "net", **PLAN)
    run = project.built(**without_gpu(project, torch=True))
    assert "engine:net" not in run.ran
    return project


@pytest.fixture(scope="module")
def with_plan(cpu_side: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same project with the plan. It has no gate result, because no GPU can run the plan."""
    project = cpu_side.copy(tmp_path_factory.mktemp("with_plan") / "project")
    run = project.built("engine:net", "config:net_trt", **gpu(project))
    assert run.ran == ["config:net_trt", "engine:net"]
    return project


def gpu(project: Project, **found: Any) -> dict[str, str]:
    return fakes.machine(project.root.parent, torch=False, **found)


NEITHER = (
    "cannot be built on this machine, which lacks TensorRT 10 or newer (the package tensorrt) and an NVIDIA GPU "
    "(there is no driver); `doit container` builds it wherever Docker sees an NVIDIA GPU"
)


def test_without_gpu_and_tensorrt_the_rest_is_built_with_a_line_about_the_engine(
    cpu_side: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(cpu_side)
    run = project.built(**without_gpu(project))
    assert run.ran == []
    (line,) = [line for line in run.out.splitlines() if line.startswith("–")]
    assert line.split(None, 3)[1:] == ["engine", "net", NEITHER]
    assert "1 not for this machine" in run.out
    assert sorted(path.name for path in (project / "model_repository").iterdir()) == ["net", "net_onnx"]


@pytest.mark.parametrize("task", ["engine:net", "engine", "publish:net_trt", "accuracy:net_trt"])
def test_an_engine_requested_by_name_fails_with_the_same_line(
    cpu_side: Project, copy_of: Callable[[Project], Project], task: str
) -> None:
    project = copy_of(cpu_side)
    run = project.doit(task, **without_gpu(project))
    assert run.code == 1
    assert run.failed == ["engine:net"]
    assert failure_line(run, "engine:net").endswith(NEITHER)


@pytest.mark.parametrize(
    ("found", "lacks"),
    [
        ({"tensorrt": "8.6.1.post1"}, "which lacks TensorRT 10 or newer (here it is 8.6.1.post1); `doit container`"),
        ({"tensorrt": "9.3.0"}, "which lacks TensorRT 10 or newer (here it is 9.3.0); `doit container`"),
        ({"gpus": ""}, "which lacks an NVIDIA GPU (the driver shows none); `doit container`"),
        ({"gpus": "error"}, "which lacks an NVIDIA GPU (the driver says: Driver/library version mismatch)"),
        ({"gpus": None}, "which lacks an NVIDIA GPU (there is no driver); `doit container`"),
        ({"tensorrt": None}, "which lacks TensorRT 10 or newer (the package tensorrt); `doit container`"),
    ],
)
def test_the_line_says_what_the_machine_has_instead(
    cpu_side: Project, copy_of: Callable[[Project], Project], found: dict[str, Any], lacks: str
) -> None:
    project = copy_of(cpu_side)
    run = project.built("net", **gpu(project, **found))
    assert lacks in failure_line(run, "engine:net")
    assert project.doit("engine:net", **gpu(project, **found)).code == 1


def test_a_hidden_gpu_counts_as_none(cpu_side: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(cpu_side)
    run = project.built("net", CUDA_VISIBLE_DEVICES="", **gpu(project))
    assert "lacks an NVIDIA GPU (the driver shows none)" in failure_line(run, "engine:net")


def test_the_signature_of_a_plan_names_its_gpu_and_tensorrt(with_plan: Project) -> None:
    found = signature(with_plan, "net/model.plan")
    assert found["profiles"][0]["INPUT__0"]["max"] == [3, 3, 16, 16]
    built_with = {"compiler": "tensorrt", "precision": "fp16", "TensorRT": "11.2.1.2", "GPU": "NVIDIA RTX A4000"}
    assert {**found, **built_with, "compute capability": "8.6"} == found


def test_a_plan_of_another_machine_stays_up_to_date_where_none_can_be_built(
    with_plan: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(with_plan)
    publish_by_hand(project, "net", ["model.plan"])
    before = project.tree()
    run = project.built("engine:net", "config:net_trt", **without_gpu(project))
    assert run.ran == []
    run = project.built(**without_gpu(project))
    assert "engine       net" not in run.out, "it is not stale"
    assert project.tree() == before
    project.edit("models/net/model.toml", "[engine]", "[engine]\noptimization_level = 1")
    run = project.built(**without_gpu(project))
    assert failure_line(run, "engine:net").split(None, 3)[3] == (
        f"outdated (engine.optimization_level: 3 -> 1), and {NEITHER}"
    )
    assert project.tree() == before, "what was published stays published"


def test_a_plan_that_this_machine_cannot_run_is_not_published(
    with_plan: Project, copy_of: Callable[[Project], Project]
) -> None:
    """In this test CUDA is missing. On other machines it may be another TensorRT or GPU."""
    project = copy_of(with_plan)
    run = project.doit("net", **gpu(project))
    assert run.failed == ["measure:net_trt"]
    assert not (project / "model_repository/net_trt").exists()


def test_the_config_of_an_fp16_plan_has_fp16_tensors(cpu_side: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(cpu_side)
    project.edit("models/net/model.toml", "[engine]", "[engine]\nkeep_io_types = false")
    project.built("config:net_trt", **fakes.machine(project.root.parent))
    served = config(project, "build/net/model.plan.config.pbtxt")
    assert (served.input[0].data_type, served.output[0].data_type) == (10, 10), "TYPE_FP16"


def test_the_config_of_a_plan_allows_no_larger_batch_than_its_profile(
    with_plan: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(with_plan)
    assert config(project, "build/net/model.plan.config.pbtxt").max_batch_size == 3
    project.edit("models/net/model.toml", "[engine]", "[engine]\nmax_batch_size = 2")
    project.built("config:net_trt", **gpu(project))
    assert config(project, "build/net/model.plan.config.pbtxt").max_batch_size == 2
    project.edit("models/net/model.toml", "max_batch_size = 2", "max_batch_size = 8")
    project.built("config:net_trt", **gpu(project))
    assert config(project, "build/net/model.plan.config.pbtxt").max_batch_size == 3, "and no larger batch than the spec"


# Timing caches.


def test_a_timing_cache_is_kept_for_each_gpu_and_version(
    with_plan: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(with_plan)
    caches = project / "build/.timing"
    assert [path.name for path in caches.iterdir()] == ["11.2.1.2.NVIDIA_RTX_A4000.cache"]
    project.built("engine:net", **gpu(project, gpus="NVIDIA L4, 8.9"))
    project.built("engine:net", **gpu(project, tensorrt="10.14.1.48"))
    names = ["10.14.1.48.NVIDIA_RTX_A4000.cache", "11.2.1.2.NVIDIA_L4.cache", "11.2.1.2.NVIDIA_RTX_A4000.cache"]
    assert sorted(path.name for path in caches.iterdir()) == names
    assert all(path.stat().st_size for path in caches.iterdir())


def test_a_damaged_timing_cache_is_replaced(with_plan: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(with_plan)
    (cache,) = (project / "build/.timing").iterdir()
    good = cache.read_bytes()
    cache.write_bytes(b"damaged")
    project.edit("models/net/model.toml", "[engine]", "[engine]\noptimization_level = 1")
    assert project.built("engine:net", **gpu(project)).ran == ["engine:net"]
    assert cache.read_bytes()[:8] == good[:8]


def test_a_pinned_timing_cache_is_read_and_never_written(
    with_plan: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(with_plan)
    (cache,) = (project / "build/.timing").iterdir()
    pinned = project / "models/net/pinned.cache"
    cache.rename(pinned)
    pinned.chmod(0o444)
    before = pinned.read_bytes(), pinned.stat().st_mtime_ns
    project.edit("models/net/model.toml", "[engine]", '[engine]\ntiming_cache = "pinned.cache"')
    assert project.built("engine:net", **gpu(project)).ran == ["engine:net"]
    assert (pinned.read_bytes(), pinned.stat().st_mtime_ns) == before
    assert list((project / "build/.timing").iterdir()) == [], "no other cache is written"
    log = (project / "build/net/logs/engine.net.log").read_text()
    assert "Loading tactic timing cache" in log
    assert project.built("engine:net", **gpu(project)).ran == []
    pinned.chmod(0o644)
    pinned.write_bytes(b"another")
    run = project.built("engine:net", **gpu(project))
    assert run.ran == ["engine:net"], "it is an input"
    assert "models/net/pinned.cache" in run.out
    pinned.unlink()
    run = project.doit("engine:net", **gpu(project))
    assert failure_line(run, "engine:net").endswith(
        "models/net/pinned.cache does not exist; models/net/model.toml asks for it"
    )


# Several GPUs.


def publish_by_hand(project: Project, name: str, plans: list[str]) -> None:
    """Publish plans by the stage's own function, with gate results written here, because no GPU can run the plans."""
    import os

    program = f"""
import json
from build_tasks.runtime.digests import digest
from build_tasks.spec.loader import load
from build_tasks.stages import publish
(model,) = [model for model in load() if model.name == "{name}"]
for plan in {plans!r}:
    path = model.artifact(plan)
    verdict = {{"model": digest(path), "signature": digest(path + ".signature.json"), "status": "ok"}}
    json.dump(verdict, open(path + ".verdict.json", "w"))
    json.dump({{"samples": 0, "reference": "", "outputs": {{}}}}, open(path + ".measured.json", "w"))
stage = publish.task(model, "tensorrt", {plans!r})["meta"]["stage"]
print(stage.build(stage.inputs, stage.outputs, stage.settings))
"""
    environment = {**os.environ, "PYTHONPATH": str(project.root)}
    subprocess.run([sys.executable, "-c", program], cwd=project.root, env=environment, check=True)


def test_a_fleet_is_one_model_and_a_second_gpu_adds_its_plan(
    cpu_side: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(cpu_side)
    project.edit("models/net/model.toml", "[engine]", '[engine]\ncompute_capabilities = ["8.6", "9.0"]')
    ampere, hopper = gpu(project), gpu(project, gpus="NVIDIA H200, 9.0")

    run = project.doit("net", **ampere)
    assert "engine:net.sm86" in run.ran
    assert run.failed == ["measure:net_trt.sm86"], "there is no CUDA"
    assert "lacks a GPU of compute capability 9.0 (NVIDIA RTX A4000 has 8.6)" in failure_line(run, "engine:net.sm90")
    assert not (project / "build/net/model.sm90.plan").exists()
    first = (project / "build/net/model.sm86.plan").read_bytes()
    served = config(project, "build/net/model.plan.config.pbtxt")
    assert served.default_model_filename == "model.sm86.plan"
    assert dict(served.cc_model_filenames) == {"8.6": "model.sm86.plan"}

    run = project.doit("engine:net.sm90", "config:net_trt", **hopper)
    assert run.ran == ["config:net_trt", "engine:net.sm90"]
    assert (project / "build/net/model.sm86.plan").read_bytes() == first
    served = config(project, "build/net/model.plan.config.pbtxt")
    assert dict(served.cc_model_filenames) == {"8.6": "model.sm86.plan", "9.0": "model.sm90.plan"}
    assert project.built("engine:net.sm86", "config:net_trt", **ampere).ran == [], (
        "no machine rebuilds the plan of the other"
    )
    assert project.built("engine:net.sm86", "engine:net.sm90", "config:net_trt", **without_gpu(project)).ran == []

    publish_by_hand(project, "net", ["model.sm86.plan", "model.sm90.plan"])
    published = sorted(project.tree("model_repository/net_trt"))
    version = [f"1/{file}" for file in ("model.sm86.plan", "model.sm90.plan", *VERSION_RECORDS)]
    assert published == sorted([*version, "SHA256SUMS", "config.pbtxt", "preprocessing.json"])


def test_a_plan_requested_on_another_gpu_is_an_error(cpu_side: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(cpu_side)
    project.edit("models/net/model.toml", "[engine]", '[engine]\ncompute_capabilities = ["9.0"]')
    run = project.doit("engine:net.sm90", **gpu(project))
    assert run.code == 1
    assert "lacks a GPU of compute capability 9.0 (NVIDIA RTX A4000 has 8.6)" in failure_line(run, "engine:net.sm90")


# Options that need a GPU: the message has the reason of the library.


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("version_compatible = true", "libnvinfer_lean.so"),
        ("refittable = true", "CUDA_SUCCESS"),
    ],
)
def test_a_failed_build_reports_the_reason_of_the_library(
    cpu_side: Project, copy_of: Callable[[Project], Project], line: str, reason: str
) -> None:
    """The last error is the builder's own. The errors before it are of CUDA."""
    project = copy_of(cpu_side)
    project.edit("models/net/model.toml", "[engine]", f"[engine]\n{line}")
    run = project.doit("engine:net", **gpu(project))
    assert run.code == 1
    assert "TensorRT 11.2.1.2 cannot build the engine: " in failure_line(run, "engine:net")
    assert reason in failure_line(run, "engine:net")


# The models that ship.


def shipped(project: Project, name: str, *replacements: tuple[str, str]) -> None:
    shutil.copytree(ROOT / f"models/{name}", project / f"models/{name}")
    for old, new in replacements:
        project.edit(f"models/{name}/model.toml", old, new)


@pytest.mark.long
def test_efficientnet_lite0_compiles_in_every_precision(project: Project) -> None:
    name = "efficientnet_lite0"
    only_rtx = ('labels = "imagenet-1k"', 'formats = ["rtx"]\nmax_batch_size = 2')
    shipped(project, name, only_rtx, ('ensemble = "onnx"', ""))

    def error(precision: str) -> float:
        """The error of a graph whose gate result is ok."""
        graph = project / f"build/{name}/model.{precision}.onnx"
        assert json.loads(Path(f"{graph}.verdict.json").read_text())["status"] == "ok"
        measured = json.loads(Path(f"{graph}.measured.json").read_text())
        assert measured["distinct"] == 7
        output = measured["outputs"]["OUTPUT__0"]
        assert precision != "fp16" or output["top1_changes"] == []
        return float(output["relative_l2"])

    def engine() -> str:
        assert (project / f"build/{name}/model.rtx").stat().st_size > 1e6
        built: str = signature(project, f"{name}/model.rtx")["precision"]
        return built

    assert f"rtx:{name}" in project.built(f"rtx:{name}").ran
    assert engine() == "fp16"
    assert 1e-4 < error("fp16") < 1e-2
    run = project.built(f"rtx:{name}", "--engine_precision", "FP32")
    assert run.ran == [f"accuracy:{name}.fp32", f"measure:{name}.fp32", f"rtx:{name}"]
    assert engine() == "fp32"
    project.built(f"rtx:{name}", "--engine_precision", "BF16")
    assert engine() == "bf16"
    assert error("fp16") < error("bf16") < 0.1
    run = project.doit(f"rtx:{name}", "--engine_precision", "INT8")
    assert run.failed == [f"accuracy:{name}.int8"], "seven images are too few for its calibration"
    assert "output OUTPUT__0: top-1 agreement 85.7%, limit 99%, worst at " in run.out
    assert engine() == "bf16", "the last good engine stays"
    project.built(f"repair:{name}", "--engine_precision", "INT8")
    excluded = tomllib.loads((project / f"models/{name}/keep_fp32.lock").read_text())["int8"]["keep_fp32"]
    assert 1 <= len(excluded) <= 4, "of 94 nodes"
    run = project.built(f"rtx:{name}", "--engine_precision", "INT8")
    assert run.ran == [*(f"{stage}:{name}.int8" for stage in ("accuracy", "measure", "precision")), f"rtx:{name}"]
    assert engine() == "int8"
    assert error("int8") < 0.25


@pytest.mark.long
def test_efficientnet_b3_compiles_in_fp32_and_fp16(project: Project) -> None:
    """Opset 11, as in the guide. Random weights, because the real ones are a download."""
    name = "efficientnet_b3"
    shipped(
        project,
        name,
        ('labels = "imagenet-1k"\nmax_batch_size = 64', 'formats = ["rtx"]\nmax_batch_size = 2'),
        ("hf://timm/efficientnet_b3.ra2_in1k/model.safetensors@main", "random://0"),
        ("opt_batch_size = 32\nmax_batch_size = 64", "opt_batch_size = 1\nmax_batch_size = 2"),
    )
    assert f"rtx:{name}" in project.built(f"rtx:{name}").ran
    found = signature(project, f"{name}/model.rtx")
    assert (found["precision"], found["inputs"]) == ("fp16", [tensor("INPUT__0", -1, 3, 288, 288)])
    run = project.built(f"rtx:{name}", "--engine_precision", "FP32")
    assert run.ran == [f"accuracy:{name}.fp32", f"measure:{name}.fp32", f"rtx:{name}"]
    assert signature(project, f"{name}/model.rtx")["precision"] == "fp32"


# On a machine with TensorRT and a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(hardware.missing_requirements() is not None, reason=f"lacks {hardware.missing_requirements()}")
def test_a_plan_is_built_published_compared_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    from polygraphy.backend.trt import EngineFromPath, TrtRunner
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    project = Project(tmp_path / "project")
    spec = TINY.replace("weights.safetensors", "random://0").replace('labels = "labels.txt"', "")
    project.model("tiny", spec.replace('"torchscript", "onnx"', '"tensorrt"'))
    tiny_network.add(project, "net", **PLAN)
    run = project.built()
    assert {"engine:tiny", "accuracy:tiny_trt", "publish:tiny_trt", "publish:net_trt"} <= {*run.ran}
    assert project.built().ran == []
    verdict = json.loads((project / "build/net/model.plan.verdict.json").read_text())
    assert verdict["status"] == "ok"
    for name in ("tiny", "net"):
        samples = load_json(str(project / f"build/{name}/samples.json"))[0]["INPUT__0"]
        reference = next(iter(RunResults.load(str(project / f"build/{name}/reference.json")).values()))[0]["OUTPUT__0"]
        plan = project / f"model_repository/{name}_trt/1/model.plan"
        largest = config(project, f"model_repository/{name}_trt/config.pbtxt").max_batch_size
        with TrtRunner(EngineFromPath(str(plan))) as runner:
            parts = [samples[start : start + largest] for start in range(0, len(samples), largest)]
            found = np.concatenate([runner.infer({"INPUT__0": part})["OUTPUT__0"].copy() for part in parts])
            error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
            batch = np.ascontiguousarray(samples[:largest])
            times = []
            for _ in range(50):
                started = time.perf_counter()
                runner.infer({"INPUT__0": batch})
                times.append(time.perf_counter() - started)
        with capsys.disabled():
            print(f"\n{name}: {1e3 * sorted(times)[25]:.2f} ms for a batch of {largest}, relative L2 error {error:.1e}")
        assert error < 5e-2
