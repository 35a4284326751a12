"""The spec of a model, and everything that follows from it: which artifacts are built, and under which names.

The spec is data. Reading it runs no code of the model and imports nothing heavy.
"""

import os
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct, field, to_builtins

from build_tasks.paths import BUILD, MODELS
from build_tasks.spec.tables import (
    ENGINES,
    NATIVE_PRECISIONS,
    TRITON_KEYS,
    Accuracy,
    Architecture,
    Engine,
    Formats,
    Input,
    MemoryFormat,
    Onnx,
    Output,
    Positive,
    Table,
    Text,
    TorchScript,
    Weights,
)
from build_tasks.triton.platforms import ENSEMBLE_MODELS, FORMATS, TRITON_MODELS

if TYPE_CHECKING:
    from build_tasks.triton.serving_facts import ServingFacts


class Spec(Table, kw_only=True):
    """The model."""

    architecture: Architecture = field(default_factory=Architecture)
    weights: Weights
    input: Input = field(default_factory=Input)
    output: Output = field(default_factory=Output)
    formats: Annotated[Formats, Meta(description="Formats to build.")] = field(
        default_factory=lambda: ["torchscript", "onnx", "tensorrt"]
    )
    max_batch_size: Annotated[Positive, Meta(description="Largest batch that is served and checked.")] = 32
    ensemble: Annotated[
        Literal["torchscript", "onnx", "tensorrt"] | None,
        Meta(description="Also serve this format as an ensemble, which takes encoded pictures and prepares them."),
    ] = None
    labels: Annotated[
        Text | None, Meta(description='"imagenet-1k", or a text file of the model with one class per line.')
    ] = None
    torchscript: TorchScript = field(default_factory=TorchScript)
    onnx: Onnx = field(default_factory=Onnx)
    engine: Engine = field(default_factory=Engine)
    accuracy: Accuracy = field(default_factory=Accuracy)
    triton: Annotated[
        dict[str, Any],
        Meta(description="How Triton serves the model. Fields of Triton's ModelConfig, and keys of this project."),
    ] = field(default_factory=dict)

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


def table_settings(table: Table) -> dict[str, Any]:
    """Return a table as plain data, as it is recorded in a stage's fingerprint."""
    plain: dict[str, Any] = to_builtins(table)
    return plain


def split_source(source: str) -> tuple[str, str]:
    """Return (scheme, rest) of weights.source. A path without a scheme has the scheme "file"."""
    scheme, separator, rest = source.partition("://")
    return (scheme, rest) if separator else ("file", source)
