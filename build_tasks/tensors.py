"""Names and layouts of the tensors that every format has in common."""

from collections.abc import Sequence

# The PyTorch backend's convention, kept in every format, so that a client changes nothing but the model's name.
# Source: the server's docs, user_guide/model_configuration.md, "Inputs and Outputs".
INPUT, OUTPUT = "INPUT__0", "OUTPUT__{}"
IMAGE = "IMAGE"


def layout_dims(shape: Sequence[int], input_format: str) -> list[int]:
    """(channels, height, width) in the order of input.format."""
    channels, *size = shape
    return [*size, channels] if input_format == "uint8_nhwc" else [channels, *size]
