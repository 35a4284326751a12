"""A stand-in for Triton's ONNX Runtime backend: the same library, on the CPU, in Triton's Python backend.

For a machine that has the server's core alone. It is slower, and knows nothing of accelerators.
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
        import onnxruntime

        config = json.loads(args["model_config"])
        path = f"{args['model_repository']}/{args['model_version']}/{config['default_model_filename']}"
        path = f"{path}/{os.path.basename(path)}" if os.path.isdir(path) else path
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        answers = zip(self.outputs, self.session.run(self.outputs, feed), strict=True)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in answers]
        )
