"""[[inputs]], [dimensions] and [[outputs]] of a spec, as types. See tables.py for the other tables."""

from typing import Annotated, Literal, get_args

from msgspec import Meta

from build_tasks.spec.engine_tables import Length, Word
from build_tasks.spec.picture_keys import Color, CropMode, CropShare, Files, Fill, Interpolation, Mean, Scale, Std
from build_tasks.spec.tables import END, Table, Text

# Triton's types except BF16, which NumPy and Triton's clients lack.
DType = Literal[
    "float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
    "string",
]  # fmt: skip
DTYPES: tuple[str, ...] = get_args(DType)
OTHER_SPELLINGS = {  # of NumPy, PyTorch, Triton and ONNX, without prefixes such as TYPE_ and torch.
    **{"fp32": "float32", "float": "float32", "single": "float32", "fp64": "float64", "double": "float64"},
    **{"fp16": "float16", "half": "float16", "long": "int64", "int": "int32", "short": "int16", "char": "int8"},
    **{"byte": "uint8", "boolean": "bool", "bool_": "bool", "bytes": "string", "str": "string", "object": "string"},
}
TensorName = Annotated[str, Meta(pattern=f"^[A-Za-z_][A-Za-z0-9_.:/-]*{END}", max_length=100)]
Number = int | float


class TensorInput(Table, kw_only=True):
    """One input that clients send, in the order of the network's arguments. In the place of [input]."""

    name: Annotated[
        TensorName | None,
        Meta(description="Its name: an argument of forward, or any other. Default: INPUT__0, INPUT__1, …"),
    ] = None
    dtype: Annotated[DType, Meta(description="Type of its values; string only for ONNX files.")] = "float32"
    shape: Annotated[
        Annotated[list[Length | Word], Meta(max_length=15)],
        Meta(description='Without the batch. A word is an open dimension: ["length"], [3, "height", "width"].'),
    ]
    dims: Annotated[
        Annotated[list[Length | Word], Meta(min_length=1)] | None,
        Meta(
            description="Shape that clients send in the place of shape: as many values, between the same words. "
            "With a fixed batch of 1 it is all that they send."
        ),
    ] = None
    layout: Annotated[
        Literal["nchw", "nhwc"] | None,
        Meta(
            description="Whether the channels of a picture are the first or the last dimension. The keys from color to "
            "fill are for pictures: samples and client examples are prepared as they say."
        ),
    ] = None
    low: Annotated[Number | None, Meta(description="Smallest value of random samples.")] = None
    high: Annotated[
        Number | None,
        Meta(description="Largest value of random samples, for token ids that of the vocabulary. Default: 1 for int."),
    ] = None
    values: Annotated[
        Annotated[list[int | float | bool | str], Meta(min_length=1)] | None,
        Meta(description="The values of random samples in the place of low and high: [1] for a mask."),
    ] = None
    batch_dimension: Annotated[
        int, Meta(ge=0, le=15, description="Dimension of the batch in the network. Clients send it first.")
    ] = 0
    ragged: Annotated[
        bool,
        Meta(
            description="Requests of several lengths form one batch, in which the network takes all values in one row "
            "(allow_ragged_batch); batch_input in [triton.onnx] says how it knows their lengths. For ONNX files."
        ),
    ] = False
    color: Color = None
    files: Files = None
    scale: Scale = 1
    mean: Mean = None
    std: Std = None
    interpolation: Interpolation = None
    crop_pct: CropShare = None
    crop_mode: CropMode = None
    fill: Fill = None


class Dimension(Table, kw_only=True):
    """The lengths of an open dimension, for all inputs whose shape has its word."""

    min: Annotated[Length, Meta(description="Smallest length.")] = 1
    opt: Annotated[Length | None, Meta(description="Length that engines are tuned for. Default: max.")] = None
    max: Annotated[Length, Meta(description="Largest length.")]


class TensorOutput(Table):
    """One output that is served. Without [[outputs]] all tensors of the network's answer are."""

    name: Annotated[
        TensorName | None,
        Meta(description="Its name. Default: its key if the answer has names, otherwise OUTPUT__0, OUTPUT__1, …"),
    ] = None
    key: Annotated[
        Annotated[str, Meta(min_length=1)] | Annotated[int, Meta(ge=0)] | None,
        Meta(description='Key or index in the answer, "encoder.last" in nested ones. Default: its name, or position.'),
    ] = None
    classes: Annotated[
        bool, Meta(description="Whether it has a value for each class, so that top-1 and top-5 are compared.")
    ] = False
    labels: Annotated[
        Text | None, Meta(description='Labels of its classes: "imagenet-1k", or a text file with one class per line.')
    ] = None
    dims: Annotated[
        Annotated[list[Length | Word], Meta(min_length=1)] | None,
        Meta(description="Shape that clients get: as many values as the network's, between the same open dimensions."),
    ] = None
    batch_dimension: Annotated[
        int, Meta(ge=0, le=15, description="Dimension of the batch in the network. Clients get it first.")
    ] = 0
