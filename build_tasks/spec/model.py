"""The spec of a model, and everything that follows from it: which artifacts are built, and under which names.

The spec is data. Reading it runs no code of the model and imports nothing heavy.
"""

import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field, to_builtins
from msgspec.structs import replace

from build_tasks.paths import BUILD, MODELS
from build_tasks.spec.engine_tables import Engine, Profile
from build_tasks.spec.ensemble_tables import Ensemble, EnsembleStep, ensemble_parts, own_steps, python_folders
from build_tasks.spec.tables import (
    ENGINES,
    NATIVE_PRECISIONS,
    Accuracy,
    Architecture,
    Batch,
    Card,
    Formats,
    Input,
    MemoryFormat,
    Onnx,
    Output,
    Table,
    Text,
    TorchScript,
    TritonKeys,
    Weights,
)
from build_tasks.spec.tensor_tables import Dimension, TensorInput, TensorOutput, Word
from build_tasks.triton import releases
from build_tasks.triton.platforms import ENSEMBLE_MODELS, FORMATS, TRITON_MODELS


class Spec(Table, kw_only=True):
    """The model."""

    architecture: Architecture = field(default_factory=Architecture)
    weights: Weights
    input: Input = field(default_factory=Input)
    inputs: Annotated[list[TensorInput], Meta(description="The inputs, if they are not one picture.")] = field(
        default_factory=list
    )
    dimensions: Annotated[dict[Word, Dimension], Meta(description="Open dimensions of [[inputs]].")] = field(
        default_factory=dict
    )
    output: Output = field(default_factory=Output)
    outputs: Annotated[list[TensorOutput], Meta(description="The outputs. Default: all.")] = field(default_factory=list)
    formats: Annotated[Formats, Meta(description="Formats to build.")] = field(
        default_factory=lambda: ["torchscript", "onnx", "tensorrt"]
    )
    max_batch_size: Annotated[Batch, Meta(description="Largest batch that is served and checked.")] = 32
    ensemble: Annotated[
        Literal["torchscript", "onnx", "tensorrt"] | Ensemble | None,
        Meta(description="Also serve this format as an ensemble, which takes encoded pictures and prepares them."),
    ] = None
    labels: Annotated[
        Text | None, Meta(description='"imagenet-1k", or a text file of the model with one class per line.')
    ] = None
    torchscript: TorchScript = field(default_factory=TorchScript)
    onnx: Onnx = field(default_factory=Onnx)
    engine: Engine = field(default_factory=Engine)
    accuracy: Accuracy = field(default_factory=Accuracy)
    card: Card = field(default_factory=Card)
    triton: Annotated[
        dict[str, Any],
        Meta(description="How Triton serves the model. Fields of Triton's ModelConfig, and keys of this project."),
    ] = field(default_factory=dict)

    @property
    def profile(self) -> tuple[int, int, int]:
        """Smallest, best and largest batch of the engine. Of several profiles, the best batch is that of the first."""
        tables: Sequence[Engine | Profile] = self.engine.profiles or [self.engine]
        batches = [self.batches_of(table) for table in tables]
        return min(each[0] for each in batches), batches[0][1], max(each[2] for each in batches)

    def batches_of(self, table: Engine | Profile) -> tuple[int, int, int]:
        """Return the smallest, best and largest batch of an optimization profile.

        Defaults: 1, at most 8, and max_batch_size. If the batch is fixed, all three are that batch.
        """
        if not self.onnx.dynamic_axes:
            return self.onnx.batch_size, self.onnx.batch_size, self.onnx.batch_size
        largest = table.max_batch_size or max(self.max_batch_size, table.min_batch_size or 1)
        smallest = table.min_batch_size or 1
        return smallest, table.opt_batch_size or max(smallest, min(8, largest)), largest

    @property
    def from_onnx(self) -> bool:
        """Whether the source is an ONNX file. Then there is no PyTorch network, and the file is the reference."""
        return re.search(r"\.onnx([@?#].*)?$", self.weights.source) is not None

    @property
    def program_suffix(self) -> str | None:
        """The suffix of a source of TorchScript or torch.export, which contains the network; None for other sources."""
        if (self.architecture.timm, self.architecture.network) != (None, None):
            return None
        found = re.search(r"(\.pt2|\.pth?|\.ts|\.jit|\.torchscript)([@?#].*)?$", self.weights.source)
        return found and found[1]

    @property
    def has_engine(self) -> bool:
        """Whether one of the formats is an engine."""
        return not set(ENGINES).isdisjoint(self.formats)


class Model(Struct, frozen=True):
    """A model of the project: a folder under models/, and its spec.

    Attributes:
        query: The query of the URL in weights.source, with its question mark. The spec here does not contain it: a
            query may hold a signature, so that only the download gets it.
    """

    name: str
    spec: Spec
    query: str = ""

    def without_query(self) -> "Model":
        """Return the model with the query of weights.source apart from its spec."""
        weights = self.spec.weights
        if not weights.source.startswith(("https://", "http://")):
            return self
        source, question_mark, query = weights.source.partition("#")[0].partition("?")
        spec = replace(self.spec, weights=replace(weights, source=source))
        return Model(self.name, spec, f"{question_mark}{query}")

    @property
    def file(self) -> str:
        """The path of the spec."""
        return f"{MODELS}/{self.name}/model.toml"

    def source(self, path: str) -> str:
        """Return a path of the spec relative to the project. validation.py has checked that the model may use it."""
        return os.path.normpath(f"{MODELS}/{self.name}/{path}") if not os.path.isabs(path) else path

    def artifact(self, file: str) -> str:
        """Return the path of a file under build/."""
        return f"{BUILD}/{self.name}/{file}"

    @property
    def weights(self) -> str:
        """The path of the artifact with the weights. It contains the network too if the source does."""
        if self.spec.from_onnx:
            return self.artifact("weights.onnx")
        if suffix := self.spec.program_suffix:
            return self.artifact("weights.pt2" if suffix == ".pt2" else "weights.pt")
        return self.artifact("weights.safetensors")

    @property
    def reference(self) -> str:
        """The library that computes the outputs with which artifacts are compared."""
        return "ONNX Runtime" if self.spec.from_onnx else "PyTorch"

    def triton_name(self, model_format: str) -> str:
        """Return the name of the Triton model of a format, or of a part of the ensemble: the spec's, or the default."""
        table = self.spec.triton.get(model_format)
        own = table.get("name") if isinstance(table, dict) else None
        return own if isinstance(own, str) else self.name + TRITON_MODELS[model_format].suffix

    @property
    def served_formats(self) -> list[str]:
        """The formats that Triton serves."""
        return [model_format for model_format in self.spec.formats if model_format in FORMATS]

    def largest_batch(self, model_format: str) -> int:
        """Return the max_batch_size of a Triton model. It is 0 if dims contain the batch.

        Then the batch is fixed, or only clients form it, since the spec says 0.
        """
        bounds = [self.spec.max_batch_size]
        if model_format in ("onnx", "tensorrt") and not self.spec.onnx.dynamic_axes:
            return 0
        if model_format == "tensorrt":
            bounds.append(self.spec.profile[2])
        table = self.spec.triton.get(model_format)
        own = table.get("max_batch_size") if isinstance(table, dict) else None
        return min(*bounds, own) if type(own) is int and own >= 0 else min(bounds)

    @property
    def ensemble_parts(self) -> list[str]:
        """The Triton models that an ensemble adds: itself, and its preprocessing if there is such a step."""
        return ensemble_parts(self.spec.ensemble, {part: self.triton_name(part) for part in ENSEMBLE_MODELS})

    @property
    def steps(self) -> list[EnsembleStep]:
        """The steps of an ensemble of one's own; empty without one."""
        return own_steps(self.spec.ensemble)

    def python_name(self, folder: str) -> str:
        """Return the name of the Triton model of a folder with a Python model."""
        return f"{self.name}_{folder}"

    @property
    def plans(self) -> dict[str, str | None]:
        """The compute capability of each TensorRT plan, by file name. None: the capability of this machine's GPU."""
        capabilities = self.spec.engine.compute_capabilities
        return {f"model.sm{c.replace('.', '')}.plan": c for c in capabilities} or {"model.plan": None}

    @property
    def triton_models(self) -> dict[str, str]:
        """The description of each Triton model, "format onnx" or "ensemble part preprocess", by its name."""
        formats = {
            **dict.fromkeys(self.served_formats, "format"),
            **dict.fromkeys(self.ensemble_parts, "ensemble part"),
        }
        names = {self.triton_name(model_format): f"{kind} {model_format}" for model_format, kind in formats.items()}
        return names | {self.python_name(each): f"Python model {each}" for each in python_folders(self.steps)}

    @property
    def torchscript(self) -> TorchScript:
        """[torchscript] with its defaults, which were measured on an H100 (docs/how-to/torchscript-on-gpu.md)."""
        table = self.spec.torchscript
        precision = table.precision or ("fp16" if self.triton_keys.device == "gpu" else "fp32")
        default: MemoryFormat = "contiguous" if precision == "fp32" else "channels_last"
        return TorchScript(precision=precision, memory_format=table.memory_format or default)

    @property
    def newest_opset(self) -> int:
        """The newest opset that the release reads, at most 20, the last of the TorchScript exporter."""
        return min(support.opset, 20) if (support := releases.onnx_support(self.release)) else 20

    @property
    def is_cast(self) -> bool:
        """Whether a cast of model.pt is served instead of model.pt."""
        unchanged = TorchScript(precision="fp32", memory_format="contiguous")
        return "torchscript" in self.spec.formats and self.torchscript != unchanged

    def precision(self, model_format: str) -> str:
        """Return the precision of the artifact that is served in a format."""
        if model_format == "torchscript":
            return str(self.torchscript.precision)
        return self.spec.engine.precision if model_format == "tensorrt" else self.spec.onnx.precision

    def files(self, model_format: str) -> list[str]:
        """Return the artifacts that are served together as one Triton model."""
        if model_format == "tensorrt":
            return list(self.plans)
        if model_format == "onnx":
            return [self.graph_file(self.spec.onnx.precision)]
        cast = model_format == "torchscript" and self.is_cast
        return [f"model.{self.torchscript.precision}.pt" if cast else FORMATS[model_format].file]

    def plan_suffix(self, plan: str) -> str:
        """Return ".sm86" for one of several plans, and an empty text for the only plan."""
        return "" if self.plans[plan] is None else "." + plan.split(".")[1]

    def artifact_task_name(self, model_format: str, file: str) -> str:
        """Return the name of an artifact's tasks: the Triton model, and the suffix of the plan."""
        return self.triton_name(model_format) + (self.plan_suffix(file) if model_format == "tensorrt" else "")

    def graph_file(self, precision: str) -> str:
        """Return the ONNX file from which an engine of this precision is compiled."""
        return "model.onnx" if precision in NATIVE_PRECISIONS else f"model.{precision}.onnx"

    def graph_name(self, precision: str) -> str:
        """Return the name of the tasks of such a graph if it is not served. Names of models contain no dot."""
        return f"{self.name}.{precision}"

    @property
    def graph(self) -> str:
        """The ONNX file from which this model's engines are compiled."""
        return self.graph_file(self.spec.engine.precision)

    @property
    def converted(self) -> bool:
        """Whether engines are compiled from a graph of reduced precision."""
        return self.spec.has_engine and self.graph != "model.onnx"

    @property
    def graph_gated_separately(self) -> bool:
        """Whether engines are compiled from a graph that is not served, so that the gate checks it separately."""
        return self.spec.has_engine and not ("onnx" in self.spec.formats and self.files("onnx") == [self.graph])

    @property
    def reduced_precisions(self) -> list[str]:
        """The precisions of the graphs of reduced precision that are compiled or served."""
        compiled = {self.spec.engine.precision} if self.converted else set()
        served = {self.spec.onnx.precision} if "onnx" in self.spec.formats else set()
        return sorted((compiled | served).difference(NATIVE_PRECISIONS))

    @property
    def triton_keys(self) -> TritonKeys:
        """The keys of [triton] that are not fields of Triton's ModelConfig, with their defaults."""
        triton = self.spec.triton
        return TritonKeys(**{key: triton[key] for key in TritonKeys.__struct_fields__ if key in triton})

    @property
    def config_fields(self) -> dict[str, Any]:
        """The rest of [triton]: fields of Triton's ModelConfig, and a table of fields by format."""
        keys = TritonKeys.__struct_fields__
        return {key: value for key, value in self.spec.triton.items() if key not in keys}

    @property
    def release(self) -> str:
        """The Triton release that will serve the model, "26.08", as in the tags of its containers."""
        return self.triton_keys.release

    @property
    def seed(self) -> int | None:
        """The seed of random weights, None if the weights are real."""
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
