"""A stub for Triton's ONNX Runtime backend: runs a model with the same library, on the CPU, in Triton's Python backend.

It is for a machine that has only the server's core. It is slower than the backend, and ignores its accelerators.
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
        import onnxruntime

        config = json.loads(args["model_config"])
        path = f"{args['model_repository']}/{args['model_version']}/{config['default_model_filename']}"
        path = f"{path}/{os.path.basename(path)}" if os.path.isdir(path) else path
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        outputs = zip(self.outputs, self.session.run(self.outputs, feed), strict=True)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in outputs]
        )
