"""Names, layouts and signatures of the tensors that all formats have in common."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

# The PyTorch backend's convention. All formats use it, so that a client only changes the name of the model.
# Source: the server's docs, user_guide/model_configuration.md, "Inputs and Outputs".
INPUT, OUTPUT = "INPUT__0", "OUTPUT__{}"
IMAGE = "IMAGE"


class TensorSignature(TypedDict):
    """One input or output of an artifact."""

    name: str
    dtype: str  # NumPy's name, "float32"; "bytes" for encoded pictures
    shape: list[int]  # with the batch; -1 for an open dimension


class ProfileShapes(TypedDict):
    """The shapes of one input in an optimization profile of TensorRT, with the batch."""

    min: list[int]
    opt: list[int]
    max: list[int]


class Signature(TypedDict):
    """The content of <artifact>.signature.json. The keys after `outputs` exist for some formats only."""

    inputs: list[TensorSignature]
    outputs: list[TensorSignature]
    PyTorch: NotRequired[str]  # TorchScript: the version that traced or cast the file
    device_error: NotRequired[str]  # TorchScript: why the file cannot run on a GPU
    traced_away: NotRequired[str]  # TorchScript: the lines of the user's code whose decisions the trace cannot keep
    opset: NotRequired[int]  # ONNX
    ir_version: NotRequired[int]  # ONNX
    profile: NotRequired[dict[str, ProfileShapes]]  # engines: by the name of each input with open dimensions
    compiler: NotRequired[str]  # engines: "tensorrt" or "rtx"
    precision: NotRequired[str]  # engines
    version_compatible: NotRequired[bool]  # plans
    TensorRT: NotRequired[str]  # plans: the version that built the file
    GPU: NotRequired[str]  # plans: the GPU that the file was built on


def layout_dims(shape: Sequence[int], input_format: str) -> list[int]:
    """(channels, height, width) in the order of input.format."""
    channels, *size = shape
    return [*size, channels] if input_format == "uint8_nhwc" else [channels, *size]
