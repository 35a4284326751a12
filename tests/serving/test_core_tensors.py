"""Triton's core answers models whose tensors Triton itself fills, keeps, reshapes or gathers from several requests.

The ModelConfigs are derived from [triton] of a spec. A stub stands in for ONNX Runtime's backend.
"""

import contextlib
import json
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_tasks.serving import triton_server
from build_tasks.serving.triton_client import Client, cast_to_input_types
from build_tasks.triton.derived_config import ConfigSettings, derive, to_text
from build_tasks.triton.derived_tensors import ClientView
from build_tasks.triton.warm_up_data import write_files
from tests.support import core_server
from tests.support.project import OTHER, Project

F, I32, I64, B = 1, 6, 7, 9  # of onnx.TensorProto

# By name of the model: inputs, outputs, nodes (operator, inputs, outputs, attributes), constants, views, [triton.onnx].
# A shape begins with the batch; the values of a ragged input are in one row.
NETWORKS: dict[str, dict[str, Any]] = {
    "sum": {
        "inputs": {"X": (F, ["b", 2]), "START": (I32, ["b", 1]), "ID": (I64, ["b", 1]), "OLD": (F, ["b", 2])},
        "outputs": {"Y": (F, ["b", 2]), "FLAGS": (F, ["b", 2]), "NEW": (F, ["b", 2])},
        "nodes": [
            ("Add", ["X", "OLD"], "NEW", {}),
            ("Identity", ["NEW"], "Y", {}),
            ("Cast", ["START"], "start", {"to": F}),
            ("Cast", ["ID"], "id", {"to": F}),
            ("Concat", ["start", "id"], "FLAGS", {"axis": 1}),
        ],
        "triton": """
            [sequence_batching]
            control_input = [
                { name = "START", control = [{ kind = "CONTROL_SEQUENCE_START", int32_false_true = [0, 1] }] },
                { name = "ID", control = [{ kind = "CONTROL_SEQUENCE_CORRID", data_type = "TYPE_INT64" }] },
            ]
            [[sequence_batching.state]]
            input_name = "OLD"
            output_name = "NEW"
            data_type = "TYPE_FP32"
            dims = [2]
            initial_state = [{ name = "first", data_type = "TYPE_FP32", dims = [2], data_file = "first.bin" }]
        """,
    },
    "ragged": {
        "inputs": {"X": (F, ["values"]), "ENDS": (I32, ["b"])},
        "outputs": {"TOTAL": (F, ["b", 1]), "DOUBLE": (F, ["values"])},
        "nodes": [
            ("CumSum", ["X", "zero"], "sums", {}),
            ("Sub", ["ENDS", "one"], "last", {}),
            ("Gather", ["sums", "last"], "total", {}),
            ("Unsqueeze", ["total", "axis"], "TOTAL", {}),
            ("Add", ["X", "X"], "DOUBLE", {}),
        ],
        "constants": {"zero": np.int32(0), "one": np.int32(1), "axis": np.array([1])},
        "views": {"X": ClientView(ragged=True)},
        "triton": """
            instance_group = [{ count = 1, kind = "KIND_CPU" }]
            dynamic_batching = { max_queue_delay_microseconds = 300000, preferred_batch_size = [3] }
            [[batch_input]]
            kind = "BATCH_ACCUMULATED_ELEMENT_COUNT"
            target_name = ["ENDS"]
            data_type = "TYPE_INT32"
            source_input = ["X"]
            [[batch_output]]
            kind = "BATCH_SCATTER_WITH_INPUT_SHAPE"
            target_name = ["DOUBLE"]
            source_input = ["X"]
        """,
    },
    "reshaped": {
        "inputs": {"X": (F, ["b", 2, "n"]), "S": (F, ["b"])},
        "outputs": {"Y": (F, ["b", "n", 2])},
        "nodes": [("Reshape", ["S", "ones"], "s", {}), ("Mul", ["X", "s"], "scaled", {}),
                  ("Transpose", ["scaled"], "Y", {"perm": [0, 2, 1]})],
        "constants": {"ones": np.array([-1, 1, 1])},
        "views": {"X": ClientView([1, 2, -1, 1]), "Y": ClientView([-1, 1, 2])},
        "triton": "",
    },
    "shifted": {
        # A warm-up with zeros would be an index that the network does not have, so that the model would not load.
        "inputs": {"X": (I64, ["b", 2]), "M": (B, ["b", 2]), "W": (F, ["b", 1])},
        "outputs": {"Y": (F, ["b", 2]), "Z": (F, ["b", 1])},
        "nodes": [("Sub", ["X", "first"], "place", {}), ("Gather", ["table", "place"], "Y", {}),
                  ("Identity", ["W"], "Z", {})],
        "constants": {"first": np.int64(100), "table": np.array([3, 4], np.float32)},
        "triton": "",
        "warm_up": {"X": 101, "M": True, "W": 0.5},
    },
    "unbatched": {
        "inputs": {"X": (F, ["b", "n"])},
        "outputs": {"Y": (F, ["b"])},
        "nodes": [("ReduceSum", ["X", "axis"], "Y", {"keepdims": 0})],
        "constants": {"axis": np.array([1])},
        "triton": "max_batch_size = 0",
    },
}  # fmt: skip


def write_network(path: Path, network: dict[str, Any]) -> None:
    import onnx
    from onnx import helper, numpy_helper

    values = {
        kind: [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in network[kind].items()]
        for kind in ("inputs", "outputs")
    }
    nodes = [helper.make_node(kind, inputs, [output], **more) for kind, inputs, output, more in network["nodes"]]
    constants = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in network.get("constants", {}).items()
    ]
    graph = helper.make_graph(nodes, "g", values["inputs"], values["outputs"], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def signature_of(network: dict[str, Any]) -> Any:
    dtypes = {F: "float32", I32: "int32", I64: "int64", B: "bool"}
    tensors = {
        kind: [
            {"name": name, "dtype": dtypes[dtype], "shape": [-1 if isinstance(dim, str) else dim for dim in shape]}
            for name, (dtype, shape) in network[kind].items()
        ]
        for kind in ("inputs", "outputs")
    }
    return {**tensors, "smallest_batch": 1, "largest_batch": None}


def settings_of(name: str, network: dict[str, Any]) -> ConfigSettings:
    fields = tomllib.loads(network["triton"])
    # Warm-up requests of open dims need their lengths, which [dimensions] of a spec would have.
    values = network.get("warm_up", {})
    fields = {**({} if values else {"model_warmup": False}), **fields}
    return ConfigSettings(
        name=name, model_format="onnx", spec="models/m/model.toml", triton=fields, release="26.08", device="cpu",
        keep_versions=1, max_batch_size=fields.get("max_batch_size", 8), views=network.get("views", {}),
        warm_up_values=values,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[triton_server.Server]:
    project = Project(tmp_path_factory.mktemp("tensors") / "project")
    project.model("m", OTHER)
    for name, network in NETWORKS.items():
        folder = project / f"model_repository/{name}"
        (folder / "1").mkdir(parents=True)
        (folder / "initial_state").mkdir()
        (folder / "initial_state/first.bin").write_bytes(np.array([10, 20], np.float32).tobytes())
        write_network(folder / "1/model.onnx", network)
        config = derive(signature_of(network), {}, settings_of(name, network))
        (folder / "config.pbtxt").write_text(to_text(config))
        write_files(config, network.get("warm_up", {}), f"{folder}/warmup")
    with core_server.serving(project) as running:
        for name in NETWORKS:
            assert running.load(name) is None
        yield running


def infer(server: triton_server.Server, name: str, inputs: dict[str, np.ndarray], **flags: Any) -> dict[str, Any]:
    """Send one request, and return the outputs as lists."""
    from tritonclient.http import InferenceServerClient, InferInput
    from tritonclient.utils import np_to_triton_dtype

    tensors = [InferInput(key, list(value.shape), np_to_triton_dtype(value.dtype)) for key, value in inputs.items()]
    for tensor, value in zip(tensors, inputs.values(), strict=True):
        tensor.set_data_from_numpy(value)
    with contextlib.closing(InferenceServerClient(server.http)) as client:
        result = client.infer(name, tensors, **flags)
    return {each["name"]: result.as_numpy(each["name"]).tolist() for each in result.get_response()["outputs"]}


def test_triton_keeps_the_state_of_each_sequence_and_fills_its_controls(server: triton_server.Server) -> None:
    def send(sequence: int, value: float, *, start: bool = False, end: bool = False) -> dict[str, Any]:
        batch = np.full((1, 2), value, np.float32)
        return infer(server, "sum", {"X": batch}, sequence_id=sequence, sequence_start=start, sequence_end=end)

    assert send(7, 1, start=True) == {"Y": [[11, 21]], "FLAGS": [[1, 7]]}, "the state begins as its file says"
    assert send(8, 5, start=True) == {"Y": [[15, 25]], "FLAGS": [[1, 8]]}
    assert send(7, 2) == {"Y": [[13, 23]], "FLAGS": [[0, 7]]}
    assert send(7, 3, end=True) == {"Y": [[16, 26]], "FLAGS": [[0, 7]]}
    assert send(7, 1, start=True, end=True) == {"Y": [[11, 21]], "FLAGS": [[1, 7]]}


def test_requests_of_several_lengths_form_one_batch(server: triton_server.Server) -> None:
    rows = [np.arange(length, dtype=np.float32)[None] + length for length in (3, 1, 5)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda row: infer(server, "ragged", {"X": row}), rows))
    # Each network's own answer for a batch of one would be the same, but for the batch, whose sums accumulate.
    totals = [answer["TOTAL"][0][0] for answer in answers]
    assert max(totals) == sum(row.sum() for row in rows)
    assert [answer["DOUBLE"] for answer in answers] == [(2 * row).tolist() for row in rows]


def test_clients_see_the_dims_of_the_spec(server: triton_server.Server) -> None:
    batch = np.arange(12, dtype=np.float32).reshape(2, 1, 2, 3, 1)
    answer = infer(server, "reshaped", {"X": batch, "S": np.array([[1], [10]], np.float32)})
    expected = (batch.reshape(2, 2, 3) * np.array([1, 10]).reshape(2, 1, 1)).transpose(0, 2, 1).reshape(2, 3, 1, 2)
    assert answer == {"Y": expected.tolist()}
    network = {"X": batch.reshape(2, 2, 3), "S": np.array([1, 10], np.float32)}
    for protocol, url in (("HTTP", server.http), ("gRPC", server.grpc)):
        with contextlib.closing(Client(protocol, url)) as client:  # what `smoke` and `bench` send
            tensors = client.tensors("reshaped")
            _, (own,) = client.infer("reshaped", tensors, cast_to_input_types(network, tensors))
        assert np.array_equal(own, expected.reshape(2, 3, 2))


@pytest.mark.parametrize("shape", [(1, 4), (3, 2)])
def test_clients_form_the_batch_if_max_batch_size_is_0(server: triton_server.Server, shape: tuple[int, int]) -> None:
    batch = np.ones(shape, np.float32)
    assert infer(server, "unbatched", {"X": batch}) == {"Y": [shape[1]] * shape[0]}
    config = json.loads(json.dumps(Path("model_repository/unbatched/config.pbtxt").read_text()))
    assert "max_batch_size: 0" in config


def test_a_warm_up_with_valid_values_loads_what_zeros_would_not(server: triton_server.Server) -> None:
    """With zeros in the file, ONNX Runtime refuses the index, and a failing warm-up ended this core with SIGSEGV."""
    config = Path("model_repository/shifted/config.pbtxt").read_text()
    assert config.count('input_data_file: "X.2.bin"') == 2, "at the largest and the smallest batch"
    mask, weight = np.ones((1, 2), bool), np.ones((1, 1), np.float32)
    assert infer(server, "shifted", {"X": np.array([[101, 100]]), "M": mask, "W": weight})["Y"] == [[4, 3]]
