"""The first step of an ensemble, in Triton's Python backend: encoded pictures -> the network's input.

The server's Python needs NumPy and Pillow. Source of the interface: the Python backend's README, "Usage".
"""

import json
import pathlib
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # part of the server
from preprocessing import PictureError, preprocess, read  # the file beside this one


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings of the version. args["model_repository"] is the model's own folder."""
        self.settings = read(pathlib.Path(args["model_repository"]) / args["model_version"])
        (output,) = json.loads(args["model_config"])["output"]
        self.output = output["name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response for each request, which contains (batch, 1) encoded pictures.

        A picture that is refused fails its own request only.
        """
        return [self.answer(pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy()) for request in requests]

    def answer(self, pictures: np.ndarray) -> Any:
        batch = []
        for number, picture in enumerate(pictures.reshape(-1), 1):
            try:
                batch.append(preprocess(bytes(picture), self.settings))
            except PictureError as error:
                reason = f"picture {number} of {pictures.size}: {error}"
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(reason))
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.output, np.stack(batch))])
