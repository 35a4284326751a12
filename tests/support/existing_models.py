"""Model repositories as people write them: config.pbtxt files of tests/triton/existing, with small artifacts."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf import text_format
from onnx import helper, numpy_helper

from build_tasks.triton.derived_tensors import filled_inputs, kept_outputs
from build_tasks.triton.existing_repository import FORMAT_OF
from build_tasks.triton.model_config import protobuf
from tests.support.project import ROOT

CONFIGS = ROOT / "tests/triton/existing"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.pbtxt"))
VERSIONS = {"latest_versions": (4, 5), "all_versions": (1, 2), "specific_versions": (1, 2, 3)}
OPSET = 17


class TwoOutputs(torch.nn.Module):
    """(N, 3, 16, 16) -> (N, 4), (N, 2)."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = images.mean(dim=(2, 3))
        return torch.cat([means, means[:, :1] * 2], dim=1), means[:, :2] - 1


class ImageAndAngle(torch.nn.Module):
    """(N, 3, 16, 16), (N, 1) -> (N, 4)."""

    def forward(self, image: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        return torch.cat([image.mean(dim=(2, 3)), angle], dim=1)


NETWORKS = {
    "torch_outputs": (TwoOutputs(), (torch.zeros(2, 3, 16, 16),)),
    "torch_arguments": (ImageAndAngle(), (torch.zeros(2, 3, 16, 16), torch.zeros(2, 1))),
}


def write_model(repository: Path, name: str, **artifact: Any) -> Path:
    """Write one model, with a config.pbtxt of CONFIGS, and return its folder.

    Args:
        artifact: Arguments of `onnx_graph`.
    """
    folder = repository / name
    folder.mkdir(parents=True)
    config = folder / "config.pbtxt"
    shutil.copy(CONFIGS / f"{name}.pbtxt", config)
    message = protobuf().ModelConfig()
    try:
        text_format.Parse(config.read_text(), message)
    except text_format.ParseError:
        return folder
    for version in VERSIONS.get(name, (1,)):
        (folder / str(version)).mkdir()
        model_format = FORMAT_OF.get(message.platform or message.backend)
        file = folder / str(version) / (message.default_model_filename or f"model.{(model_format or 'py')[:4]}")
        if model_format == "torchscript":
            network, example = NETWORKS[name]
            torch.jit.trace(network, example).save(str(file.with_suffix(".pt")))
        elif model_format == "tensorrt":
            file.with_suffix(".plan").write_bytes(b"a plan")
        elif model_format == "onnx":
            onnx.save(onnx_graph(message, **artifact), str(file))
        else:
            file.with_suffix(".py").write_text("class TritonPythonModel: pass\n")
    for output in message.output:
        if output.label_filename:
            (folder / output.label_filename).write_text("".join(f"class {i}\n" for i in range(10)))
    if message.model_warmup:
        (folder / "warmup").mkdir()
        np.ones(8, np.float32).tofile(folder / "warmup/x.bin")
    return folder


def onnx_graph(config: Any) -> onnx.ModelProto:
    """A graph with the tensors of a config, whose outputs depend on all inputs. Without tensors: x (N, 8) -> y."""
    if not config.input:
        text_format.Parse(
            'max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: 8 } '
            'output { name: "y" data_type: TYPE_FP32 dims: 8 }',
            config,
        )
    if config.batch_input:
        return _ragged_graph()
    graph = _Graph(batched=config.max_batch_size > 0)
    for tensor in config.input:
        graph.add_input(tensor.name, _type(tensor.data_type), _network_dims(tensor))
    for name, tensor in filled_inputs(config).items():
        graph.add_input(name, _type(protobuf().DataType.Value(tensor.dtype)), tensor.dims or [])
    for tensor in config.output:
        graph.add_output(tensor.name, _type(tensor.data_type), _network_dims(tensor))
    for name, tensor in kept_outputs(config).items():
        graph.add_output(name, _type(protobuf().DataType.Value(tensor.dtype)), tensor.dims or [])
    return graph.model()


def _network_dims(tensor: Any) -> list[int]:
    return list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)


def _type(data_type: int) -> int:
    name = protobuf().DataType.Name(data_type).removeprefix("TYPE_")
    return int(onnx.TensorProto.DataType.Value({"FP32": "FLOAT", "FP16": "FLOAT16"}.get(name, name)))


class _Graph:
    """A graph that adds its inputs, if they have the same dims, and the mean of each other one."""

    def __init__(self, batched: bool):
        self.batch = ["N"] if batched else []
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.dims: list[int] = []
        self.first_shape: list[int | str] = []
        self.sum = ""

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def shape(self, name: str, dims: list[int]) -> list[int | str]:
        return [*self.batch, *(f"{name}_{axis}" if dim == -1 else dim for axis, dim in enumerate(dims))]

    def mean(self, tensor: str, dims: list[int]) -> str:
        """(N, …) -> (N, 1)"""
        flat = self.node("Reshape", tensor, self.constant(np.array([0, -1])))
        return self.node("ReduceMean", flat, axes=[1], keepdims=1)

    def add_input(self, name: str, dtype: int, dims: list[int]) -> None:
        words = self.dims if -1 in dims and self.dims == dims else None
        shape = self.first_shape if words else self.shape(name, dims)
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        value = self.node("Cast", name, to=onnx.TensorProto.FLOAT)
        if not self.sum:
            self.dims, self.first_shape, self.sum = dims, shape, value
        elif dims == self.dims:
            self.sum = self.node("Add", self.sum, value)
        else:
            self.sum = self.node("Add", self.sum, self.mean(value, dims))

    def add_output(self, name: str, dtype: int, dims: list[int]) -> None:
        value = self.sum
        shape = self.first_shape if dims == self.dims else self.shape(name, dims)
        if dims != self.dims:
            value = self.mean(value, self.dims)
            weights = np.linspace(-1, 1, int(np.prod(dims)), dtype=np.float32).reshape(1, -1)
            value = self.node("MatMul", value, self.constant(weights))
            value = self.node("Reshape", value, self.constant(np.array([-1, *dims])))
        elif len(self.outputs):  # another output than the first
            value = self.node("Neg", value)
        self.nodes.append(helper.make_node("Cast", [value], [name], to=dtype))
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def model(self) -> onnx.ModelProto:
        return _model(self.nodes, self.inputs, self.outputs, self.weights)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _ragged_graph() -> onnx.ModelProto:
    """values (K), offsets (N + 1) -> sums (N, 1): the sum of the values of each request."""
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    weights = {"zero": [0], "one": [1], "end": [2**31], "axis": 0, "minus": [-1], "column": [-1, 1]}
    nodes = [
        helper.make_node("CumSum", ["values", "axis"], ["running"]),
        helper.make_node("Concat", ["none", "running"], ["sums_before"], axis=0),
        helper.make_node("Cast", ["offsets"], ["places"], to=int64),
        helper.make_node("Gather", ["sums_before", "places"], ["at"]),
        helper.make_node("Slice", ["at", "one", "end"], ["upper"]),
        helper.make_node("Slice", ["at", "zero", "minus"], ["lower"]),
        helper.make_node("Sub", ["upper", "lower"], ["each"]),
        helper.make_node("Reshape", ["each", "column"], ["sums"]),
    ]
    return _model(
        nodes,
        [
            helper.make_tensor_value_info("values", float32, ["K"]),
            helper.make_tensor_value_info("offsets", float32, ["M"]),
        ],
        [helper.make_tensor_value_info("sums", float32, ["N", 1])],
        [
            *(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in weights.items()),
            numpy_helper.from_array(np.zeros(1, np.float32), "none"),
        ],
    )
