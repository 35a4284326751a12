"""A stub for Triton's PyTorch backend: runs a model with the same library, on the CPU, in Triton's Python backend.

It is for a machine that has only the server's core. It is slower than the backend, and ignores its parameters. It
refuses what the backend refuses, both when it loads a model and when the model answers.
"""

import json
import os
import sys
from typing import Any

import numpy as np  # before sys.path grows: this must be the NumPy that the core's Python backend was built for
import triton_python_backend_utils as pb_utils

sys.path += os.environ["TRITON_PYTHON_BACKENDS_PATH"].split(os.pathsep)

# PyTorch's name of each of Triton's types. The backend has no unsigned types but UINT8, and no BF16.
# Source: ModelConfigDataTypeToTorchType in src/libtorch_utils.cc of pytorch_backend.
DTYPES = {
    "TYPE_BOOL": "bool", "TYPE_UINT8": "uint8", "TYPE_INT8": "int8", "TYPE_INT16": "int16", "TYPE_INT32": "int32",
    "TYPE_INT64": "int64", "TYPE_FP16": "float16", "TYPE_FP32": "float32", "TYPE_FP64": "float64",
}  # fmt: skip


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import torch

        self.torch = torch
        config = json.loads(args["model_config"])
        path = f"{args['model_repository']}/{args['model_version']}/{config['default_model_filename']}"
        self.module = torch.jit.load(path)
        arguments = [argument.name for argument in self.module.forward.schema.arguments[1:]]  # the first is self
        if mistake := self.mistake(config, arguments):
            raise pb_utils.TritonModelException(f"unable to load model '{config['name']}', {mistake}")
        self.inputs = places([tensor["name"] for tensor in config["input"]], arguments)
        self.inputs |= places([tensor["name"] for tensor in sequence_controls(config)], [])
        if sorted(self.inputs.values()) != list(range(len(arguments))):
            raise pb_utils.TritonModelException(
                f"unable to load model '{config['name']}': the inputs {', '.join(self.inputs)} are not the arguments 0 "
                f"to {len(arguments) - 1} of forward, and the backend would write beyond them"
            )
        self.outputs = places([tensor["name"] for tensor in config["output"]], [])
        self.dtypes = {tensor["name"]: tensor["data_type"] for tensor in config["output"]}

    def mistake(self, config: dict[str, Any], arguments: list[str]) -> str | None:
        """The first reason why the backend does not load the model. It does not compare dims.

        Source: ModelInstanceState::ValidateInputs and ValidateOutputs in src/pt/model_instance_state.cc.
        """
        expected = len(config["input"]) + len(config.get("batch_input", ())) + len(sequence_controls(config))
        if expected != len(arguments):
            return f"configuration expects {expected} inputs, model provides {len(arguments)}"
        for kind in ("input", "output"):
            for tensor in config[kind]:
                if tensor["data_type"] not in DTYPES:
                    return f"unsupported datatype {tensor['data_type']} for {kind} '{tensor['name']}'"
        return None

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        try:
            feed = self.read_inputs(request)
            with self.torch.inference_mode():
                outputs = self.tensors_of(self.module(*feed))
            return pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, np.ascontiguousarray(self.output(outputs, name, index).numpy()))
                    for name, index in self.outputs.items()
                ]
            )
        except (RuntimeError, ValueError) as error:
            message = f"PyTorch execute failure: {error}"
            pb_utils.Logger.log_error(message)  # a failing warm-up may end the server before it answers
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))

    def read_inputs(self, request: Any) -> list[Any]:
        """The inputs of a request, in the order in which `forward` takes them."""
        names = sorted(self.inputs, key=lambda name: self.inputs[name])
        arrays = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names]
        return [self.torch.from_numpy(array.copy()) for array in arrays]

    def tensors_of(self, answer: Any) -> list[Any]:
        """The tensors that a model answers with: one, or a tuple of them.

        Raises:
            ValueError: If it answers with anything else. Source: ModelInstanceState::Execute.
        """
        tensors = list(answer) if isinstance(answer, tuple) else [answer]
        for tensor in tensors:
            if isinstance(tensor, list):
                raise ValueError("output must be of type Tensor or List[str], received List[Tensor]")
            if not isinstance(tensor, self.torch.Tensor):
                raise ValueError(
                    "output must be of type Tensor, List[str] or Tuple containing one of these two types. It should "
                    "not be a List / Dictionary of Tensors or a Scalar"
                )
        return tensors

    def output(self, outputs: list[Any], name: str, index: int) -> Any:
        """One output of the config.

        Raises:
            ValueError: If the model does not have it. Source: ModelInstanceState::ReadOutputTensors.
        """
        if index >= len(outputs):
            raise ValueError(
                f"The output {name} in the model configuration refers to an output index which doesn't exist. This "
                f"model has {len(outputs)} outputs"
            )
        dtype = str(outputs[index].dtype).removeprefix("torch.")
        if dtype != DTYPES[self.dtypes[name]]:
            raise ValueError(
                f"configuration expects datatype {self.dtypes[name]} for output '{name}', model provides {dtype}"
            )
        if outputs[index].ndim == 0:
            raise ValueError(f"output '{name}' is a scalar which is not supported")
        return outputs[index]


def sequence_controls(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs that Triton fills with the start, end, ready flag and correlation ID of a sequence."""
    return list(config.get("sequence_batching", {}).get("control_input", ()))


def places(names: list[str], arguments: list[str]) -> dict[str, int]:
    """The position of each input among the arguments of `forward`, or of each output in its answer.

    Names are those of the arguments, or <name>__<index>, or else the order of the config counts.
    Source: ModelInstanceState::GetNamingConvention.

    Args:
        names: The names of the inputs or outputs in the config.
        arguments: The arguments of `forward`; none for outputs.
    """
    if arguments and set(names) <= set(arguments):
        return {name: arguments.index(name) for name in names}
    parts = [name.partition("__") for name in names]
    if all(separator and index.isdecimal() for _, separator, index in parts):
        return {name: int(part[2]) for name, part in zip(names, parts, strict=True)}
    return {name: index for index, name in enumerate(names)}
