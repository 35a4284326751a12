"""The platform, the backend and the file names by which Triton knows a model format."""

from msgspec import Struct


class Platform(Struct, frozen=True):
    """The properties by which Triton loads the models of one format.

    Source: the server's docs/user_guide/model_configuration.md, and src/constants.h of its core.
    """

    suffix: str  # the Triton model's name is <model> + suffix
    platform: str  # empty if the config names a backend instead
    file: str  # the file's name in the folder of a version
    backend: str = ""


FORMATS = {
    "torchscript": Platform("", "pytorch_libtorch", "model.pt"),
    "onnx": Platform("_onnx", "onnxruntime_onnx", "model.onnx"),
    "tensorrt": Platform("_trt", "tensorrt_plan", "model.plan"),
    "aoti": Platform("_aoti", "torch_aoti", "model.pt2"),
}
# The parts of an ensemble besides one of the formats: encoded pictures in, scores out.
ENSEMBLE_MODELS = {
    "preprocess": Platform("_preprocess", "", "model.py", "python"),
    "ensemble": Platform("_ensemble", "ensemble", "model.ensemble"),  # this file never exists
}
TRITON_MODELS = {**FORMATS, **ENSEMBLE_MODELS}
