"""The errors of ONNX Runtime, without what no user can use."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from build_tasks.formats.onnx_runtime import OnnxRuntimeError, onnx_session

WEIGHTS = {
    "size": np.array([2, 7]),
    "filter": np.zeros((3, 4, 1, 1), np.float32),
    "picture": np.zeros((1, 3, 8, 8), np.float32),
    "table": np.zeros((5, 4), np.float32),
}
LOADING: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown node": ({"op_type": "Foo", "domain": "own"}, "Fatal error: own:Foo(-1) is not a registered function"),
    "an unknown tensor": ({"inputs": ["x", "z"], "op_type": "Add"}, "Invalid model. Node input 'z' is not a graph"),
    "a newer file": ({"ir_version": 99}, "Unsupported model IR version: 99, max supported IR version: "),
    "a newer opset": ({"opset": 99}, "ONNX Runtime only *guarantees* support for models stamped with official"),
    "dims that do not fit": (
        {"op_type": "MatMul", "inputs": ["x", "table"]}, "Node (node) Op (MatMul) [ShapeInferenceError] Incompatible"
    ),
}  # fmt: skip
RUNNING: dict[str, tuple[dict[str, Any], str]] = {
    "a shape": (
        {"op_type": "Reshape", "inputs": ["x", "size"]},
        "Reshape node: input_shape_size == requested_shape_size was false. The input tensor cannot be reshaped",
    ),
    "channels": ({"op_type": "Conv", "inputs": ["x", "filter"]}, "Conv y_nchwc: Input channels C is not equal to"),
    "an axis": (
        {"op_type": "Concat", "inputs": ["x", "picture"], "attributes": {"axis": 1}},
        "Concat node: Non concat axis dimensions must match: Axis 0 has mismatched dimensions of 1 and 2",
    ),
}


def save(
    path: Path,
    op_type: str = "Relu",
    inputs: tuple[str, ...] = ("x",),
    domain: str = "",
    attributes: dict[str, Any] | None = None,
    opset: int = 17,
    ir_version: int = 8,
) -> str:
    node = helper.make_node(op_type, inputs, ["y"], name="node", domain=domain, **(attributes or {}))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None, 8, 8]) for name in "xy")
    weights = [numpy_helper.from_array(WEIGHTS[name], name) for name in inputs if name in WEIGHTS]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    graph = helper.make_graph([node], "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), path)
    return str(path)


@pytest.mark.parametrize("case", LOADING)
def test_an_error_of_loading_is_its_reason_alone(tmp_path: Path, case: str) -> None:
    keys, reason = LOADING[case]
    path = save(tmp_path / "a file of mine.onnx", **keys)
    with pytest.raises(OnnxRuntimeError) as error:
        onnx_session(path)
    assert str(error.value).startswith(reason), error.value
    assert "mine.onnx" not in str(error.value)


@pytest.mark.parametrize("case", RUNNING)
def test_an_error_of_running_names_the_node_and_the_reason(tmp_path: Path, case: str) -> None:
    keys, reason = RUNNING[case]
    run = onnx_session(save(tmp_path / "m.onnx", **keys))
    for _ in range(2):
        with pytest.raises(OnnxRuntimeError) as error:
            run({"x": np.zeros((2, 3, 8, 8), np.float32)})
        assert str(error.value).startswith(reason), error.value
