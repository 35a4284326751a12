"""The star test: after each edit exactly the listed tasks run, and then nothing is left to do."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import fakes
from tests.support.project import CONVERTER, OTHER, ROOT, TINY, Project

STAR = TINY.replace(
    "[accuracy]",
    'converter = "convert.py:convert"\n\n[input]\n\n[torchscript]\n\n[onnx]\n\n[accuracy]\nsamples = "samples"',
)

SPEC = "models/tiny/model.toml"
PUBLISHED = "model_repository/tiny"
PUBLISHED_ONNX = "model_repository/tiny_onnx"

MEASURE = ["measure:tiny", "measure:tiny_onnx"]
JUDGED = ["accuracy:tiny", "accuracy:tiny_onnx"]
ACCURACY = [*JUDGED, "summary:tiny"]
ACCURACY_ONNX = ["measure:tiny_onnx", "accuracy:tiny_onnx", "summary:tiny"]
CLIENT = ["client:tiny", "client:tiny_onnx"]
CONFIG = ["config:tiny", "config:tiny_onnx"]
PUBLISH = ["publish:tiny", "publish:tiny_onnx"]
PUBLISH_ALL = [*PUBLISH, "publish:other"]  # the statement names the code that publishes
PREPROCESSED = ["reference:tiny", *MEASURE, *ACCURACY, *CLIENT, *PUBLISH]
SERVED_ONNX = ["config:tiny_onnx", "client:tiny_onnx", "publish:tiny_onnx"]
CAST = [f"{stage}:tiny" for stage in ("cast", "measure", "accuracy", "summary", "config", "client", "publish")]
NETWORK = ["weights:tiny", "reference:tiny", "torchscript:tiny", "onnx:tiny"]  # what makes the module

Edit = Callable[[Project], object]


def spec(old: str, new: str) -> Edit:
    return lambda p: p.edit(SPEC, old, new)


def key(table: str, line: str) -> Edit:
    """Add a key to a table of the spec."""
    return spec(f"[{table}]\n", f"[{table}]\n{line}\n")


def both(first: Edit, second: Edit) -> Edit:
    def edit(project: Project) -> None:
        first(project)
        second(project)

    return edit


def rename(old: str, new: str) -> Edit:
    return lambda p: (p / old).rename(p / new)


def append(path: str, text: str = "\n# edited\n") -> Edit:
    return lambda p: (p / path).write_text((p / path).read_text() + text)


def module(name: str) -> Edit:
    """Edit the source of a module of build_tasks, in a comment."""
    return append(f"build_tasks/{name.replace('.', '/')}.py")


def write(path: str, text: str) -> Edit:
    return lambda p: (p / path).write_text(text)


def delete(path: str) -> Edit:
    return lambda p: (p / path).unlink()


def truncate(path: str) -> Edit:
    return lambda p: os.truncate(p / path, (p / path).stat().st_size // 2)


def corrupt(path: str) -> Edit:
    """Flip a byte in the middle, in place: same size, later mtime."""

    def edit(project: Project) -> None:
        data = bytearray((project / path).read_bytes())
        data[len(data) // 2] ^= 0xFF
        (project / path).write_bytes(data)

    return edit


def replace(path: str) -> Edit:
    """Put another file of the same size, mtime and mode in its place."""

    def edit(project: Project) -> None:
        file = project / path
        status = file.stat()
        draft = file.with_suffix(".draft")
        draft.write_bytes(bytes(status.st_size))
        os.utime(draft, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(draft, file)
        assert file.stat().st_mtime_ns == status.st_mtime_ns

    return edit


def prefix_weights(project: Project) -> None:
    """Give every tensor of the source weights a prefix."""
    from safetensors.torch import load_file, save_file

    path = project / "models/tiny/weights.safetensors"
    save_file({f"net.{key}": tensor for key, tensor in load_file(path).items()}, path)


def scale_a_weight(project: Project) -> None:
    """Change one value of the source weights: the classifier's first bias."""
    import torch
    from safetensors.torch import load_file, save_file

    path = project / "models/tiny/weights.safetensors"
    state = load_file(path)
    state["classifier.bias"] = state["classifier.bias"] + torch.eye(1000)[0]
    save_file(state, path)


def other_picture(project: Project) -> None:
    shutil.copy(ROOT / "build_tasks/verification/photographs/rocket.jpg", project / "models/tiny/samples/coffee.jpg")


def fake_version(distribution: str) -> Edit:
    """Add metadata of another version, in front of the installed one on the path."""

    def edit(project: Project) -> None:
        folder = project / f"{distribution}-99.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 99\n")

    return edit


# Rows that differ from others only in the key, the stage or the file. They run in the long form (pytest -m long).
LONG_FORM = {
    *(
        "what the converter does",
        "architecture.arguments",
        "output",
        "torchscript.precision",
        "build: weights, same size",
    ),
    *("onnx.exporter, the other", "onnx.dynamic_axes", "onnx.external_data"),
    *("module stages.weights", "module verification.gate"),
    *("input.std", "input.interpolation", "input.crop_pct", "input.crop_mode", "torchscript.memory_format"),
    *("input.crop_mode, letterbox with a fill", "input.color", "input.scale", "input.files"),
    *("labels, the same file elsewhere", "onnx.exporter, the one that had won", "onnx.batch_size under dynamic axes"),
    *("accuracy.gate of a format", "accuracy.samples, another picture", "triton.device", "triton.provenance"),
    *(f"module stages.{stage}" for stage in ("labels", "torchscript", "onnx", "summary", "config", "client")),
    *("module runtime.threads", "module formats.pytorch_network", "module formats.torchscript_graph"),
    *("module verification.metrics", "module triton.derived_config", "module triton.repository"),
    *("version of onnxslim", "build: model.pt, replaced", "build: reference, truncated"),
    *("published: model.pt, replaced", "published: labels.txt, same size"),
    *("engine.precision, tf32", "engine.precision, bf16", "engine.keep_io_types", "engine.calibration"),
    *("engine.min_batch_size", "engine.opt_batch_size", "engine.workspace", "engine.sparse_weights"),
    *("engine.profiling_verbosity", "module formats.tensorrt", "module runtime.hardware", "version of nvidia-modelopt"),
    *("build: graph, truncated", "build: model.plan's signature, edited", "build: timing cache, deleted"),
}


def rows(table: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*row, id=name, marks=[pytest.mark.long] * (name in LONG_FORM)) for name, *row in table]


STARS: list[tuple[str, Edit, list[str]]] = [
    # weights
    ("a value of the weights", scale_a_weight, [*NETWORK, *MEASURE, *ACCURACY, *PUBLISH]),
    ("the weights, touched", lambda p: os.utime(p / "models/tiny/weights.safetensors"), []),
    ("weights.source, the same file elsewhere", both(
        rename("models/tiny/weights.safetensors", "models/tiny/w.safetensors"),
        spec("weights.safetensors", "w.safetensors"),
    ), ["weights:tiny", *PUBLISH]),  # with another provenance
    ("a comment in the converter", append("models/tiny/convert.py"), ["weights:tiny", *PUBLISH]),
    ("what the converter does", lambda p: p.edit(
        "models/tiny/convert.py", "dict(state)", "{k: v * 2 if 'classifier' in k else v for k, v in state.items()}"
    ), [*NETWORK, *MEASURE, *ACCURACY, *PUBLISH]),
    ("weights.prefix", both(
        prefix_weights, spec('converter = "convert.py:convert"', 'prefix = "net."')
    ), ["weights:tiny", *PUBLISH]),
    ("a file of the model that nothing names", write("models/tiny/notes.txt", "mine"), []),
    # labels
    ("a label", lambda p: p.edit("models/tiny/labels.txt", "class 7\n", "class seven\n"),
     ["labels:tiny", *CONFIG, *CLIENT, *PUBLISH]),
    ("labels, the same file elsewhere", both(
        rename("models/tiny/labels.txt", "models/tiny/names.txt"), spec("labels.txt", "names.txt")
    ), ["labels:tiny"]),
    # spec
    ("a comment in the spec", append(SPEC), []),
    ("max_batch_size", spec("max_batch_size = 4", "max_batch_size = 5"),
     ["torchscript:tiny", "onnx:tiny", *MEASURE, *CONFIG, *PUBLISH]),
    ("architecture.arguments", key("architecture", "arguments = { drop_rate = 0.5 }"), [*NETWORK, *PUBLISH]),
    ("input.shape", key("input", "shape = [3, 128, 128]"),
     ["reference:tiny", "torchscript:tiny", "onnx:tiny", *MEASURE, *ACCURACY, *CONFIG, *CLIENT,
      *PUBLISH]),
    ("input.mean", key("input", "mean = [0.5, 0.5, 0.5]"), PREPROCESSED),
    ("input.std", key("input", "std = [0.5, 0.5, 0.5]"), PREPROCESSED),
    ("input.interpolation", key("input", 'interpolation = "bilinear"'), PREPROCESSED),
    ("input.crop_pct", key("input", "crop_pct = 0.5"), PREPROCESSED),
    ("input.crop_mode", key("input", 'crop_mode = "squash"'), PREPROCESSED),
    ("input.crop_mode, letterbox with a fill", key("input", 'crop_mode = "letterbox"\nfill = 0'), PREPROCESSED),
    ("input.color", key("input", 'color = "bgr"'), PREPROCESSED),
    ("input.scale", key("input", "scale = 255"), PREPROCESSED),
    ("input.files", key("input", 'files = [".jpg"]'), PREPROCESSED),
    ("onnx.opset", key("onnx", "opset = 16"), ["onnx:tiny", *ACCURACY_ONNX, *SERVED_ONNX]),
    ("onnx.precision", key("onnx", 'precision = "fp16"'),
     ["precision:tiny.fp16", *ACCURACY_ONNX, *SERVED_ONNX]),
    ("onnx.exporter, the one that had won", key("onnx", 'exporter = "torchscript"'),
     ["onnx:tiny", "publish:tiny_onnx"]),
    ("onnx.exporter, the other", key("onnx", 'exporter = "dynamo"\nopset = 18'),
     ["onnx:tiny", *ACCURACY_ONNX, *SERVED_ONNX]),
    ("onnx.batch_size under dynamic axes", key("onnx", "batch_size = 2"), ["onnx:tiny", "publish:tiny_onnx"]),
    ("onnx.dynamic_axes", key("onnx", "dynamic_axes = false"),
     ["onnx:tiny", *ACCURACY_ONNX, *SERVED_ONNX]),
    ("onnx.external_data", key("onnx", "external_data = true"),
     ["onnx:tiny", *ACCURACY_ONNX, "publish:tiny_onnx"]),
    ("torchscript.precision", key("torchscript", 'precision = "fp16"'), CAST),
    ("torchscript.memory_format", key("torchscript", 'memory_format = "channels_last"'), CAST),
    ("torchscript.precision, the default written out", key("torchscript", 'precision = "fp32"'), []),
    ("accuracy.gate", append(SPEC, "[[accuracy.gate]]\nrelative_l2 = 1e-3\n"), [*ACCURACY, *PUBLISH]),
    ("accuracy.gate of a format", append(SPEC, '[[accuracy.gate]]\nformat = "onnx"\ntop1 = 0.5\n'),
     ["accuracy:tiny_onnx", "summary:tiny", "publish:tiny_onnx"]),
    ("accuracy.gate of a precision that is not built", append(
        SPEC, '[[accuracy.gate]]\nprecision = "int8"\ntop1 = 0.5\n'
    ), []),
    ("accuracy.truth", both(
        write("models/tiny/truth.csv", "chelsea.jpg,285\n"), key("accuracy", 'truth = "truth.csv"')
    ), [*MEASURE, *ACCURACY, *PUBLISH]),
    ("accuracy.allow_untestable", spec("allow_untestable = true", "allow_untestable = false"), [*ACCURACY, *PUBLISH]),
    ("accuracy.samples, one more", lambda p: shutil.copy(
        ROOT / "build_tasks/verification/photographs/rocket.jpg", p / "models/tiny/samples"
    ), ["reference:tiny", *MEASURE, *ACCURACY, *PUBLISH]),
    ("accuracy.samples, another picture", other_picture, ["reference:tiny", *MEASURE, *ACCURACY, *PUBLISH]),
    ("[triton]", append(SPEC, "[triton]\ninstance_group = [{ count = 2 }]\n"), [*CONFIG, *PUBLISH]),
    ("[triton] of one format", append(SPEC, "[triton.onnx]\ninstance_group = [{ count = 2 }]\n"),
     ["config:tiny_onnx", "publish:tiny_onnx"]),
    ("sequence_batching of one format", append(SPEC, "[triton.onnx]\nsequence_batching = {}\n"), SERVED_ONNX),
    ("triton.device", append(SPEC, '[triton]\ndevice = "cpu"\n'), [*CONFIG, *PUBLISH]),
    ("triton.device, a GPU", append(SPEC, '[triton]\ndevice = "gpu"\n'),
     [*CAST, "config:tiny_onnx", "publish:tiny_onnx"]),
    ("triton.release", append(SPEC, '[triton]\nrelease = "26.07"\n'), [*CONFIG, *PUBLISH]),
    ("triton.keep_versions", append(SPEC, "[triton]\nkeep_versions = 2\n"), [*CONFIG, *PUBLISH]),
    ("triton.provenance", append(SPEC, "[triton]\nprovenance = false\n"), PUBLISH),
    ("card", append(SPEC, '[card]\nlicense = "MIT"\n'), PUBLISH),
    ("output", append(SPEC, "[output]\nsoftmax = true\n"),
     ["reference:tiny", "torchscript:tiny", "onnx:tiny", *MEASURE, *ACCURACY, *PUBLISH]),
    ("input.format", key("input", 'format = "uint8_nhwc"'),
     ["reference:tiny", "torchscript:tiny", "onnx:tiny", *MEASURE, *ACCURACY, *CONFIG, *CLIENT, *PUBLISH]),
    ("ensemble", spec("max_batch_size = 4", 'max_batch_size = 4\nensemble = "onnx"'), ["preprocess:tiny", *(
        f"{stage}:tiny_{model}" for model in ("preprocess", "ensemble") for stage in ("config", "publish")
    ), "client:tiny_ensemble"]),
    ("[engine] without a format that is compiled", append(SPEC, '[engine]\nprecision = "fp32"\n'), []),
    ("formats, onnx removed", spec('"torchscript", "onnx"', '"torchscript"'), ["summary:tiny", "prune"]),
    ("the spec, removed", lambda p: shutil.rmtree(p / "models/tiny"), ["prune"]),
    # source modules
    ("module stages.weights", module("stages.weights"), ["weights:tiny", "weights:other"]),
    ("module stages.labels", module("stages.labels"), ["labels:tiny"]),
    ("module stages.torchscript", module("stages.torchscript"), ["torchscript:tiny", "torchscript:other"]),
    ("module stages.onnx", module("stages.onnx"), ["onnx:tiny"]),
    ("module stages.measure", module("stages.measure"), [*MEASURE, "measure:other"]),
    ("module runtime.threads", module("runtime.threads"), [
        "reference:tiny", "reference:other", *MEASURE, "measure:other"
    ]),
    ("module verification.gate", module("verification.gate"), [
        *ACCURACY, "accuracy:other", "summary:other", *PUBLISH_ALL
    ]),
    ("module stages.summary", module("stages.summary"), ["summary:tiny", "summary:other"]),
    ("modules stages.layers and stages.repair, which run on demand", both(
        module("stages.layers"), module("stages.repair")
    ), []),
    ("module stages.config", module("stages.config"), [*CONFIG, "config:other"]),
    ("module stages.client", module("stages.client"), [*CLIENT, "client:other"]),
    ("template of clients", append("build_tasks/stages/templates/client.py.j2"), [*CLIENT, "client:other"]),
    ("module stages.publish", module("stages.publish"), PUBLISH_ALL),
    ("module formats.onnx_export", module("formats.onnx_export"), ["onnx:tiny"]),
    ("module formats.onnx_runtime", module("formats.onnx_runtime"), ["onnx:tiny", "measure:tiny_onnx"]),
    ("module formats.pytorch_network", module("formats.pytorch_network"), [
        *NETWORK, "weights:other", "reference:other", "torchscript:other"
    ]),
    ("module formats.torchscript_graph", module("formats.torchscript_graph"),
     ["torchscript:tiny", "torchscript:other"]),
    ("module verification.metrics", module("verification.metrics"),
     [*MEASURE, *ACCURACY, "measure:other", "accuracy:other", "summary:other", *PUBLISH_ALL]),
    ("module triton.derived_config", module("triton.derived_config"), [*CONFIG, "config:other"]),
    ("module triton.repository", module("triton.repository"), [*CONFIG, "config:other", *PUBLISH_ALL]),
    ("modules that only decide how stages run", both(
        module("doit_plugin.reporter"), both(module("runtime.worker"), module("json_files"))
    ), []),
    ("module report.charts", module("report.charts"), []),
    # tools
    ("version of onnxslim", fake_version("onnxslim"), ["onnx:tiny", "publish:tiny_onnx"]),
    ("version of tritonclient", fake_version("tritonclient"), [*CONFIG, "config:other"]),
    ("version of a package that no stage uses", fake_version("pytest"), []),
    # targets in build/
    ("build: weights, same size", corrupt("build/tiny/weights.safetensors"), ["weights:tiny"]),
    ("build: model.pt, deleted", delete("build/tiny/model.pt"), ["torchscript:tiny"]),
    ("build: model.pt, replaced", replace("build/tiny/model.pt"), ["torchscript:tiny"]),
    ("build: model.onnx, truncated", truncate("build/tiny/model.onnx"), ["onnx:tiny"]),
    ("build: reference, truncated", truncate("build/tiny/reference.json"), ["reference:tiny"]),
    ("build: config.pbtxt, edited", append("build/tiny/model.pt.config.pbtxt"), ["config:tiny"]),
    ("build: figures, edited", append("build/tiny/model.onnx.measured.json"), ["measure:tiny_onnx"]),
    ("build: verdict, deleted", delete("build/tiny/model.onnx.verdict.json"), ["accuracy:tiny_onnx"]),
    ("build: deleted as a whole", both(
        lambda p: shutil.rmtree(p / "build/tiny"), lambda p: shutil.rmtree(p / PUBLISHED)
    ), [*NETWORK, "labels:tiny", *MEASURE, *ACCURACY, *CONFIG, *CLIENT, "publish:tiny"]),
    # targets in model_repository/
    ("published: model.pt, deleted", delete(f"{PUBLISHED}/1/model.pt"), ["publish:tiny"]),
    ("published: model.pt, replaced", replace(f"{PUBLISHED}/1/model.pt"), ["publish:tiny"]),
    ("published: model.onnx, truncated", truncate(f"{PUBLISHED_ONNX}/1/model.onnx"), ["publish:tiny_onnx"]),
    ("published: labels.txt, same size", corrupt(f"{PUBLISHED}/labels.txt"), ["publish:tiny"]),
    ("published: config.pbtxt, edited", append(f"{PUBLISHED}/config.pbtxt"), ["publish:tiny"]),
    ("published: a file too many", write(f"{PUBLISHED}/1/model.bak", "x"), ["publish:tiny"]),
    ("published: bytecode, which a Python model would run", both(
        lambda p: (p / f"{PUBLISHED}/1/__pycache__").mkdir(), write(f"{PUBLISHED}/1/__pycache__/model.pyc", "x")
    ), ["publish:tiny"]),
    ("published: the folder, deleted", lambda p: shutil.rmtree(p / PUBLISHED_ONNX), ["publish:tiny_onnx"]),
    ("published: a folder beside it, created by hand", both(
        lambda p: (p / "model_repository/mine").mkdir(), write("model_repository/mine/config.pbtxt", 'name: "mine"\n')
    ), []),
]  # fmt: skip


def project_of(folder: Path, spec: str, weights: Path) -> Project:
    """A project with the model `tiny` of this spec, and all files that the spec names."""
    project = Project(folder / "project")
    labels = "".join(f"class {index}\n" for index in range(1000))
    model = project.model("tiny", spec, convert_py=CONVERTER, labels_txt=labels)
    shutil.copy(weights, model)
    (model / "samples").mkdir()
    for picture in ("brick.jpg", "camera.jpg", "chelsea.jpg", "coffee.jpg", "grass.jpg"):
        shutil.copy(ROOT / f"build_tasks/verification/photographs/{picture}", model / "samples")
    return project


def assert_predicted(plan: dict[str, list[str]], ran: list[str], failed: Sequence[str] = ()) -> None:
    """All tasks that were to run did so, unless one failed; and no task ran that the plan did not list."""
    assert {*ran, *failed} <= {*plan["to run"], *plan["may run"]}
    if not failed:
        assert {*plan["to run"]} <= {*ran}


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Project:
    project = project_of(tmp_path_factory.mktemp("star"), STAR, tiny_weights)
    project.model("other", OTHER)
    project.built()
    return project


def test_nothing_runs_twice(star: Project) -> None:
    assert star.built().ran == []
    assert star.plan() == {"to run": [], "may run": [], "not for this machine": [], "ignored": []}


@pytest.mark.parametrize(("edit", "expected"), rows(STARS))
def test_an_edit_runs_exactly_the_tasks_it_touches(
    star: Project, copy_of: Callable[[Project], Project], edit: Edit, expected: list[str]
) -> None:
    project = copy_of(star)
    edit(project)
    plan = project.plan()
    assert project.built().ran == sorted(expected)
    assert_predicted(plan, expected)
    assert project.built().ran == [], "the second run has nothing left to do"


# Engines, built with a fake TensorRT and a fake GPU (see tests/support/fakes). Without CUDA a plan is neither judged
# nor published, so that only the tasks up to its config are requested.
ENGINE_STAR = STAR.replace('formats = ["torchscript", "onnx"]', 'formats = ["torchscript", "onnx", "tensorrt", "rtx"]')
ENGINE_STAR += """
[[accuracy.gate]]
precision = "int8"
top1 = 0
top5 = 0

[[accuracy.gate]]
precision = "fp8"
top1 = 0
top5 = 0

[engine]
"""
ENGINE_TASKS = ["engine:tiny", "rtx:tiny", "config:tiny_trt", *PUBLISH]

ENGINES = ["engine:tiny", "rtx:tiny"]
ENGINES_AND_CONFIG = [*ENGINES, "config:tiny_trt"]  # the signature changes as well


def converted(precision: str) -> list[str]:
    return [f"{stage}:tiny.{precision}" for stage in ("precision", "measure", "accuracy")]


ENGINE_STARS: list[tuple[str, Edit, list[str], list[str]]] = [
    # the graph
    ("engine.precision, fp32", key("engine", 'precision = "fp32"'), ENGINES_AND_CONFIG, []),
    ("engine.precision, tf32", key("engine", 'precision = "tf32"'), ENGINES_AND_CONFIG, []),
    ("engine.precision, bf16", key("engine", 'precision = "bf16"'), [*converted("bf16"), *ENGINES_AND_CONFIG], []),
    ("engine.precision, int8", key("engine", 'precision = "int8"'), [*converted("int8"), *ENGINES_AND_CONFIG], []),
    ("engine.precision, fp8, which this GPU does not support", key("engine", 'precision = "fp8"'),
     [*converted("fp8"), "rtx:tiny"], ["engine:tiny"]),
    ("engine.keep_fp32", key("engine", 'keep_fp32 = ["Gemm"]'),
     [*converted("fp16"), *ENGINES], []),
    ("engine.keep_io_types", key("engine", "keep_io_types = false"), [*converted("fp16"), *ENGINES_AND_CONFIG], []),
    ("engine.calibration", key("engine", 'precision = "int8"\ncalibration = "samples"'),
     [*converted("int8"), *ENGINES_AND_CONFIG], []),
    ("accuracy.gate of the precision", append(SPEC, '[[accuracy.gate]]\nprecision = "fp16"\nrelative_l2 = 0.04\n'),
     ["accuracy:tiny.fp16"], []),
    ("engine.repair, where the gate holds", key("engine", "repair = true"), ["repair:tiny", "precision:tiny.fp16"], []),
    ("a lock file for another precision", write("models/tiny/keep_fp32.lock", "[int8]\nkeep_fp32 = []\n"),
     ["precision:tiny.fp16"], []),
    # the profile
    ("engine.min_batch_size", key("engine", "min_batch_size = 2"), ENGINES_AND_CONFIG, []),
    ("engine.opt_batch_size", key("engine", "opt_batch_size = 2"), ENGINES_AND_CONFIG, []),
    ("engine.max_batch_size", key("engine", "max_batch_size = 7"), ENGINES_AND_CONFIG, []),
    ("engine.profiles", append(SPEC, "\n[[engine.profiles]]\n[[engine.profiles]]\nmax_batch_size = 1\n"),
     ENGINES_AND_CONFIG, []),
    ("engine.max_batch_size, the default written out", key("engine", "max_batch_size = 4"), [], []),
    ("input.min_size and max_size", key(
        "input", "shape = [3, 160, 160]\nmin_size = [128, 128]\nmax_size = [192, 192]"
    ), ["reference:tiny", "torchscript:tiny", "onnx:tiny", *MEASURE, *JUDGED, *CONFIG, *PUBLISH, *converted("fp16"),
        *ENGINES_AND_CONFIG], []),
    # the builder
    ("engine.workspace", key("engine", "workspace = 1024"), ENGINES, []),
    ("engine.optimization_level", key("engine", "optimization_level = 1"), ENGINES, []),
    ("engine.sparse_weights", key("engine", "sparse_weights = true"), ENGINES, []),
    ("engine.refittable", key("engine", "refittable = true"), [], ENGINES),
    ("engine.profiling_verbosity", key("engine", 'profiling_verbosity = "detailed"'), ENGINES, []),
    # TensorRT alone
    ("engine.hardware_compatibility", key("engine", 'hardware_compatibility = "ampere_plus"'), ["engine:tiny"], []),
    ("engine.version_compatible", key("engine", "version_compatible = true"), [], ["engine:tiny"]),
    ("engine.timing_cache", both(write("models/tiny/timing.cache", ""), key("engine", 'timing_cache = "timing.cache"')),
     ["engine:tiny"], []),
    # TensorRT-RTX alone
    ("engine.rtx_compute_capabilities", key("engine", 'rtx_compute_capabilities = ["8.6"]'), ["rtx:tiny"], []),
    # source modules and tools
    ("module stages.precision", module("stages.precision"), ["precision:tiny.fp16"], []),
    ("module stages.engine", module("stages.engine"), ENGINES, []),
    ("module formats.reduced_precision", module("formats.reduced_precision"), ["precision:tiny.fp16"], []),
    ("module formats.layer_errors", module("formats.layer_errors"), ["accuracy:tiny.fp16"], []),
    ("module formats.onnx_files, which compiles nothing anew", module("formats.onnx_files"),
     ["onnx:tiny", "measure:tiny_onnx", *converted("fp16")], []),
    ("module formats.tensorrt", module("formats.tensorrt"), ENGINES, []),
    ("module runtime.hardware", module("runtime.hardware"), ENGINES, []),
    ("version of nvidia-modelopt", fake_version("nvidia_modelopt"), ["precision:tiny.fp16"], []),
    ("version of polygraphy", fake_version("polygraphy"),
     ["reference:tiny", *MEASURE, "measure:tiny.fp16", *ENGINES], []),
    ("version of TensorRT-RTX", fake_version("tensorrt_rtx_cu13"), ["rtx:tiny"], []),
    # targets in build/
    ("build: graph, truncated", truncate("build/tiny/model.fp16.onnx"), ["precision:tiny.fp16"], []),
    ("build: verdict of the graph, deleted", delete("build/tiny/model.fp16.onnx.verdict.json"),
     ["accuracy:tiny.fp16"], []),
    ("build: model.plan, replaced", replace("build/tiny/model.plan"), ["engine:tiny"], []),
    ("build: model.plan's signature, edited", append("build/tiny/model.plan.signature.json"), ["engine:tiny"], []),
    ("build: model.rtx, same size", corrupt("build/tiny/model.rtx"), ["rtx:tiny"], []),
    ("build: timing cache, deleted", lambda p: shutil.rmtree(p / "build/.timing"), [], []),
]  # fmt: skip

# What a plan depends on besides its inputs, and the figures of what a GPU serves. Engines of TensorRT-RTX and all
# earlier tasks do not depend on it.
OTHER_GPU = ["config:tiny_trt", "engine:tiny", "measure:tiny"]
MACHINES: list[tuple[str, dict[str, str], list[str]]] = [
    ("another GPU of the same kind", {"gpus": "NVIDIA RTX A6000, 8.6"}, OTHER_GPU),
    ("another compute capability", {"gpus": "NVIDIA RTX A4000, 8.9"}, OTHER_GPU),
    ("another TensorRT", {"tensorrt": "11.2.1"}, ["config:tiny_trt", "engine:tiny"]),
    ("a second GPU", {"gpus": f"{fakes.GPU}; NVIDIA L4, 8.9"}, []),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine_star(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Project:
    project = project_of(tmp_path_factory.mktemp("engine_star"), ENGINE_STAR, tiny_weights)
    project.built(*ENGINE_TASKS, **fakes.machine(project.root.parent, cuda=fakes.CUDA))
    return project


def without_torch(tasks: list[str]) -> bool:
    """Whether these tasks run without torch. Then the test hides it, which saves time and shows that none needs it."""
    with_torch = {"weights", "reference", "torchscript", "onnx", "repair", "precision"}
    return with_torch.isdisjoint(task.partition(":")[0] for task in tasks) and "measure:tiny" not in tasks


@pytest.mark.parametrize(("edit", "expected", "failed"), rows(ENGINE_STARS))
def test_an_edit_compiles_exactly_what_it_touches(
    engine_star: Project, copy_of: Callable[[Project], Project], edit: Edit, expected: list[str], failed: list[str]
) -> None:
    project = copy_of(engine_star)
    edit(project)
    machine = fakes.machine(project.root.parent, torch=not without_torch(expected))
    plan = project.plan(*ENGINE_TASKS, **machine)
    run = project.doit(*ENGINE_TASKS, **machine)
    assert (run.ran, run.failed) == (sorted(expected), sorted(failed)), run.out
    assert_predicted(plan, expected, failed)
    if not failed:
        assert project.built(*ENGINE_TASKS, **machine).ran == [], "the second run has nothing left to do"


@pytest.mark.parametrize(("gpu_or_version", "expected"), [m[1:] for m in MACHINES], ids=[m[0] for m in MACHINES])
def test_another_machine_compiles_plans_anew_and_nothing_before_them(
    engine_star: Project, copy_of: Callable[[Project], Project], gpu_or_version: dict[str, Any], expected: list[str]
) -> None:
    project = copy_of(engine_star)
    machine = fakes.machine(project.root.parent, torch=not without_torch(expected), cuda=fakes.CUDA, **gpu_or_version)
    plan = project.plan(*ENGINE_TASKS, **machine)
    assert project.built(*ENGINE_TASKS, **machine).ran == expected
    assert_predicted(plan, expected)
    assert project.built(*ENGINE_TASKS, **machine).ran == []


def test_compute_capabilities_are_a_plan_each(engine_star: Project, copy_of: Callable[[Project], Project]) -> None:
    """The task then has the name of the plan. Tasks before it do not run."""
    project = copy_of(engine_star)
    machine = fakes.machine(project.root.parent, torch=False)
    key("engine", 'compute_capabilities = ["8.6"]')(project)
    tasks = ["engine", *ENGINE_TASKS[1:]]
    assert project.built(*tasks, **machine).ran == ["config:tiny_trt", "engine:tiny.sm86"]
    assert project.built(*tasks, **machine).ran == []


def test_what_cuda_sees_first_is_the_gpu_of_a_plan(engine_star: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(engine_star)
    machine = fakes.machine(project.root.parent, gpus=f"NVIDIA L4, 8.9; {fakes.GPU}", cuda=fakes.CUDA)
    assert project.built(*ENGINE_TASKS, CUDA_VISIBLE_DEVICES="1,0", **machine).ran == []
    assert project.built(*ENGINE_TASKS, CUDA_VISIBLE_DEVICES="GPU-1a", **machine).ran == []
    run = project.built(*ENGINE_TASKS, CUDA_VISIBLE_DEVICES="0", **machine)
    assert run.ran == OTHER_GPU
    assert "GPU: NVIDIA RTX A4000 -> NVIDIA L4" in run.out


def test_other_pictures_calibrate_anew(engine_star: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(engine_star)
    machine = fakes.machine(project.root.parent)
    key("engine", 'precision = "int8"')(project)
    project.built("rtx:tiny", **machine)
    (project / "models/tiny/pictures").mkdir()
    shutil.copy(ROOT / "build_tasks/verification/photographs/rocket.jpg", project / "models/tiny/pictures")
    key("engine", 'calibration = "pictures"')(project)
    assert project.built("rtx:tiny", **machine).ran == sorted([*converted("int8"), "rtx:tiny"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("version_compatible = true", "Unable to load library: libnvinfer_lean.so"),
        ("refittable = true", "CHECK(status == CUDA_SUCCESS) failed"),
        ("workspace = 1", "no tactics to implement the operation within workspace limit"),
    ],
)
def test_of_several_errors_the_builders_own_is_reported(
    engine_star: Project, copy_of: Callable[[Project], Project], line: str, reason: str
) -> None:
    """The first errors are about CUDA, which is not installed; the last one is the reason why there is no engine."""
    project = copy_of(engine_star)
    key("engine", line)(project)
    run = project.doit("engine:tiny", **fakes.machine(project.root.parent, torch=False))
    assert run.failed == ["engine:tiny"]
    assert reason in run.out
