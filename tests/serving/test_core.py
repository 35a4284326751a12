"""Triton's core of release 24.10 with models written here: wrong configurations, queues, batches of pictures."""

import contextlib
import json
import os
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from build_tasks.errors import UserError
from build_tasks.serving import triton_server
from build_tasks.serving.check import format_load_result
from build_tasks.serving.triton_client import Client, Tensors
from build_tasks.tensors import Feed
from build_tasks.triton.model_config import to_message
from build_tasks.triton.preprocess_model.preprocessing import preprocess
from tests.support.project import OTHER, ROOT, Project
from tests.triton.test_wrong_configs import PHOTOGRAPHS, PICTURE, write_warm_up_files
from tests.triton.wrong_configs import CORE, WRONG_CONFIGS, Wrong

TENSORS = """
max_batch_size: 8
input { name: "%s" data_type: %s dims: %s }
output { name: "%s" data_type: TYPE_FP32 dims: %s }
"""
NETWORK = TENSORS % ("INPUT__0", "TYPE_FP32", "[3, 160, 160]", "OUTPUT__0", "[10]")
BASES = {
    "torchscript": f'platform: "pytorch_libtorch" {NETWORK}',
    "onnx": f'platform: "onnxruntime_onnx" {NETWORK}',
    "tensorrt": f'platform: "tensorrt_plan" {NETWORK}',
    "preprocess": f'backend: "python" {TENSORS % ("IMAGE", "TYPE_STRING", "[1]", "INPUT__0", "[3, 160, 160]")}',
    "ensemble": f"""platform: "ensemble" {TENSORS % ("IMAGE", "TYPE_STRING", "[1]", "SIZED", "[3, 160, 160]")}
    ensemble_scheduling {{ step {{ model_name: "preprocess" model_version: -1
      input_map {{ key: "IMAGE" value: "IMAGE" }} output_map {{ key: "INPUT__0" value: "SIZED" }} }} }}""",
}
CPU = "instance_group { kind: KIND_CPU }"
PREPROCESSING = {
    "input_size": [3, 160, 160], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "format": "fp32_nchw",
}  # fmt: skip
OUTPUTS = {"preprocess": "INPUT__0", "ensemble": "SIZED"}
PICTURES = Tensors({"IMAGE": "BYTES"}, ["INPUT__0"])


def pictures(*contents: bytes) -> Feed:
    return {"IMAGE": np.array([[content] for content in contents], object)}


RUN = [(f"wrong{index}", wrong) for index, wrong in enumerate(WRONG_CONFIGS) if wrong.source == CORE]
ALONE = [(name, wrong) for name, wrong in RUN if wrong.triton == "never loads"]
TOGETHER = [(name, wrong) for name, wrong in RUN if wrong.triton not in ("never loads", "ends")]
ENDING = [(name, wrong) for name, wrong in RUN if wrong.triton == "ends"]


def write_model(name: str, model_format: str, lines: str = "", pbtxt: str = "") -> None:
    """Write a model of Triton's with the fields of a table [triton.<format>]."""
    folder = Path("model_repository") / name
    (folder / "1").mkdir(parents=True)
    fields = {} if pbtxt else tomllib.loads(lines)
    batch = fields.pop("max_batch_size", 8)
    config = text_format.Parse(f'name: "{name}" {BASES[model_format]}', to_message({}))
    config.max_batch_size = batch
    config.MergeFrom(to_message(fields))
    text = f"{text_format.MessageToString(config)}\n{pbtxt}"
    if "instance_group" not in text and model_format != "ensemble":
        text += CPU
    (folder / "config.pbtxt").write_text(text)
    if model_format == "preprocess":
        for file in ("model.py", "preprocessing.py"):
            shutil.copy(ROOT / "build_tasks/triton/preprocess_model" / file, folder / "1")
        (folder / "1/preprocessing.json").write_text(json.dumps(PREPROCESSING))
    write_warm_up_files(folder / "warmup")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the server's core, and a model of Triton's for each wrong configuration."""
    project = Project(tmp_path_factory.mktemp("wrong") / "project")
    project.model("m", OTHER)
    project.built("tritonserver")
    inside = os.getcwd()
    os.chdir(project.root)
    try:
        write_model("preprocess", "preprocess")
        write_model("profiles", "tensorrt", "instance_group = [{ count = 2, profile = ['0', '1'] }]")
        for name, wrong in RUN:
            write_model(name, wrong.model_format, wrong.lines, wrong.pbtxt)
    finally:
        os.chdir(inside)
    return project


@pytest.fixture(scope="module")
def results(project: Project) -> dict[str, str]:
    """What the server did with each model that does not end it."""
    inside = os.getcwd()
    os.chdir(project.root)
    try:
        with triton_server.start("core", "24.10", triton_server.free_ports(), "build/wrong.log") as server:
            server.is_core = False  # the core gets every config.pbtxt as it is
            assert server.load("preprocess") is None
            with contextlib.closing(Client("HTTP", server.http)) as client:
                profiles = format_load_result(server.load("profiles"))
                return {"profiles": profiles, **{name: result_of(server, client, name) for name, _ in TOGETHER}}
    finally:
        os.chdir(inside)


def result_of(server: triton_server.Server, client: Client, name: str) -> str:
    """Load a model as it is, and send it twenty pictures. Returns "refused: …", "fails: …" or "ignored"."""
    reason = server.load(name)
    result = format_load_result(reason)
    if result.startswith("config accepted"):
        return "ignored"
    if reason is not None:
        return result
    errors = []
    for _ in range(20):
        try:
            client.infer(name, PICTURES, pictures(PICTURE))
        except UserError as error:
            errors.append(str(error))
    return f"fails: {errors[0]}" if errors else "ignored"


def test_the_core_accepts_the_profiles_of_a_plan(results: dict[str, str]) -> None:
    """It checks the field before it looks for a backend. An ONNX model with this field is a row of the table."""
    assert results["profiles"] == "config accepted, but backend tensorrt is not on this machine"


@pytest.mark.parametrize(
    ("name", "wrong"), TOGETHER, ids=[f"{wrong.kind}: {wrong.lines[:60]}" for _, wrong in TOGETHER]
)
def test_the_core_does_what_the_table_says(results: dict[str, str], name: str, wrong: Wrong) -> None:
    kind, _, text = wrong.triton.partition(": ")
    assert results[name].startswith(kind), results[name]
    assert text in results[name]


def test_the_core_loads_a_configuration_of_a_newer_release_without_its_newer_fields(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`doit check` and `doit serve` do that: the core from PyPI is of release 24.10."""
    monkeypatch.chdir(project.root)
    newer = [name for name, wrong in RUN if wrong.kind == "fields of a later release" and wrong.model_format != "onnx"]
    with triton_server.start("core", "26.08", triton_server.free_ports(), "build/newer.log") as server:
        for name in ("preprocess", *newer):
            assert server.load(name) is None
            tensors = PICTURES._replace(output_names=[OUTPUTS[dict(RUN).get(name, RUN[0][1]).model_format]])
            with contextlib.closing(Client("HTTP", server.http)) as client:
                _, (answer,) = client.infer(name, tensors, pictures(PICTURE))
            assert answer.shape == (1, 3, 160, 160)


MEETING = """
import threading
import numpy as np
class PictureError(ValueError): pass
def read(folder): return {}
MEETING = threading.Barrier(2)
def preprocess(picture, settings):
    MEETING.wait(10)  # until another thread prepares a picture
    return np.zeros((3, 160, 160), np.float32)
"""


def test_a_batch_of_pictures_is_prepared_at_once_and_equals_each_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    write_model("meeting", "preprocess")
    bands = {**PREPROCESSING, "input_size": [4, 160, 160], "color": ["bgr", "gray"], "mean": [0.5], "std": [0.5]}
    write_model("bands", "preprocess")
    config = Path("model_repository/bands/config.pbtxt")
    config.write_text(config.read_text().replace("dims: 1\n", "dims: 2\n").replace("dims: 3\n", "dims: 4\n"))
    Path("model_repository/bands/1/preprocessing.json").write_text(json.dumps(bands))
    Path("model_repository/meeting/1/preprocessing.py").write_text(MEETING)
    photographs = [path.read_bytes() for path in sorted(PHOTOGRAPHS.glob("*.jpg"))]
    with (
        triton_server.start("core", "24.10", triton_server.free_ports(), "build/pictures.log") as server,
        contextlib.closing(Client("HTTP", server.http)) as client,
    ):
        assert server.load("preprocess") is None
        assert server.load("meeting") is None
        assert server.load("bands") is None
        _, (answer,) = client.infer("meeting", PICTURES, pictures(b"one", b"two"))
        assert answer.shape == (2, 3, 160, 160)

        _, (batch,) = client.infer("preprocess", PICTURES, pictures(*photographs))
        for photograph, prepared in zip(photographs, batch, strict=True):
            _, (alone,) = client.infer("preprocess", PICTURES, pictures(photograph))
            assert np.array_equal(alone[0], prepared)
        with pytest.raises(
            UserError, match=r"picture 3 of 4: expected a picture in JPEG or PNG, found another content"
        ):
            client.infer("preprocess", PICTURES, pictures(PICTURE, PICTURE, b"none", b"none"))

        samples = [photographs[:2], photographs[2:4]]  # of two pictures each
        _, (batch,) = client.infer("bands", PICTURES, {"IMAGE": np.array(samples, object)})
        for sample, prepared in zip(samples, batch, strict=True):
            assert np.array_equal(preprocess(sample, bands), prepared)


QUEUES = {
    "size": ("dynamic_batching = { default_queue_policy = { max_queue_size = 1 } }", "Exceeds maximum queue size"),
    "timeout": (
        "dynamic_batching = { default_queue_policy = { default_timeout_microseconds = 2000 } }",
        "Request timeout expired",
    ),
}


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("queue", QUEUES)
def test_the_limits_of_a_queue_work_without_batches(
    project: Project, monkeypatch: pytest.MonkeyPatch, queue: str, batch: int
) -> None:
    """Of 32 requests at once to one instance, some are answered, and the others are refused at once."""
    from tritonclient.http import InferenceServerClient, InferInput
    from tritonclient.utils import InferenceServerException

    monkeypatch.chdir(project.root)
    lines, reason = QUEUES[queue]
    name = f"{queue}{batch}"
    if not Path(f"model_repository/{name}").exists():
        write_model(name, "preprocess", f"max_batch_size = {batch}\n{lines}")
    picture = InferInput("IMAGE", [1, 1] if batch else [1], "BYTES")
    picture.set_data_from_numpy(np.array([PICTURE], object).reshape([1, 1] if batch else [1]))
    with triton_server.start("core", "24.10", triton_server.free_ports(), "build/queue.log") as server:
        assert server.load(name) is None
        client = InferenceServerClient(server.http, concurrency=32)
        answered, refused = 0, []
        for pending in [client.async_infer(name, [picture]) for _ in range(32)]:
            try:
                pending.get_result()
                answered += 1
            except InferenceServerException as error:
                refused.append(str(error))
        client.close()
    assert answered
    assert refused
    assert all(reason in message for message in refused)


@pytest.mark.parametrize(("name", "wrong"), ALONE, ids=[wrong.lines[-50:] for _, wrong in ALONE])
def test_a_model_never_loads(project: Project, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Wrong) -> None:
    monkeypatch.chdir(project.root)
    with triton_server.start("core", "24.10", triton_server.free_ports(), "build/alone.log") as server:
        try:
            with contextlib.closing(Client("HTTP", server.http, timeout=5, key=server.key)) as client:
                reason = client.load(name)
        except UserError as error:
            reason = str(error)
        server.process.kill()  # it may hang
        assert reason


@pytest.mark.parametrize(("name", "wrong"), ENDING, ids=[wrong.lines for _, wrong in ENDING])
def test_a_configuration_ends_the_server(
    project: Project, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Wrong
) -> None:
    monkeypatch.chdir(project.root)
    with triton_server.start("core", "24.10", triton_server.free_ports(), "build/ends.log") as server:
        with contextlib.suppress(UserError):
            assert server.load(name) is None
            with contextlib.closing(Client("HTTP", server.http, timeout=20)) as client:
                client.infer(name, PICTURES, pictures(PICTURE))
        assert server.process.wait(20) != 0
