"""models/<model>/model.toml: what a model's owner can ask for.

The spec is data: reading it executes nothing of the model and imports nothing heavy.
"""

import os
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct, field, to_builtins

from build_tasks.paths import BUILD, MODELS
from build_tasks.triton.platforms import ENSEMBLE_MODELS, FORMATS, TRITON_MODELS

if TYPE_CHECKING:
    from build_tasks.triton.serving_facts import ServingFacts

ENGINES = ("tensorrt", "rtx")  # formats that are compiled; an engine of TensorRT-RTX is no model of Triton's

# Precisions that the fp32 graph stands for as it is: TensorRT's flag TF32 tells them apart.
NATIVE_PRECISIONS = ("fp32", "tf32")
QUANTIZED_PRECISIONS = ("int8", "fp8")
REDUCED_PRECISIONS = ("fp16", "bf16", *QUANTIZED_PRECISIONS)

# Keys of [triton] that are no fields of ModelConfig, and what holds where the spec does not have them. Comments behind
# keys, here and below, are what editors and docs/reference/spec.md tell of them (see schema.py).
TRITON_KEYS: dict[str, Any] = {
    "release": "26.08",  # of Triton, whose server will serve
    "device": "auto",  # "gpu", "cpu", or whichever the server has
    "warm_up": 64,  # TorchScript on a GPU is warmed up at every batch up to this one, and at the largest
    "keep_versions": 1,  # versions that stay in the repository
    "provenance": True,  # of each version, as parameters
}

Positive = Annotated[int, Meta(ge=1)]
Text = Annotated[str, Meta(min_length=1)]
Size = Annotated[list[Positive], Meta(min_length=2, max_length=2)]  # H, W
Share = Annotated[float, Meta(ge=0, le=1)]
Formats = Annotated[list[Literal["torchscript", "onnx", "tensorrt", "rtx"]], Meta(min_length=1)]
InputFormat = Literal["fp32_nchw", "uint8_nhwc"]
MemoryFormat = Literal["contiguous", "channels_last"]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
Capability = Annotated[str, Meta(pattern=r"^[1-9][0-9]?\.[0-9]$")]  # a compute capability, "8.6"


class Table(Struct, forbid_unknown_fields=True, kw_only=True):
    """A table of the spec; `to_builtins` gives what a stage takes into its fingerprint."""


class Architecture(Table):
    """The network; nothing of it where weights.source is an ONNX file, which holds it."""

    timm: Text | None = None  # a timm architecture, "efficientnet_b3"
    network: str | None = None  # or a function of the model's own: "network.py:build"
    arguments: dict[str, Any] = {}  # passed to whichever of the two makes the module


class Weights(Table):
    """Where the network's weights come from; an ONNX file is the network itself."""

    source: Text  # hf://, https://, http://, timm://, package://, random:// and a seed, or a path in the model's folder
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None  # refused if the file has another
    converter: str | None = None  # "convert.py:function", from the file's keys to the network's


class Input(Table):
    """What clients send; overrides of the architecture's own preprocessing (timm's data config)."""

    format: InputFormat = "fp32_nchw"  # what clients send; uint8_nhwc is scaled, normalised and transposed inside
    shape: Annotated[list[Positive], Meta(min_length=3, max_length=3)] | None = None  # C, H, W
    min_size: Size | None = None  # H, W; with max_size: height and width stay open between the two
    max_size: Size | None = None  # H, W
    mean: list[float] | None = None  # of each channel, of pixels from 0 to 1
    std: list[Annotated[float, Meta(gt=0)]] | None = None  # likewise
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None  # of resized pictures
    crop_pct: Annotated[float, Meta(gt=0, le=1)] | None = None  # share of the resized picture that is kept
    crop_mode: Literal["center", "squash", "border"] | None = None  # how a picture that is not square fits


class Output(Table):
    """What clients get, in every format, in the place of the network's one output of (batch, classes)."""

    softmax: bool = False  # probabilities
    top_k: Positive | None = None  # the largest values, OUTPUT__0, and their classes, OUTPUT__1


class TorchScript(Table):
    """What PyTorch serves: model.pt, or what is cast from it. Inputs and outputs stay as they are."""

    precision: Literal["fp32", "fp16", "bf16"] | None = None  # fp16 without it where triton.device = "gpu", else fp32
    memory_format: MemoryFormat | None = None  # of images and filters; channels_last without it in fp16 and bf16


class Onnx(Table):
    """The export to ONNX."""

    exporter: Literal["auto", "torchscript", "dynamo"] = "auto"  # of torch; auto: dynamo where the other one fails
    opset: Annotated[int, Meta(ge=7, le=23)] = 17  # of ONNX's operators
    dynamic_axes: bool = True  # the batch dimension stays open
    batch_size: Positive = 1  # of the example that is exported; the batch itself where dynamic_axes is false
    external_data: bool = False  # weights in a file of their own; always so above 2 GB


class Engine(Table):
    """What TensorRT and TensorRT-RTX compile."""

    # the graph that is compiled
    precision: Precision = "fp16"  # of the graph; tf32 is a flag of the builder
    keep_fp32: list[Text] = []  # operator types, or regular expressions of node names
    keep_io_types: bool = True  # fp32 inputs and outputs, whatever is computed inside; fp16 may have its own
    calibration: Text | None = None  # samples for int8 and fp8, as accuracy.samples, which serve without it
    repair: bool = False  # where the gate fails, find the nodes to leave out of the precision, and lock them
    # its optimisation profile
    min_batch_size: Positive | None = None  # 1 without it; onnx.batch_size in all three where the batch is fixed
    opt_batch_size: Positive | None = None  # which it is tuned for; at most 8 without it
    max_batch_size: Positive | None = None  # what is served without it
    # the builder
    workspace: Positive | None = None  # MiB; all of the GPU's memory without it
    optimization_level: Annotated[int, Meta(ge=0, le=5)] = 3  # higher: longer builds, perhaps faster engines
    sparse_weights: bool = False  # kernels for weights of which two in four are zero
    refittable: bool = False  # its weights can be replaced
    strip_plan: bool = False  # without its weights, which are refitted where it runs
    profiling_verbosity: Literal["none", "layer_names_only", "detailed"] = "layer_names_only"  # of what profilers see
    # TensorRT alone
    compute_capabilities: list[Capability] = []  # a plan for each in one Triton model; of this machine's GPU without it
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"  # GPUs besides its own
    version_compatible: bool = False  # runs with newer versions of TensorRT, too
    timing_cache: Text | None = None  # a file in the model's folder, used and never written; build/ keeps its own
    # TensorRT-RTX alone
    rtx_compute_capabilities: list[Capability] = []  # of the GPUs it shall run on; all that it knows without it


class Gate(Table):
    """Limits for the artifacts that fit; the last rule that names a metric wins. See gate.py for what holds without."""

    # of all without it
    format: Literal["torchscript", "onnx", "graph", "tensorrt"] | None = None  # graph: what engines are compiled from
    precision: Precision | None = None  # of the artifact; model.onnx is fp32
    output: Text | None = None  # "OUTPUT__0"
    # at most
    relative_l2: Annotated[float, Meta(gt=0, lt=1)] | None = None  # norm of the difference over the reference's
    max_absolute: Annotated[float, Meta(gt=0, lt=1e30)] | None = None  # of any value
    top1_drop: Share | None = None  # of the share of samples that are recognised, where accuracy.truth says what is
    top5_drop: Share | None = None  # likewise, among the five strongest
    # at least
    cosine: Annotated[float, Meta(ge=-1, le=1)] | None = None  # of the worst sample, as is
    snr: Annotated[float, Meta(ge=-200, le=200)] | None = None  # the signal-to-noise ratio, in dB
    top1: Share | None = None  # share of samples whose strongest class stays the same
    top5: Share | None = None  # … whose strongest class stays among the five strongest


class Accuracy(Table):
    """What artifacts are compared on, and how far off they may be."""

    samples: Text | None = None  # a folder of images, .npz or .json in the model's folder; the shipped photographs else
    truth: Text | None = None  # a CSV file of lines `sample,class`, or "folders": each image stands in its class's
    gate: list[Gate] = []  # limits; by precision and the network's own sensitivity without it
    allow_untestable: bool = False  # publish a model whose outputs say nothing about accuracy


class Spec(Table, kw_only=True):
    """A model of the repository."""

    architecture: Architecture = field(default_factory=Architecture)
    weights: Weights
    input: Input = field(default_factory=Input)
    output: Output = field(default_factory=Output)
    formats: Formats = field(default_factory=lambda: ["torchscript", "onnx", "tensorrt"])  # what is built
    max_batch_size: Positive = 32  # the largest batch that is served, and that is checked
    ensemble: Literal["torchscript", "onnx", "tensorrt"] | None = None  # pictures in, preprocessed for this format
    labels: Text | None = None  # "imagenet-1k", or a text file in the model's folder, one class per line
    torchscript: TorchScript = field(default_factory=TorchScript)
    onnx: Onnx = field(default_factory=Onnx)
    engine: Engine = field(default_factory=Engine)
    accuracy: Accuracy = field(default_factory=Accuracy)
    triton: dict[str, Any] = {}  # TRITON_KEYS; fields of Triton's ModelConfig; tables of such for single formats

    @property
    def profile(self) -> tuple[int, int, int]:
        """Smallest, best and largest batch of the engine: 1, at most 8, and what is served; or the fixed batch."""
        engine = self.engine
        if not self.onnx.dynamic_axes:
            return self.onnx.batch_size, self.onnx.batch_size, self.onnx.batch_size
        largest = engine.max_batch_size or max(self.max_batch_size, engine.min_batch_size or 1)
        smallest = engine.min_batch_size or 1
        return smallest, engine.opt_batch_size or max(smallest, min(8, largest)), largest

    @property
    def sizes(self) -> list[list[int]] | None:
        """The smallest and the largest (height, width), None where the size is fixed."""
        small, large = self.input.min_size, self.input.max_size
        return [small, large] if small and large else None

    @property
    def largest_image(self) -> list[int]:
        """(channels, height, width) of the largest input; a guess where the architecture alone knows it."""
        shape = self.input.shape or [3, 320, 320]
        return [shape[0], *self.input.max_size] if self.input.max_size else shape

    @property
    def from_onnx(self) -> bool:
        """Whether the source is an ONNX file: there is no PyTorch network, and answers are compared with the file's."""
        return re.search(r"\.onnx([@?#].*)?$", self.weights.source) is not None

    @property
    def has_engine(self) -> bool:
        """Whether any format is an engine."""
        return not set(ENGINES).isdisjoint(self.formats)


class Model(Struct, frozen=True):
    name: str
    spec: Spec

    @property
    def file(self) -> str:
        return f"{MODELS}/{self.name}/model.toml"

    def source(self, path: str) -> str:
        """A path of the spec, which is relative to the model's folder."""
        return os.path.normpath(f"{MODELS}/{self.name}/{path}") if not os.path.isabs(path) else path

    def artifact(self, file: str) -> str:
        return f"{BUILD}/{self.name}/{file}"

    @property
    def weights(self) -> str:
        """The artifact that holds the weights; of an ONNX file, the network too."""
        return self.artifact("weights.onnx" if self.spec.from_onnx else "weights.safetensors")

    @property
    def reference(self) -> str:
        """What answers to the accuracy samples, so that artifacts can be compared with it."""
        return "ONNX Runtime" if self.spec.from_onnx else "PyTorch"

    def triton_name(self, model_format: str) -> str:
        return self.name + TRITON_MODELS[model_format].suffix

    @property
    def served_formats(self) -> list[str]:
        """The formats that become a model of Triton's."""
        return [model_format for model_format in self.spec.formats if model_format in FORMATS]

    def largest_batch(self, model_format: str) -> int:
        """The largest batch of a model of Triton's; 0 where the batch is fixed, and stands in the dims."""
        bounds = [self.spec.max_batch_size]
        if model_format in ("onnx", "tensorrt") and not self.spec.onnx.dynamic_axes:
            return 0
        if model_format == "tensorrt":
            bounds.append(self.spec.profile[2])
        table = self.spec.triton.get(model_format)
        own = table.get("max_batch_size") if isinstance(table, dict) else None
        return min(*bounds, own) if type(own) is int and own > 0 else min(bounds)

    @property
    def ensemble_parts(self) -> list[str]:
        """What of an ensemble becomes a model of Triton's."""
        return list(ENSEMBLE_MODELS) if self.spec.ensemble else []

    @property
    def plans(self) -> dict[str, str | None]:
        """The files of TensorRT's plans, and the compute capability of each; None for that of whatever GPU is here."""
        capabilities = self.spec.engine.compute_capabilities
        return {f"model.sm{c.replace('.', '')}.plan": c for c in capabilities} or {"model.plan": None}

    @property
    def triton_models(self) -> dict[str, str]:
        """Its models of Triton's, by name, and what each is."""
        formats = {
            **dict.fromkeys(self.served_formats, "format"),
            **dict.fromkeys(self.ensemble_parts, "the ensemble's"),
        }
        return {self.triton_name(model_format): f"{what} {model_format}" for model_format, what in formats.items()}

    @property
    def torchscript(self) -> TorchScript:
        """[torchscript] with its defaults, as measured on an H100 (docs/how-to/torchscript-on-gpu.md)."""
        asked = self.spec.torchscript
        precision = asked.precision or ("fp16" if self.triton("device") == "gpu" else "fp32")
        default: MemoryFormat = "contiguous" if precision == "fp32" else "channels_last"
        return TorchScript(precision=precision, memory_format=asked.memory_format or default)

    @property
    def is_cast(self) -> bool:
        """Whether PyTorch serves another file than model.pt."""
        as_it_is = TorchScript(precision="fp32", memory_format="contiguous")
        return "torchscript" in self.spec.formats and self.torchscript != as_it_is

    def precision(self, model_format: str) -> str:
        """Of what is served."""
        if model_format == "torchscript":
            return str(self.torchscript.precision)
        return self.spec.engine.precision if model_format == "tensorrt" else "fp32"

    def files(self, model_format: str) -> list[str]:
        """The artifacts that are served together as one model of Triton's."""
        if model_format == "tensorrt":
            return list(self.plans)
        cast = model_format == "torchscript" and self.is_cast
        return [f"model.{self.torchscript.precision}.pt" if cast else FORMATS[model_format].file]

    def plan_suffix(self, plan: str) -> str:
        """Which of several plans a file is, ".sm86"; nothing where it is the only one."""
        return "" if self.plans[plan] is None else "." + plan.split(".")[1]

    def artifact_task_name(self, model_format: str, file: str) -> str:
        """What an artifact's tasks are called after: the model of Triton's, and which of several plans it is."""
        return self.triton_name(model_format) + (self.plan_suffix(file) if model_format == "tensorrt" else "")

    def graph_file(self, precision: str) -> str:
        """The ONNX file that an engine of a precision is compiled from."""
        return "model.onnx" if precision in NATIVE_PRECISIONS else f"model.{precision}.onnx"

    def graph_name(self, precision: str) -> str:
        """What the tasks of this file are called after, where it is not served; no model's name has a dot."""
        return f"{self.name}.{precision}"

    @property
    def graph(self) -> str:
        """The ONNX file that this model's engines are compiled from."""
        return self.graph_file(self.spec.engine.precision)

    @property
    def converted(self) -> bool:
        """Whether engines are compiled from a graph of reduced precision."""
        return self.spec.has_engine and self.graph != "model.onnx"

    @property
    def graph_gated_separately(self) -> bool:
        """Whether engines are compiled from a graph that is not served, and so is judged on its own."""
        return self.spec.has_engine and (self.converted or "onnx" not in self.spec.formats)

    def triton(self, key: str) -> Any:
        """One of TRITON_KEYS."""
        return self.spec.triton.get(key, TRITON_KEYS[key])

    @property
    def config_fields(self) -> dict[str, Any]:
        """[triton] without TRITON_KEYS: fields of Triton's ModelConfig, and a table of fields by format."""
        return {key: value for key, value in self.spec.triton.items() if key not in TRITON_KEYS}

    @property
    def serving_facts(self) -> "ServingFacts":
        """What the checks of a ModelConfig need to know of this model."""
        from build_tasks.triton.serving_facts import ServingFacts

        model_formats = (*self.served_formats, *self.ensemble_parts)
        return ServingFacts(
            config_fields=self.config_fields,
            model_formats=model_formats,
            device=self.triton("device"),
            keep_versions=self.triton("keep_versions"),
            max_batch_size=self.spec.max_batch_size,
            largest_batches={model_format: self.largest_batch(model_format) for model_format in model_formats},
            profile=self.spec.profile,
            warm_up_folder=self.warm_up_folder,
        )

    @property
    def warm_up_folder(self) -> str:
        """The folder of the files that `model_warmup` of [triton] names."""
        return self.source("warmup")

    @property
    def release(self) -> str:
        """Triton's release that will serve, "26.08": the one of its container images."""
        return str(self.triton("release"))

    @property
    def seed(self) -> int | None:
        """The seed of random weights, None for real ones."""
        scheme, rest = split_source(self.spec.weights.source)
        return int(rest) if scheme == "random" else None


def settings(table: Table) -> dict[str, Any]:
    """A table as plain data, as it stands in a stage's fingerprint."""
    plain: dict[str, Any] = to_builtins(table)
    return plain


def split_source(source: str) -> tuple[str, str]:
    """(scheme, rest) of a weights source; a bare path has the scheme "file"."""
    scheme, separator, rest = source.partition("://")
    return (scheme, rest) if separator else ("file", source)
