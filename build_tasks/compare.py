"""How far an artifact is from what it stands for, and how an artifact is run."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# The PyTorch backend's convention, kept in every format, so that a client changes nothing but the model's name.
# Source: the server's docs, user_guide/model_configuration.md, "Inputs and Outputs".
INPUT, OUTPUT = "INPUT__0", "OUTPUT__{}"


def relative_error(found: "np.ndarray", expected: "np.ndarray") -> float:
    """The L2 norm of the difference over the norm of what is expected; inf where shape, dtype or a NaN forbids it."""
    import numpy as np

    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), np.finfo(np.float64).tiny))


def disagreement(found: "list[np.ndarray]", expected: "list[np.ndarray]") -> float:
    """The largest relative error of any output; inf where their number differs."""
    if len(found) != len(expected):
        return float("inf")
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def onnx_file(path: str) -> str:
    """The file of an ONNX artifact, which is a folder where the weights are external data."""
    return f"{path}/{os.path.basename(path)}" if os.path.isdir(path) else path


def onnx_session(path: str) -> "Callable[[np.ndarray], list[np.ndarray]]":
    """An ONNX artifact in ONNX Runtime on the CPU, as a function from a batch to its outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file(path), providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {INPUT: batch})
