"""The first step of an ensemble, in Triton's Python backend: encoded pictures -> the network's input.

The server's Python needs NumPy and Pillow. Source of the interface: the Python backend's README, "Usage".
"""

import concurrent.futures
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # part of the server
from preprocessing import PictureError, preprocess, read  # the file beside this one

# Threads that prepare pictures: Pillow and NumPy leave the interpreter to other threads while they work. A picture
# needs up to 512 MB, so there are not more on a machine of many cores.
THREADS = min(8, len(os.sched_getaffinity(0)))


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings of the version. args["model_repository"] is the model's own folder."""
        self.settings = read(pathlib.Path(args["model_repository"]) / args["model_version"])
        (output,) = json.loads(args["model_config"])["output"]
        self.output = output["name"]
        self.threads = concurrent.futures.ThreadPoolExecutor(THREADS)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response for each request, which contains (batch, pictures of a sample) encoded pictures.

        The pictures of all requests are prepared at once, in threads. A picture that is refused fails its own request.
        """
        batches = [pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy() for request in requests]
        # Without batches, the dims of one sample are (pictures of it).
        samples = [[bytes(p) for p in sample] for batch in batches for sample in batch.reshape(len(batch), -1)]
        results = self.threads.map(self.prepare, samples) if len(samples) > 1 else map(self.prepare, samples)
        return [self.response(results, len(batch)) for batch in batches]

    def prepare(self, sample: list[bytes]) -> np.ndarray | PictureError:
        try:
            return preprocess(sample, self.settings)
        except PictureError as error:
            return error

    def response(self, results: Iterator[np.ndarray | PictureError], count: int) -> Any:
        """Return the response of the request that the next results belong to."""
        batch = [next(results) for _ in range(count)]
        for number, result in enumerate(batch, 1):
            if isinstance(result, PictureError):
                reason = f"picture {number} of {count}: {result}"
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(reason))
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.output, np.stack(batch))])

    def finalize(self) -> None:
        self.threads.shutdown()
