"""Ragged batches from a spec: built from an ONNX file, and answered by Triton's core as each request alone."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from build_tasks.serving import triton_server
from build_tasks.triton.model_config import protobuf
from tests.serving.test_core_tensors import infer
from tests.support import core_server
from tests.support.project import ROOT, Project, failure_line

SPEC = """\
formats = ["onnx"]
max_batch_size = 8
[weights]
source = "sums.onnx"
[[inputs]]
name = "VALUES"
shape = ["length"]
ragged = true
[[inputs]]
name = "ENDS"
dtype = "int32"
shape = []
[dimensions.length]
max = 5
[[outputs]]
name = "TOTAL"
[[outputs]]
name = "DOUBLE"
[triton.onnx.dynamic_batching]
max_queue_delay_microseconds = 300000
preferred_batch_size = [3]
[[triton.onnx.batch_input]]
kind = "BATCH_ACCUMULATED_ELEMENT_COUNT"
target_name = ["ENDS"]
data_type = "TYPE_INT32"
source_input = ["VALUES"]
[[triton.onnx.batch_output]]
target_name = ["DOUBLE"]
source_input = ["VALUES"]
"""


def write_sums(path: Path) -> None:
    """VALUES (values), ENDS (batch) -> TOTAL (batch, 1), the sum of each request; DOUBLE (values), each value twice."""
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("CumSum", ["VALUES", "zero"], "sums", {}),
        ("Sub", ["ENDS", "one"], "last", {}),
        ("Gather", ["sums", "last"], "upto", {}),
        ("Slice", ["upto", "start", "end"], "before", {}),
        ("Concat", ["nothing", "before"], "shifted", {"axis": 0}),
        ("Sub", ["upto", "shifted"], "total", {}),
        ("Unsqueeze", ["total", "axis"], "TOTAL", {}),
        ("Add", ["VALUES", "VALUES"], "DOUBLE", {}),
    ]
    constants = {
        "zero": np.int32(0), "one": np.int32(1), "axis": np.array([1]), "start": np.array([0]), "end": np.array([-1]),
        "nothing": np.zeros(1, np.float32),
    }  # fmt: skip
    f, i = TensorProto.FLOAT, TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output], **more) for kind, inputs, output, more in nodes],
        "sums",
        [helper.make_tensor_value_info("VALUES", f, ["values"]), helper.make_tensor_value_info("ENDS", i, ["batch"])],
        [
            helper.make_tensor_value_info("TOTAL", f, ["batch", 1]),
            helper.make_tensor_value_info("DOUBLE", f, ["values"]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("ragged") / "project")
    write_sums(project.model("sums", SPEC) / "sums.onnx")
    project.built()
    return project


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[triton_server.Server]:
    with core_server.serving(project) as running:
        assert running.load("sums_onnx") is None
        yield running


def parsed(path: Path) -> Any:
    config = text_format.Parse(path.read_text(), protobuf().ModelConfig())
    config.ClearField("parameters")  # the provenance
    return config


def test_the_config_and_the_files_are_those_of_a_ragged_batch(project: Project) -> None:
    golden = ROOT / "tests/triton/golden/sums_onnx.pbtxt"
    assert parsed(project / "model_repository/sums_onnx/config.pbtxt") == parsed(golden)
    signature = json.loads((project / "build/sums/model.onnx.signature.json").read_text())
    assert {each["name"]: each["shape"] for each in (*signature["inputs"], *signature["outputs"])} == {
        "VALUES": [-1], "ENDS": [-1], "TOTAL": [-1, 1], "DOUBLE": [-1],
    }  # fmt: skip
    measured = json.loads((project / "build/sums/model.onnx.measured.json").read_text())
    assert measured["outputs"].keys() == {"TOTAL", "DOUBLE"}
    assert all(max(output["errors"]) < 1e-5 for output in measured["outputs"].values())


def test_triton_answers_requests_of_several_lengths_in_one_batch(
    project: Project, server: triton_server.Server
) -> None:
    rows = [np.arange(length, dtype=np.float32)[None] + length for length in (3, 1, 5)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda row: infer(server, "sums_onnx", {"VALUES": row}), rows))
    assert answers == [{"TOTAL": [[row.sum()]], "DOUBLE": (2 * row).tolist()} for row in rows]
    run = project.built("smoke", f"--url={server.http}", f"--grpc={server.grpc}")
    assert run.out.count(" ok\n") == 2, run.out
    np.savez(project / "batch.npz", VALUES=np.concatenate([rows[0], rows[0] + 1]))
    client = project / "build/sums/clients/sums_onnx/http_client.py"
    command = [sys.executable, str(client), "--url", server.http]
    assert "ENDS" not in subprocess.run([*command, "--help"], text=True, capture_output=True).stdout
    np.save(project / "batch.npy", np.concatenate([rows[0], rows[0] + 1]))
    sent = subprocess.run([*command, str(project / "batch.npy")], text=True, capture_output=True)
    assert sent.stdout.split("\n")[:2] == ["TOTAL [[12.]", " [15.]]"], sent.stdout + sent.stderr


@pytest.mark.parametrize(
    ("old", "new", "task", "line"),
    [
        (
            "BATCH_ACCUMULATED_ELEMENT_COUNT", "BATCH_ELEMENT_COUNT", "onnx:sums",
            "the output TOTAL of a request changes with the others in its batch, of [5], [1], [3]: does the network "
            "cut the values as batch_input in [triton.onnx] counts them?",
        ),
        (
            '[[triton.onnx.batch_output]]\ntarget_name = ["DOUBLE"]\nsource_input = ["VALUES"]\n', "", "weights:sums",
            "expected a row for each, or a batch_output in [triton.onnx] that names it",
        ),
    ],
)  # fmt: skip
def test_a_network_that_mixes_requests_is_refused(project: Project, old: str, new: str, task: str, line: str) -> None:
    spec = project / "models/sums/model.toml"
    try:
        project.edit("models/sums/model.toml", old, new)
        assert line in failure_line(project.doit("onnx:sums"), task)
    finally:
        spec.write_text(SPEC)
