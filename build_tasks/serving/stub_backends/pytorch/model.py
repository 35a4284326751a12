"""A stand-in for Triton's PyTorch backend: the same library, on the CPU, in Triton's Python backend.

For a machine that has the server's core alone. It is slower, and knows none of that backend's parameters.
"""

import json
import os
import sys
from typing import Any

import numpy as np  # before the path below is known: the one that the Python backend can read
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
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        feed = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
        with self.torch.inference_mode():
            answer = self.module(*(self.torch.from_numpy(value.copy()) for value in feed))
        answers = [answer] if isinstance(answer, self.torch.Tensor) else answer
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(value.numpy()))
            for name, value in zip(self.outputs, answers, strict=True)
        ]
        return pb_utils.InferenceResponse(tensors)
