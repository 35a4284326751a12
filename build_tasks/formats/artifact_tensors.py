"""The tensors of an artifact of another origin: from the file where it has them, otherwise from its config."""

from typing import Any

from build_tasks.errors import UserError, first_lines
from build_tasks.spec.adopted_spec import FileTensor
from build_tasks.triton import derived_tensors
from build_tasks.triton.derived_tensors import DTYPES
from build_tasks.triton.existing_repository import ExistingModel
from build_tasks.triton.model_config import protobuf

NAMES = {triton: name for name, triton in DTYPES.items() if name != "bytes"}  # NumPy's name of each type
OPEN_BATCH = "batch"


def read_tensors(existing: ExistingModel) -> tuple[list[FileTensor], list[FileTensor]]:
    """Return the inputs and the outputs of the artifact of an existing model.

    ONNX files have them. TorchScript files have neither types nor shapes, and plans are only read by TensorRT.

    Raises:
        UserError: If the file cannot be read, or if neither it nor the config says what the tensors are.
    """
    if existing.model_format == "onnx":
        return _of_onnx(existing)
    inputs, outputs = _of_config(existing.config, "input"), _of_config(existing.config, "output")
    if not inputs or not outputs:
        raise UserError("config.pbtxt names no inputs or no outputs, and the file does not contain their shapes")
    return inputs, outputs


def _of_onnx(existing: ExistingModel) -> tuple[list[FileTensor], list[FileTensor]]:
    import onnx

    from build_tasks.formats.onnx_files import numpy_dtype, onnx_file

    try:
        graph = onnx.load(onnx_file(existing.artifact), load_external_data=False).graph
    except Exception as error:  # of protobuf and of onnx, which have no common base class
        raise UserError(f"{existing.artifact} cannot be read as ONNX: {first_lines(error)}") from error

    def tensor(value: Any) -> FileTensor:
        dims = value.type.tensor_type.shape.dim
        shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]
        is_text = value.type.tensor_type.elem_type == onnx.TensorProto.STRING
        return FileTensor(value.name, "string" if is_text else numpy_dtype(value).name, shape)

    weights = {each.name for each in graph.initializer}
    return [tensor(value) for value in graph.input if value.name not in weights], [*map(tensor, graph.output)]


def _of_config(config: Any, kind: str) -> list[FileTensor]:
    """Return the inputs or outputs of the network that a config describes, in the order of the file."""
    batch = [OPEN_BATCH] if config.max_batch_size else []
    tensors = []
    for tensor in getattr(config, kind):
        dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
        name = protobuf().DataType.Name(tensor.data_type)
        if name not in NAMES:
            raise UserError(f"{kind}: {tensor.name} has the type {name}, which is none")
        tensors.append(FileTensor(tensor.name, NAMES[name], [*batch, *_open(dims)]))
    hidden = derived_tensors.filled_inputs(config) if kind == "input" else derived_tensors.kept_outputs(config)
    for name, filled in hidden.items():
        tensors.append(FileTensor(name, NAMES[filled.dtype], [*batch, *_open(filled.dims or [])]))
    places = [tensor.name.rpartition("__")[2] for tensor in tensors]
    if all(place.isdecimal() for place in places):  # PyTorch's backend takes the number as the place
        tensors.sort(key=lambda tensor: int(tensor.name.rpartition("__")[2]))
    return tensors


def _open(dims: Any) -> list[int | str]:
    return ["" if dim == -1 else int(dim) for dim in dims]
