"""How Triton knows a format: platform, backend and file names."""

from typing import NamedTuple


class Format(NamedTuple):
    """How Triton knows a model.

    Source: the server's docs/user_guide/model_configuration.md, and src/constants.h of its core.
    """

    suffix: str  # of the Triton model's name, after the model's
    platform: str  # empty where only a backend is named
    file: str  # in the version's folder
    backend: str = ""


FORMATS = {
    "torchscript": Format("", "pytorch_libtorch", "model.pt"),
    "onnx": Format("_onnx", "onnxruntime_onnx", "model.onnx"),
    "tensorrt": Format("_trt", "tensorrt_plan", "model.plan"),
}
# What an ensemble is made of, around one of the formats: pictures in, scores out.
ENSEMBLE_MODELS = {
    "preprocess": Format("_preprocess", "", "model.py", "python"),
    "ensemble": Format("_ensemble", "ensemble", "model.ensemble"),  # the file is never there
}
TRITON_MODELS = {**FORMATS, **ENSEMBLE_MODELS}
