"""A stub for Triton's PyTorch backend: runs a model with the same library, on the CPU, in Triton's Python backend.

It is for a machine that has only the server's core. It is slower than the backend, and ignores its parameters.
"""

import json
import os
import sys
from typing import Any

import numpy as np  # before sys.path grows: this must be the NumPy that the core's Python backend was built for
import triton_python_backend_utils as pb_utils

sys.path += os.environ["TRITON_PYTHON_BACKENDS_PATH"].split(os.pathsep)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import torch

        self.torch = torch
        config = json.loads(args["model_config"])
        path = f"{args['model_repository']}/{args['model_version']}/{config['default_model_filename']}"
        self.module = torch.jit.load(path)
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        feed = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
        with self.torch.inference_mode():
            outputs = self.module(*(self.torch.from_numpy(value.copy()) for value in feed))
        outputs = [outputs] if isinstance(outputs, self.torch.Tensor) else outputs
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(value.numpy()))
            for name, value in zip(self.outputs, outputs, strict=True)
        ]
        return pb_utils.InferenceResponse(tensors)
