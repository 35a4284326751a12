"""The clean-up of ONNX graphs: the answers stay the same, also where a step of it is wrong."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxslim
import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from build_tasks.formats.onnx_clean_up import GraphRefusedError, clean_up
from build_tasks.formats.onnx_files import save_onnx

Array = np.ndarray[Any, Any]
Check = Callable[[onnx.ModelProto], float]

FOLDED, FUSED = "constants folded by Polygraphy", "onnxslim without its shapes"


def run(graph: onnx.ModelProto, batch: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answer: Array = session.run(None, {"x": batch})[0]
    return answer


def check_against(batch: Array, expected: Array) -> Check:
    def check(graph: onnx.ModelProto) -> float:
        try:
            found = run(graph, batch)
        except Exception as error:
            raise GraphRefusedError("wrote a graph that does not run") from error
        if found.shape != expected.shape or not np.abs(found - expected).max() < 1e-4:
            raise GraphRefusedError("wrote a graph that differs")
        return float(np.abs(found - expected).max())

    return check


Operation = Callable[[Any, torch.Tensor], Any]


class Network(nn.Module):
    """A convolution, which makes the size even or odd, and an operation that uses the size."""

    def __init__(self, operation: Operation):
        super().__init__()
        self.operation = operation
        self.conv = nn.Conv2d(3, 5, 3)
        self.wide = Conv2dSame(5, 5, 5, stride=2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.operation(self, self.conv(x))


def same_padding(network: Any, x: torch.Tensor) -> Any:
    """A convolution with TensorFlow's padding, which depends on half of the size."""
    return network.wide(x)


def first_half(_: Any, x: torch.Tensor) -> Any:
    """The rows of the upper half, with the middle one."""
    return x[:, :, : torch.ceil(torch.as_tensor(x.shape[2]) / 2).to(torch.int64)].mean(-1)


def times_half_the_height(_: Any, x: torch.Tensor) -> Any:
    return x * (torch.as_tensor(x.shape[2]) / 2)


def exported(operation: Operation, side: int, folder: Path) -> tuple[onnx.ModelProto, Check]:
    """The graph of the TorchScript exporter, with an open batch, and the check of its answers."""
    torch.manual_seed(0)
    network, batch, file = Network(operation).eval(), torch.randn(2, 3, side, side), folder / f"{side}.onnx"
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            torch.jit.trace(network, batch), (batch,), file, dynamo=False, opset_version=17,
            input_names=["x"], output_names=["y"], dynamic_axes=axes,
        )  # fmt: skip
        expected = network(batch).numpy()
    return onnx.load(file), check_against(batch.numpy(), expected)


@pytest.mark.parametrize("operation", [same_padding, first_half, times_half_the_height])
def test_where_onnxslim_halves_a_length_wrongly_the_graph_is_right_and_small(
    operation: Operation, tmp_path: Path
) -> None:
    graph, check = exported(operation, 17, tmp_path)
    with pytest.raises(GraphRefusedError):  # otherwise this test shows nothing
        check(onnxslim.slim(graph))
    nodes = len(graph.graph.node)
    cleaned, error, how = clean_up(graph, check)
    assert error < 1e-4
    assert check(cleaned) == error
    assert how == f"{FOLDED}, then {FUSED}, because onnxslim wrote a graph that differs"
    even, check_even = exported(operation, 18, tmp_path)
    usual, _, how = clean_up(even, check_even)
    assert how == "onnxslim"
    assert len(cleaned.graph.node) == len(usual.graph.node) < nodes / 4


WEIGHTS = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
TO_FOLD = {"two": np.array([2], np.float32), "three": np.array([3], np.float32)}
GRAPHS: dict[str, tuple[str, dict[str, Array], int]] = {
    "a factor for each column, of as many columns as channels, is fused as one for each channel": (
        """<ir_version: 8, opset_import: ["" : 17]> g (float[b,3,6,6] x) => (float[b,4,4,4] y) {
            p = Conv(x, W)  q = Add(two, three)  r = Mul(p, columns)  y = Mul(r, q)
        }""",
        {"W": WEIGHTS, "columns": np.arange(4, dtype=np.float32), **TO_FOLD},
        3,
    ),
    "a padding of some axes is fused as one of all axes": (
        """<ir_version: 8, opset_import: ["" : 18]> g (float[b,3,17,17] x) => (float[b,4,h,w] y) {
            p = Pad(x, pads,, axes)  q = Add(two, three)  r = Conv(p, W)  y = Mul(r, q)
        }""",
        {"W": WEIGHTS, "pads": np.array([0, 0, 2, 2]), "axes": np.array([2, 3]), **TO_FOLD},
        3,
    ),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_a_wrong_fusion_is_left_out_and_constants_are_folded(case: str) -> None:
    text, tensors, nodes = GRAPHS[case]
    graph = onnx.parser.parse_model(text)
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in tensors.items())
    _, channels, height, width = (dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim)
    batch = np.random.default_rng(1).standard_normal((2, channels, height, width)).astype(np.float32)
    check = check_against(batch, run(graph, batch))
    with pytest.raises(GraphRefusedError):
        check(onnxslim.slim(graph))
    cleaned, error, how = clean_up(graph, check)
    assert error == check(cleaned)
    assert len(cleaned.graph.node) == nodes
    assert how.startswith(f"{FOLDED}, because onnxslim wrote a graph that ")
    assert f"; {FUSED} wrote a graph that " in how


def test_a_graph_that_is_wrong_from_the_start_is_refused(tmp_path: Path) -> None:
    graph, _ = exported(times_half_the_height, 18, tmp_path)
    with pytest.raises(GraphRefusedError, match="wrote a graph that differs"):
        clean_up(graph, check_against(np.zeros((2, 3, 18, 18), np.float32), np.ones((2, 5, 16, 16), np.float32)))


def test_a_graph_whose_weights_lie_in_a_second_file_is_cleaned_up_step_by_step(tmp_path: Path) -> None:
    """The check saves the graph after each step, and the next step needs the weights."""
    graph, check = exported(same_padding, 17, tmp_path)

    def save_and_check(candidate: onnx.ModelProto) -> float:
        save_onnx(candidate, str(tmp_path / "model.onnx"), external_data=True)
        return check(onnx.load(tmp_path / "model.onnx/model.onnx"))

    cleaned, error, how = clean_up(graph, save_and_check)
    assert FUSED in how
    assert error == check(cleaned) < 1e-4
