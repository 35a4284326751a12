"""The tables of models/<model>/model.toml, as types: what a user can set for a model.

Every key has a description. Editors show it through models/model.schema.json, and docs/reference/spec.md is made from
it (see json_schema.py).
"""

from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from build_tasks.spec.picture_keys import Color, CropMode, CropShare, Files, Fill, Interpolation, Mean, Scale, Std

ENGINES = ("tensorrt", "rtx")  # formats that are compiled; Triton cannot serve an engine of TensorRT-RTX

# An engine of these precisions is compiled from the fp32 graph. TensorRT's flag TF32 makes the difference.
NATIVE_PRECISIONS = ("fp32", "tf32")
QUANTIZED_PRECISIONS = ("int8", "fp8")
REDUCED_PRECISIONS = ("fp16", "bf16", *QUANTIZED_PRECISIONS)

END = r"$(?!\n)"  # of a pattern: Python's $ alone also matches before a line break at the end
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Batch = Annotated[int, Meta(ge=1, le=65536)]
Pixels = Annotated[int, Meta(ge=1, le=65536)]
Versions = Annotated[int, Meta(ge=1, le=1000)]
MAX_CORES = 1024  # a larger number is probably a slip
Cores = Annotated[int, Meta(ge=1, le=MAX_CORES)]
Text = Annotated[str, Meta(min_length=1)]
Size = Annotated[list[Pixels], Meta(min_length=2, max_length=2)]  # height, width
Shape = Annotated[list[Pixels], Meta(min_length=3, max_length=3)]  # channels, height, width
Sha256 = Annotated[str, Meta(pattern=f"^[0-9a-f]{{64}}{END}")]
Share = Annotated[float, Meta(ge=0, le=1)]
RelativeError = Annotated[float, Meta(gt=0, lt=1)]
AbsoluteError = Annotated[float, Meta(gt=0, lt=1e30)]
Cosine = Annotated[float, Meta(ge=-1, le=1)]
Decibels = Annotated[float, Meta(ge=-200, le=200)]
ServedFormat = Literal["torchscript", "onnx", "tensorrt", "aoti"]
Formats = Annotated[list[ServedFormat | Literal["rtx"]], Meta(min_length=1)]
InputFormat = Literal["fp32_nchw", "uint8_nhwc"]
MemoryFormat = Literal["contiguous", "channels_last"]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
PyTorchPrecision = Annotated[
    Literal["fp32", "fp16", "bf16"] | None,
    Meta(description='Precision of the computation. Default: fp16 if triton.device = "gpu", fp32 otherwise.'),
]
Capability = Annotated[str, Meta(pattern=rf"^[1-9][0-9]?\.[0-9]{END}")]  # a compute capability, "8.6"
Device = Literal["auto", "gpu", "cpu"]
DEVICES: tuple[str, ...] = get_args(Device)
RELEASE = rf"^2[0-9]\.(0[1-9]|1[0-2]){END}"


class Table(Struct, forbid_unknown_fields=True, kw_only=True):
    """A table of the spec."""


class Architecture(Table):
    """The network. Leave it out if weights.source contains the network: ONNX, TorchScript or torch.export."""

    timm: Annotated[Text | None, Meta(description='Name of a timm architecture, "efficientnet_b3".')] = None
    network: Annotated[str | None, Meta(description='A function that builds your own network, "network.py:build".')] = (
        None
    )
    arguments: Annotated[dict[str, Any], Meta(description="Arguments of timm.create_model or of your function.")] = {}


class Weights(Table):
    """The source of the weights. Files of ONNX, TorchScript and torch.export contain the network too."""

    source: Annotated[
        Text,
        Meta(
            description="hf://, https://, http://, timm://, package://, random:// and a seed, or a file of the model."
        ),
    ]
    sha256: Annotated[Sha256 | None, Meta(description="SHA-256 digest that the file must have.")] = None
    prefix: Annotated[
        Text | None,
        Meta(description='Take only the tensors whose name begins with this, without it: "backbone.".'),
    ] = None
    ema: Annotated[
        bool,
        Meta(description="Take the average of the weights (EMA, SWA) from a checkpoint that holds both."),
    ] = False
    converter: Annotated[
        str | None,
        Meta(description='A function that renames the tensors of the file, "convert.py:function".'),
    ] = None


class Input(Table):
    """The input that clients send. Keys that are left out are those of the architecture (timm's data config)."""

    format: Annotated[
        InputFormat,
        Meta(
            description="Type and layout. With uint8_nhwc, the model scales, normalizes and transposes pixels itself."
        ),
    ] = "fp32_nchw"
    shape: Annotated[Shape | None, Meta(description="[channels, height, width].")] = None
    min_size: Annotated[
        Size | None, Meta(description="Smallest [height, width]. With max_size, height and width are open.")
    ] = None
    max_size: Annotated[Size | None, Meta(description="Largest [height, width].")] = None
    color: Color = None
    files: Files = None
    scale: Scale = 1
    mean: Mean = None
    std: Std = None
    interpolation: Interpolation = None
    crop_pct: CropShare = None
    crop_mode: CropMode = None
    fill: Fill = None


class Output(Table):
    """The outputs, in every format. Without these keys the network's own output of (batch, classes) is served."""

    softmax: Annotated[bool, Meta(description="Return probabilities instead of logits.")] = False
    top_k: Annotated[
        Positive | None, Meta(description="Return only the k largest values, OUTPUT__0, and their classes, OUTPUT__1.")
    ] = None


class TorchScript(Table):
    """The TorchScript file that is served: model.pt or a cast of it. The types of inputs and outputs stay the same."""

    precision: PyTorchPrecision = None
    memory_format: Annotated[
        MemoryFormat | None,
        Meta(description="Memory format of images and filters. Default: channels_last for fp16 and bf16."),
    ] = None


class Onnx(Table):
    """The export to ONNX."""

    precision: Annotated[
        Literal["fp32", "fp16", "bf16"],
        Meta(description="Precision of the graph that Triton serves. Inputs and outputs stay fp32."),
    ] = "fp32"
    exporter: Annotated[
        Literal["auto", "torchscript", "dynamo"],
        Meta(description="Exporter of torch. auto tries torchscript first and dynamo if it fails."),
    ] = "auto"
    opset: Annotated[
        Annotated[int, Meta(ge=7, le=23)] | Literal["auto"],
        Meta(description="Version of ONNX's operator set. auto: 17, or the next one that the exporter can write."),
    ] = "auto"
    dynamic_axes: Annotated[bool, Meta(description="Leave the batch dimension open.")] = True
    batch_size: Annotated[
        Batch, Meta(description="Batch of the example that is exported; the fixed batch if dynamic_axes = false.")
    ] = 1
    external_data: Annotated[
        bool, Meta(description="Store the weights in a separate file. Above 2 GB this is always done.")
    ] = False


class Aoti(Table):
    """The package that AOTInductor compiles for one kind of machine. The types of inputs and outputs stay the same."""

    precision: PyTorchPrecision = None
    compute_capabilities: Annotated[
        list[Capability],
        Meta(description="Build one package for each, all in one Triton model. Default: this machine's GPU or CPU."),
    ] = []


class Gate(Table):
    """Limits for some artifacts. If several rules set a metric, the last one counts. Defaults: accuracy.md."""

    # The artifacts that the rule is for
    format: Annotated[
        ServedFormat | Literal["graph"] | None,
        Meta(description="Format that the rule is for; graph: what engines are compiled from. Default: all."),
    ] = None
    precision: Annotated[
        Precision | None, Meta(description="Precision that the rule is for; model.onnx is fp32. Default: all.")
    ] = None
    output: Annotated[Text | None, Meta(description='Output that the rule is for, "OUTPUT__0". Default: all.')] = None
    # Upper limits
    relative_l2: Annotated[
        RelativeError | None,
        Meta(description="Upper limit: L2 norm of the difference, relative to that of the reference."),
    ] = None
    max_absolute: Annotated[
        AbsoluteError | None, Meta(description="Upper limit: absolute difference of any value.")
    ] = None
    top1_drop: Annotated[
        Share | None, Meta(description="Upper limit: loss of top-1 accuracy, which needs accuracy.truth.")
    ] = None
    top5_drop: Annotated[
        Share | None, Meta(description="Upper limit: loss of top-5 accuracy, which needs accuracy.truth.")
    ] = None
    # Lower limits
    cosine: Annotated[Cosine | None, Meta(description="Lower limit: cosine similarity of the worst sample.")] = None
    snr: Annotated[Decibels | None, Meta(description="Lower limit: signal-to-noise ratio in dB.")] = None
    top1: Annotated[
        Share | None, Meta(description="Lower limit: share of samples whose strongest class stays the same.")
    ] = None
    top5: Annotated[
        Share | None,
        Meta(description="Lower limit: share of samples whose strongest class stays among the five strongest."),
    ] = None


class Accuracy(Table):
    """The samples on which artifacts are compared with the reference, and the allowed differences."""

    samples: Annotated[
        Text | None,
        Meta(
            description="A folder of pictures, of .npz files or of both, an .npz or a .json file. Default: the shipped "
            "photographs; with [[inputs]], random values by their ranges."
        ),
    ] = None
    truth: Annotated[
        Text | None,
        Meta(description='A CSV file of lines `sample,class`, or "folders": each image lies in a folder of its class.'),
    ] = None
    gate: Annotated[
        list[Gate], Meta(description="Limits. Default: by precision and by the network's own sensitivity.")
    ] = []
    allow_untestable: Annotated[
        bool, Meta(description="Publish the model although its outputs are too weak to test the accuracy.")
    ] = False


class Card(Table):
    """What the model card in bom.cdx.json says about the model."""

    license: Annotated[
        Text | None,
        Meta(description="License of the weights, as an SPDX expression. Default: what their source states."),
    ] = None
    training_data: Annotated[Text | None, Meta(description="The data that the network was trained with.")] = None


class TritonKeys(Table):
    """The keys of [triton] that are not fields of Triton's ModelConfig."""

    release: Annotated[
        str, Meta(pattern=RELEASE, description="Release of the Triton server that will serve the model.")
    ] = "26.08"
    device: Annotated[Device, Meta(description="Device of the instances; auto: a GPU if the server has one.")] = "auto"
    cores: Annotated[
        Cores | None,
        Meta(description='Number of cores of a CPU server (device = "cpu"): instances and threads follow from it.'),
    ] = None
    warm_up: Annotated[
        Batch,
        Meta(description="TorchScript on a GPU: warm up with every batch up to this one, and with the largest."),
    ] = 64
    keep_versions: Annotated[Versions, Meta(description="Number of versions that stay in the repository.")] = 1
    first_version: Annotated[Versions, Meta(description="Number of the first version that is published.")] = 1
    provenance: Annotated[
        bool, Meta(description="Write the provenance of each version into the parameters of config.pbtxt.")
    ] = True
