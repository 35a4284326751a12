"""A stub for Triton's ONNX Runtime backend: runs a model with the same library, on the CPU, in Triton's Python backend.

It is for a machine that has only the server's core. It is slower than the backend, and ignores its accelerators and
parameters. It refuses what the backend refuses when it loads a model: a config that contradicts the session.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import triton_python_backend_utils as pb_utils
from request_batches import (
    RequestBatches,  # before sys.path grows: the core's Python backend was built for its own NumPy
)

sys.path += os.environ["TRITON_PYTHON_BACKENDS_PATH"].split(os.pathsep)

# ONNX Runtime's name of each of Triton's types. TYPE_BF16 is missing: the backend has it since release 26.03, and the
# arrays of the Python backend, which are NumPy's, do not.
# Source: ModelConfigDataTypeToOnnxDataType in src/onnxruntime_utils.cc of onnxruntime_backend.
DTYPES = {
    "TYPE_BOOL": "tensor(bool)", "TYPE_STRING": "tensor(string)", "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)", "TYPE_FP64": "tensor(double)",
    **{f"TYPE_{kind}{bits}": f"tensor({kind.lower()}{bits})" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
}  # fmt: skip


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import onnxruntime

        config = json.loads(args["model_config"])
        path = f"{args['model_repository']}/{args['model_version']}/{config['default_model_filename']}"
        path = f"{path}/{os.path.basename(path)}" if os.path.isdir(path) else path
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        if mistake := next(mistakes(config, self.session), None):
            raise pb_utils.TritonModelException(f"unable to load model '{config['name']}', {mistake}")
        self.batches = RequestBatches(config, [control["name"] for control in sequence_controls(config)])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [response for part in self.batches.split(requests) for response in self.respond(part)]

    def respond(self, requests: list[Any]) -> list[Any]:
        names = [*self.batches.outputs, *self.batches.state_outputs]
        feed = {name: decode_texts(array) for name, array in self.batches.gather(requests).items()}
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        self.batches.keep_states(requests, outputs)
        responses: list[Any] = self.batches.scatter(requests, outputs)
        return responses


def decode_texts(array: Any) -> Any:
    """An array as ONNX Runtime takes it. In the Python backend, texts are bytes, of which it would take the `repr`."""
    if array.dtype != object:
        return array
    decoded = array.copy()
    for index, text in enumerate(array.flat):
        decoded.flat[index] = text.decode()
    return decoded


def sequence_controls(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs that Triton fills with the start, end, ready flag and correlation ID of a sequence."""
    return [
        {"name": control["name"], "data_type": _type_of(kind)}
        for control in config.get("sequence_batching", {}).get("control_input", ())
        for kind in control["control"]
    ]


def _type_of(control: dict[str, Any]) -> str:
    """The type of a control input. A flag has one value for false and one for true."""
    types = {"int32_false_true": "TYPE_INT32", "fp32_false_true": "TYPE_FP32", "bool_false_true": "TYPE_BOOL"}
    return next((dtype for values, dtype in types.items() if control.get(values)), str(control.get("data_type")))


def mistakes(config: dict[str, Any], session: Any) -> Iterator[str]:
    """Yield the contradictions between a ModelConfig and the session, in the order in which the backend looks for them.

    Source: ModelInstanceState::ValidateInputs, ValidateOutputs and Validate…SequenceControl in src/onnxruntime.cc of
    onnxruntime_backend, and CompareDimsSupported in its src/onnxruntime_utils.cc.
    """
    batches = config.get("max_batch_size", 0) > 0
    inputs = {tensor.name: tensor for tensor in session.get_inputs()}
    controls = sequence_controls(config)
    for control in controls:
        name = control["name"]
        if name not in inputs:
            yield f"configuration specified sequence control '{name}', but model does not provide that input"
            continue
        dims = _shape(inputs[name])[1 if batches else 0 :]
        if dims != [1]:
            yield f"sequence control '{name}' in model has dims {dims} but dims [1] is expected"
        if DTYPES.get(control["data_type"]) != inputs[name].type:
            yield f"sequence control '{name}', the model expects data-type {inputs[name].type}"
    states = config.get("sequence_batching", {}).get("state", ())
    expected = len(config["input"]) + len(config.get("batch_input", ())) + len(controls) + len(states)
    if expected != len(inputs):
        yield f"configuration expects {expected} inputs, model provides {len(inputs)}"
    inputs |= {tensor.name: tensor for tensor in session.get_overridable_initializers()}
    outputs = {tensor.name: tensor for tensor in session.get_outputs()}
    for tensor in config["input"]:
        if tensor.get("optional") and batches:
            yield f"optional input '{tensor['name']}' is not supported for models that support batching"
        yield from _tensor_mistakes("input", tensor, inputs, batches)
    batch_outputs = {name for output in config.get("batch_output", ()) for name in output["target_name"]}
    for tensor in config["output"]:
        yield from _tensor_mistakes(
            "output", tensor, outputs, batches, compare_dims=tensor["name"] not in batch_outputs
        )


def _tensor_mistakes(
    kind: str, tensor: dict[str, Any], found: dict[str, Any], batches: bool, compare_dims: bool = True
) -> Iterator[str]:
    """Yield the contradictions between one input or output of the config and those of the session, by their names."""
    name, data_type = tensor["name"], tensor["data_type"]
    if name not in found:
        yield f"unexpected inference {kind} '{name}', allowed {kind}s are: {', '.join(sorted(found))}"
        return
    if data_type not in DTYPES:
        yield f"unsupported datatype {data_type} for {kind} '{name}'"
    elif DTYPES[data_type] != found[name].type:
        yield f"configuration expects datatype {data_type} for {kind} '{name}', model provides {found[name].type}"
    if not compare_dims:
        return
    shape = _shape(found[name])
    dims = tensor["reshape"].get("shape", []) if "reshape" in tensor else tensor["dims"]
    if tensor.get("allow_ragged_batch"):
        if shape != [-1]:
            yield f"ragged input '{name}' must have shape [-1], model provides {shape}"
    elif not shape:
        if any(dim != 1 for dim in dims):
            yield f"scalar tensor '{name}', should only provide 1 in the model configuration, which provides {dims}"
    elif batches and shape[0] != -1:
        yield (
            f"tensor '{name}': for the model to support batching the shape should have at least 1 dimension and the "
            f"first dimension must be -1; but shape expected by the model is {shape}"
        )
    else:
        full = [-1, *dims] if batches else dims
        # An open dimension of an input may be fixed in the config, and one of an output may not.
        fits = [
            expected == length or (kind == "input" and expected == -1)
            for expected, length in zip(shape, full, strict=False)
        ]
        if len(shape) != len(full) or not all(fits):
            batch = " (an initial batch dimension because max_batch_size > 0)" if batches else ""
            yield (
                f"tensor '{name}': the model expects {len(shape)} dimensions (shape {shape}) but the model "
                f"configuration specifies {len(full)} dimensions{batch}, shape {full}"
            )


def _shape(tensor: Any) -> list[int]:
    """The shape of a tensor of the session; -1 for an open dimension, which ONNX Runtime may also name."""
    return [dim if isinstance(dim, int) else -1 for dim in tensor.shape]
