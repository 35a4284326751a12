"""Names, layouts and signatures of the tensors that all formats have in common."""

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    import numpy as np

# The PyTorch backend's convention. It is the default in all formats, so that a client only changes the name of the
# model. Source: the server's docs, user_guide/model_configuration.md, "Inputs and Outputs".
INPUT, OUTPUT = "INPUT__0", "OUTPUT__{}"
IMAGE = "IMAGE"
HEIGHT, WIDTH = "height", "width"  # the words of a picture's open dimensions
BATCH = "batch"  # the word of the batch dimension, which no spec can use for another one

Shape = list[int | str]  # without the batch; a word is an open dimension

# Why the answers of a graph with a certain operator differ from batch to batch, and what to do.
SHARED_SCALE = (
    "its {} takes one scale for a whole batch, so that requests change each other: onnx.dynamic_axes = false serves "
    "one at a time"
)


class InputTensor(TypedDict):
    """One input, as clients send it. Every stage reads the inputs from here, whatever table of the spec describes them.

    Attributes:
        name: Its name in every format.
        dtype: NumPy's name of its type, or "string".
        shape: Without the batch, which is the first dimension. None for a picture whose size only timm knows;
            pytorch_network.resolve_interface fills it in.
        layout: "nchw" or "nhwc" for a picture, otherwise None.
        low, high: The smallest and the largest value of random samples, both included. None: standard normal values.
        values: The values that random samples are chosen from, in place of low and high.
        batch_dimension: The dimension of the batch in the network itself. Artifacts transpose it to the first one.
    """

    name: str
    dtype: str
    shape: Shape | None
    layout: str | None
    low: float | None
    high: float | None
    values: list[int | float | bool | str] | None
    batch_dimension: int


class OutputTensor(TypedDict):
    """One output of [[outputs]].

    Attributes:
        name: Its name in every format.
        key: Where the answer of the network holds it: a key or an index, "encoder.last" in nested answers. None: its
            name if the answer has names, otherwise its position in [[outputs]].
        classes: Whether it has a value for each class.
        labels: Whether it has labels of its own, build/<model>/labels.<name>.txt.
        batch_dimension: The dimension of the batch in the network itself.
    """

    name: str
    key: str | int | None
    classes: bool
    labels: bool
    batch_dimension: int


class Range(TypedDict):
    """The lengths of an open dimension: the smallest, the one to tune for, and the largest."""

    min: int
    opt: int
    max: int


class OptimizationProfile(TypedDict):
    """The batches and lengths that one optimization profile of an engine takes, from the spec."""

    batch: Range
    dimensions: dict[str, Range]


class Normalization(TypedDict):
    """How an artifact prepares a picture that clients send as bytes. None: as timm's data config says."""

    shape: list[int] | None  # (channels, height, width)
    mean: list[float] | None
    std: list[float] | None
    scale: int  # the largest value of a pixel


class Interface(TypedDict):
    """The inputs and outputs of a model's artifacts. spec/interface.py makes it from the spec.

    Attributes:
        inputs: In the order of the artifacts' inputs.
        outputs: Empty: all tensors that the network answers with.
        dimensions: The range of each word in the shapes of the inputs.
        softmax, top_k: [output] of the spec.
        normalization: For uint8 pictures that artifacts normalize. Otherwise None.
    """

    inputs: list[InputTensor]
    outputs: list[OutputTensor]
    dimensions: dict[str, Range]
    softmax: bool
    top_k: int | None
    normalization: Normalization | None


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


def profile_shapes(profile: OptimizationProfile, shape: Shape) -> ProfileShapes:
    """Return the smallest, the tuned and the largest shape of an input in a profile, with the batch.

    Args:
        profile: Its batches, and the lengths of all words.
        shape: The shape of the input without the batch; a word is an open dimension.
    """

    def at(point: Literal["min", "opt", "max"]) -> list[int]:
        lengths = {word: bounds[point] for word, bounds in profile["dimensions"].items()}
        return [profile["batch"][point], *dims_at(shape, lengths)]

    return {"min": at("min"), "opt": at("opt"), "max": at("max")}


def misplaced_batch(output: str, shape: Sequence[int], batch: int) -> str:
    """Return the message about an output whose first dimension is not the batch, with the key that says where it is.

    Args:
        output: The output, as the message begins with it: "output 0".
        shape: Its shape.
        batch: The size of the batch that the inputs had.
    """
    found = f"{output} has shape {[*shape]} for a batch of {batch}; the batch must be its first dimension"
    if batch == 1 or batch not in shape:
        return found
    return f"{found}; if it is another one, say so: batch_dimension = {[*shape].index(batch)} in its [[outputs]]"


class Signature(TypedDict):
    """The content of <artifact>.signature.json. The keys after `outputs` exist for some formats only."""

    inputs: list[TensorSignature]
    outputs: list[TensorSignature]
    PyTorch: NotRequired[str]  # TorchScript: the version that traced or cast the file
    device_error: NotRequired[str]  # TorchScript: why the file cannot run on a GPU
    traced_away: NotRequired[
        str
    ]  # TorchScript, ONNX: the lines of the user's code whose decisions the trace cannot keep
    shared_scale: NotRequired[str]  # ONNX: the operator whose scale is that of a whole batch
    device: NotRequired[str]  # packages of AOTInductor: "gpu" or "cpu"
    needs_gpu: NotRequired[bool]  # TorchScript: it has operators that PyTorch has for GPUs only
    opset: NotRequired[int]  # ONNX
    ir_version: NotRequired[int]  # ONNX
    # Engines, packages: their optimization profiles, each by the name of each input with open dimensions
    profiles: NotRequired[list[dict[str, ProfileShapes]]]
    compiler: NotRequired[str]  # engines: "tensorrt" or "rtx"
    precision: NotRequired[str]  # engines, packages
    version_compatible: NotRequired[bool]  # plans
    TensorRT: NotRequired[str]  # plans: the version that built the file
    GPU: NotRequired[str]  # plans, packages: the GPU that the file was built on


def profile_batches(signature: Signature) -> list[tuple[int, int, int]]:
    """Return the smallest, the tuned and the largest batch of each optimization profile; empty without an open one."""
    name = signature["inputs"][0]["name"]
    points = [profile[name] for profile in signature.get("profiles", ()) if name in profile]
    return [(shapes["min"][0], shapes["opt"][0], shapes["max"][0]) for shapes in points]


def layout_dims(shape: Sequence[int], input_format: str) -> list[int]:
    """(channels, height, width) in the order of input.format."""
    channels, *size = shape
    return [*size, channels] if input_format == "uint8_nhwc" else [channels, *size]


def served_name(name: str) -> str:
    """Return a name of an answer or of a file as a tensor can have it in every format."""
    return re.sub(r"[^A-Za-z0-9_.:/-]", "_", name)


def can_be_argument(name: str) -> bool:
    """Return whether an argument of a TorchScript file can have a name.

    Triton's PyTorch backend finds an input by it. TorchScript reads names of ASCII letters, digits and _ alone, and its
    files call PyTorch's functions as `torch.add`.
    """
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name) and name not in ("self", "torch")


Feed = dict[str, "np.ndarray"]  # a batch of every input, by name


def batch_of(feed: Feed) -> int:
    """Return the number of samples in a feed."""
    return len(next(iter(feed.values())))


def take(feed: Feed, samples: "np.ndarray | slice | list[int]") -> Feed:
    """Return the samples of a feed with these indices, as arrays that are contiguous in memory."""
    import numpy as np

    return {name: np.ascontiguousarray(array[samples]) for name, array in feed.items()}


def resize(feed: Feed, size: int) -> Feed:
    """Return a feed of a number of samples: the first ones, or all with repeats."""
    import numpy as np

    return take(feed, np.arange(size) % batch_of(feed))


def reshape_dims(array: "np.ndarray", before: Sequence[int], after: Sequence[int]) -> "np.ndarray":
    """Return an array in other dims, as Triton reshapes it: the open dimensions keep their order and their lengths.

    Args:
        array: Its first dimension is the batch, unless dims contain it.
        before: The dims that it has; -1 for an open one.
        after: The dims that it gets.
    """
    if before == after:
        return array
    batch = array.shape[: array.ndim - len(before)]
    lengths = iter([length for length, dim in zip(array.shape[len(batch) :], before, strict=True) if dim == -1])
    return array.reshape(*batch, *(next(lengths) if dim == -1 else dim for dim in after))


def tuned_lengths(dimensions: Mapping[str, Range]) -> dict[str, int]:
    """Return the length to tune for of each open dimension."""
    return {word: bounds["opt"] for word, bounds in dimensions.items()}


def dims_at(shape: Sequence[int | str], lengths: Mapping[str, int]) -> list[int]:
    """Return a shape in which each word is replaced by its length."""
    return [lengths[dim] if isinstance(dim, str) else dim for dim in shape]


def signature_dims(shape: Sequence[int | str]) -> list[int]:
    """Return a shape in which each word is replaced by -1, as in signatures."""
    return [-1 if isinstance(dim, str) else dim for dim in shape]
