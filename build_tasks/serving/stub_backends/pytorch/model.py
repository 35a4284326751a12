"""A stub for Triton's PyTorch backend: runs a model with the same library, on the CPU, in Triton's Python backend.

Like the backend, it serves two platforms: TorchScript files, and packages of AOTInductor (torch_aoti). It is for a
machine that has only the server's core. It is slower than the backend, and ignores its parameters. It refuses what the
backend refuses, both when it loads a model and when the model answers.
"""

import json
import os
import sys
from typing import Any

import triton_python_backend_utils as pb_utils
from request_batches import (
    RequestBatches,  # before sys.path grows: the core's Python backend was built for its own NumPy
)

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
        if path.endswith(".pt2"):
            self.module, arguments = load_package(path, config)
        else:
            self.module = torch.jit.load(path)
            if "aten::cudnn_convolution" in str(self.module.graph):
                raise pb_utils.TritonModelException(
                    f"unable to load model '{config['name']}': it was built for a GPU (triton.device), and has "
                    "operators that PyTorch does not have for a CPU"
                )
            arguments = [argument.name for argument in self.module.forward.schema.arguments[1:]]  # the first is self
        if mistake := self.mistake(config, arguments):
            raise pb_utils.TritonModelException(f"unable to load model '{config['name']}', {mistake}")
        controls = [tensor["name"] for tensor in sequence_controls(config)]
        self.batches = RequestBatches(config, controls)
        self.inputs = places([name for name in self.batches.inputs if name not in controls], arguments)
        self.inputs |= places(controls, [])
        if sorted(self.inputs.values()) != list(range(len(arguments))):
            raise pb_utils.TritonModelException(
                f"unable to load model '{config['name']}': the inputs {', '.join(self.inputs)} are not the arguments 0 "
                f"to {len(arguments) - 1} of forward, and the backend would write beyond them"
            )
        self.outputs = places(self.batches.outputs, [])
        self.outputs |= places(self.batches.state_outputs, [])
        self.dtypes = {tensor["name"]: tensor["data_type"] for tensor in config["output"]}
        self.dtypes |= {state["output_name"]: state["data_type"] for state in self.batches.states}

    def mistake(self, config: dict[str, Any], arguments: list[str]) -> str | None:
        """The first reason why the backend does not load the model. It does not compare dims.

        Source: ModelInstanceState::ValidateInputs and ValidateOutputs in src/pt/model_instance_state.cc.
        """
        states = config.get("sequence_batching", {}).get("state", ())
        expected = (
            len(config["input"]) + len(config.get("batch_input", ())) + len(sequence_controls(config)) + len(states)
        )
        if expected != len(arguments):
            return f"configuration expects {expected} inputs, model provides {len(arguments)}"
        for kind in ("input", "output"):
            for tensor in config[kind]:
                if tensor["data_type"] not in DTYPES:
                    return f"unsupported datatype {tensor['data_type']} for {kind} '{tensor['name']}'"
            names = [state[f"{kind}_name"] for state in states]
            if states and not all(map(has_index, [*names, *(tensor["name"] for tensor in config[kind])])):
                return "using sequence batching with state but not all inputs and outputs follow the <name>__<index>"
        return None

    def execute(self, requests: list[Any]) -> list[Any]:
        return [response for part in self.batches.split(requests) for response in self.respond(part)]

    def respond(self, requests: list[Any]) -> list[Any]:
        try:
            feed = self.batches.gather(requests)
            names = sorted(self.inputs, key=lambda name: self.inputs[name])
            with self.torch.inference_mode():
                answer = self.module(*(self.torch.from_numpy(feed[name].copy()) for name in names))
            tensors = self.tensors_of(answer)
            outputs = {name: self.output(tensors, name, index).numpy() for name, index in self.outputs.items()}
            self.batches.keep_states(requests, outputs)
            responses: list[Any] = self.batches.scatter(requests, outputs)
            return responses
        except (RuntimeError, ValueError) as error:
            message = f"PyTorch execute failure: {error}"
            pb_utils.Logger.log_error(message)  # a failing warm-up may end the server before it answers
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(message)) for _ in requests]

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


def load_package(path: str, config: dict[str, Any]) -> tuple[Any, list[str]]:
    """A package of AOTInductor, and the names of its inputs: INPUT__0, INPUT__1 and so on.

    Source: src/pt2/model_state.cc and src/pt2/model_instance_state.cc of pytorch_backend, r26.05. The names by the call
    specification, such as ARGS[0], are left out: this project does not use them.

    Raises:
        TritonModelException: If it is for a GPU, or if a tensor of the config has another name.
    """
    import torch
    from torch._inductor import config as inductor

    with inductor.patch({"cpp.vec_isa_ok": False}):  # as in build_tasks/formats/aoti_package.py
        package = torch._inductor.aoti_load_package(path)
    prefix = f"unable to load model '{config['name']}'"
    if (device := package.get_metadata()["AOTI_DEVICE_KEY"]) != "cpu":
        raise pb_utils.TritonModelException(f"{prefix}: the package was compiled for {device}, and runs there only")
    inputs, outputs = (json.loads(spec)[1] for spec in package.loader.get_call_spec())
    counts = {"input": count_tensors(inputs), "output": count_tensors(outputs)}
    for kind, count in counts.items():
        known = [f"{kind.upper()}__{index}" for index in range(count)]
        for tensor in config[kind]:
            if tensor["name"] not in known:
                raise pb_utils.TritonModelException(f'{prefix}: io_data does not contain name: "{tensor["name"]}"')
    return package, [f"INPUT__{index}" for index in range(counts["input"])]


def count_tensors(spec: dict[str, Any]) -> int:
    """The number of tensors in a call specification of torch.export, as JSON."""
    return sum(map(count_tensors, spec["children_spec"])) if spec["type"] else 1


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
    if all(map(has_index, names)):
        return {name: int(name.partition("__")[2]) for name in names}
    return {name: index for index, name in enumerate(names)}


def has_index(name: str) -> bool:
    """Whether a name is <name>__<index>."""
    return name.partition("__")[2].isdecimal()
