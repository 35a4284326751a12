"""A model of the project, and everything that follows from its spec: which artifacts are built, and under which names.

The spec is data. Reading it runs no code of the model and imports nothing heavy.
"""

import os
from typing import Any, Literal

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from build_tasks.paths import BUILD, MODELS
from build_tasks.spec.ensemble_tables import EnsembleStep, ensemble_parts, own_steps, python_folders
from build_tasks.spec.spec_table import Spec
from build_tasks.spec.tables import NATIVE_PRECISIONS, Aoti, MemoryFormat, Table, TorchScript, TritonKeys
from build_tasks.triton import releases
from build_tasks.triton.platforms import ENSEMBLE_MODELS, FORMATS, TRITON_MODELS


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
    def weights_license(self) -> str | None:
        """The path of the artifact with the license that the source states; None for a source that cannot state one."""
        scheme, _ = split_source(self.spec.weights.source)
        return self.artifact("weights.license.json") if scheme in ("timm", "hf") else None

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
        return _files_by_capability("plan", self.spec.engine.compute_capabilities)

    @property
    def packages(self) -> dict[str, str | None]:
        """The compute capability of each package of AOTInductor, by file name. None: the machine that builds it."""
        return _files_by_capability("pt2", self.spec.aoti.compute_capabilities)

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
        precision = table.precision or self._default_precision
        default: MemoryFormat = "contiguous" if precision == "fp32" else "channels_last"
        return TorchScript(precision=precision, memory_format=table.memory_format or default)

    @property
    def aoti(self) -> Aoti:
        """[aoti] with its defaults."""
        return replace(self.spec.aoti, precision=self.spec.aoti.precision or self._default_precision)

    @property
    def _default_precision(self) -> Literal["fp16", "fp32"]:
        """The precision in which PyTorch serves a network if the spec does not say it."""
        return "fp16" if self.triton_keys.device == "gpu" else "fp32"

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
        if model_format in ("torchscript", "aoti"):
            return str(getattr(self, model_format).precision)
        return self.spec.engine.precision if model_format == "tensorrt" else self.spec.onnx.precision

    def files(self, model_format: str) -> list[str]:
        """Return the artifacts that are served together as one Triton model."""
        if model_format in ("tensorrt", "aoti"):
            return list(self.plans if model_format == "tensorrt" else self.packages)
        if model_format == "onnx":
            return [self.graph_file(self.spec.onnx.precision)]
        cast = model_format == "torchscript" and self.is_cast
        return [f"model.{self.torchscript.precision}.pt" if cast else FORMATS[model_format].file]

    def capability_suffix(self, file: str) -> str:
        """Return ".sm86" for the plan or package of a compute capability, and an empty text for other artifacts."""
        capability = (self.plans | self.packages).get(file)
        return "" if capability is None else "." + file.split(".")[1]

    def artifact_task_name(self, model_format: str, file: str) -> str:
        """Return the name of an artifact's tasks: the Triton model, and the suffix of a compute capability."""
        return self.triton_name(model_format) + self.capability_suffix(file)

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


def _files_by_capability(suffix: str, capabilities: list[str]) -> dict[str, str | None]:
    """Return the compute capability of each compiled artifact, by file name; {"model.plan": None} without any."""
    return {f"model.sm{c.replace('.', '')}.{suffix}": c for c in capabilities} or {f"model.{suffix}": None}


def table_settings(table: Table) -> dict[str, Any]:
    """Return a table as plain data, as it is recorded in a stage's fingerprint."""
    plain: dict[str, Any] = to_builtins(table)
    return plain


def split_source(source: str) -> tuple[str, str]:
    """Return (scheme, rest) of weights.source. A path without a scheme has the scheme "file"."""
    scheme, separator, rest = source.partition("://")
    return (scheme, rest) if separator else ("file", source)
